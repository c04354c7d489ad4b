"""Group-relative policy optimisation, against cases by hand and, where TRL is installed, against its own trainer."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from families.words import tokenizer

from vismem.training import grpo

CLIP, BETA, GROUP = 0.2, 0.05, 4


# Advantages (Eq. 12).


def test_advantages_by_hand():
    advantages, spread = grpo.group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 4.0, 6.0, 8.0]), 4)
    # Means 1/2 and 5; squared distances 4 * 1/4 and 9 + 1 + 1 + 9, over G - 1 = 3.
    first, second = math.sqrt(1 / 3), math.sqrt(20 / 3)
    assert torch.allclose(spread, torch.tensor([first, second]))
    half, one = 0.5 / (first + 1e-4), 1 / (second + 1e-4)
    assert torch.allclose(advantages, torch.tensor([half, -half, -half, half, -3 * one, -one, one, 3 * one]))


def test_a_group_without_spread_teaches_nothing():
    advantages, spread = grpo.group_advantages(torch.tensor([0.7, 0.7, 0.7, 0.0, 0.0, 3.0]), 3)
    assert spread[0] == 0 and spread[1] > 1
    assert (advantages[:3] == 0).all() and advantages[3:].abs().min() > 0.5


def test_what_a_group_shares_cancels():
    rewards = torch.rand(12, generator=torch.Generator().manual_seed(0))
    baseline = torch.tensor([0.0, 5.0, -2.0]).repeat_interleave(4)
    ours, theirs = grpo.group_advantages(rewards, 4)[0], grpo.group_advantages(rewards - baseline, 4)[0]
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize(("count", "group"), [(4, 1), (5, 2), (3, 4)])
def test_parts_of_groups_are_refused(count, group):
    with pytest.raises(ValueError, match="whole groups"):
        grpo.group_advantages(torch.zeros(count), group)


# The clipped surrogate (Eq. 13).


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "clipped"),
    [
        (1.0, 3.0, 3.0, False),
        (1.1, 2.0, 2.2, False),
        (0.9, -2.0, -1.8, False),
        (1.5, 1.0, 1.2, True),  # more of a good thing than the bound allows
        (0.5, 1.0, 0.5, False),  # too little of a good thing: may come back
        (1.5, -1.0, -1.5, False),  # too much of a bad thing: may come back
        (0.5, -1.0, -0.8, True),  # less of a bad thing than the bound allows
    ],
)
def test_clipping_on_both_sides_and_both_signs(ratio, advantage, objective, clipped):
    log_probs = torch.tensor([[math.log(0.3 * ratio)]], requires_grad=True)
    old, gain = torch.tensor([[math.log(0.3)]]), torch.tensor([advantage])
    found, bites = grpo.clipped_surrogate(log_probs, old, gain, CLIP)
    assert found.item() == pytest.approx(objective, abs=1e-5)
    assert bites.item() is clipped
    found.sum().backward()
    assert log_probs.grad.item() == pytest.approx(0 if clipped else ratio * advantage, abs=1e-5)


# The divergence.


def test_k3_by_hand():
    found = grpo.k3_divergence(torch.tensor([0.5, 0.25, 0.4]).log(), torch.tensor([0.25, 0.5, 0.4]).log())
    assert found.tolist() == pytest.approx([0.5 - math.log(0.5) - 1, 2 - math.log(2) - 1, 0], abs=1e-5)


def test_k3_is_never_negative_and_zero_at_equality():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (-4 * torch.rand(50, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    assert (grpo.k3_divergence(ours, theirs) > 0).all()
    same = theirs.clone().requires_grad_()
    assert (grpo.k3_divergence(same, theirs) == 0).all()
    grpo.k3_divergence(same, theirs).sum().backward()
    assert not same.grad.any()


def test_k3_estimates_the_divergence_of_the_policy_from_the_reference():
    """Weighted by the policy's own probabilities it is KL(policy || reference), not the other way round."""
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    found = (policy * grpo.k3_divergence(policy.log(), reference.log())).sum()
    assert found.item() == pytest.approx((policy * (policy / reference).log()).sum().item())
    assert found.item() != pytest.approx((reference * (reference / policy).log()).sum().item(), rel=0.01)


# Means over what was sampled, and the loss (Eq. 13-15).


def test_the_mean_counts_sampled_tokens_only():
    nothing = float("nan")
    values = torch.tensor([[1.0, 2.0, nothing, 6.0], [5.0, nothing, nothing, nothing], [nothing] * 4])
    sampled = torch.tensor([[True, True, False, True], [True, False, False, False], [False] * 4])
    assert grpo.trajectory_mean(values, sampled).tolist() == [3.0, 5.0, 0.0]


def test_the_loss_by_hand():
    """One trajectory of three tokens, the second put in: the first one clipped, the last one free."""
    log_probs = torch.tensor([[0.45, 0.9, 0.275]]).log().requires_grad_()
    old, reference = torch.tensor([[0.3, 0.1, 0.25]]).log(), torch.tensor([[0.45, 0.2, 0.55]]).log()
    sampled = torch.tensor([[True, False, True]])
    losses, figures = grpo.grpo_loss(log_probs, old, reference, torch.tensor([2.0]), sampled, CLIP, BETA)
    divergence = 2 - math.log(2) - 1
    assert losses.tolist() == pytest.approx([-(1.2 * 2 + 1.1 * 2) / 2 + BETA * divergence / 2], abs=1e-5)
    assert figures["kl"].tolist() == pytest.approx([divergence / 2], abs=1e-5)
    assert figures["clip_share"].tolist() == [0.5]
    assert not any(figure.requires_grad for figure in figures.values())
    losses.sum().backward()
    # The first: clipped, and at the reference. The last: -ratio * advantage, and 1 - reference / policy.
    assert log_probs.grad[0].tolist() == pytest.approx([0, 0, (-1.1 * 2 + BETA * (1 - 2)) / 2], abs=1e-5)


def test_the_first_update_follows_the_advantage():
    """Where the policy is the one that sampled, the gradient of a token is minus the advantage over the length."""
    log_probs = torch.log(torch.rand(2, 3, generator=torch.Generator().manual_seed(1))).requires_grad_()
    sampled = torch.tensor([[True, True, True], [True, False, False]])
    arguments = log_probs.detach(), log_probs.detach(), torch.tensor([1.5, -0.5]), sampled, CLIP, BETA
    losses, figures = grpo.grpo_loss(log_probs, *arguments)
    assert losses.tolist() == pytest.approx([-1.5, 0.5]) and not figures["kl"].any()
    losses.sum().backward()
    assert torch.allclose(log_probs.grad, torch.tensor([[-0.5, -0.5, -0.5], [0.5, 0, 0]]))


def test_without_a_reference_there_is_no_divergence():
    log_probs, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.1, -1.9]])
    arguments = torch.tensor([1.0]), torch.tensor([[True, True]]), CLIP
    losses, figures = grpo.grpo_loss(log_probs, old, None, *arguments, BETA)
    assert torch.equal(losses, grpo.grpo_loss(log_probs, old, old - 1, *arguments, 0.0)[0])
    assert not figures["kl"].any()


def test_an_empty_trajectory_costs_nothing():
    log_probs = torch.full((1, 3), -1.0, requires_grad=True)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    losses, _ = grpo.grpo_loss(log_probs, log_probs.detach(), log_probs - 1, torch.ones(1), nothing, CLIP, BETA)
    losses.sum().backward()
    assert losses.item() == 0 and not log_probs.grad.any()


# The adaptive coefficient.


@pytest.mark.parametrize(
    ("divergence", "factor"),
    [(0.11, 1.01), (0.1, 1.0), (0.09, 0.99), (0.12, 1.02), (5.0, 1.02), (float("inf"), 1.02), (0.0, 0.98)],
)
def test_the_coefficient_follows_the_divergence_within_bounds(divergence, factor):
    controller = grpo.AdaptiveKL(0.5, target=0.1, horizon=10)
    assert controller.update(divergence) == pytest.approx(0.5 * factor)
    assert controller.coef == pytest.approx(0.5 * factor)


def test_a_horizon_of_steady_errors_changes_the_coefficient_by_a_fifth():
    high, low = grpo.AdaptiveKL(1.0, 0.1, 20), grpo.AdaptiveKL(1.0, 0.1, 20)
    for _ in range(20):
        high.update(1.0)
        low.update(0.0)
    assert high.coef == pytest.approx(1.2, abs=0.03) and low.coef == pytest.approx(0.8, abs=0.03)


def test_the_coefficient_stays_within_a_tenth_and_ten_times_its_start():
    high, low = grpo.AdaptiveKL(0.02, 0.1), grpo.AdaptiveKL(0.02, 0.1)
    for _ in range(400):
        high.update(1.0)
        low.update(0.0)
    assert high.coef == pytest.approx(0.2) and low.coef == pytest.approx(0.002)
    assert low.update(1.0) > 0.002 and high.update(0.0) < 0.2  # and each comes back at once


def test_the_coefficient_does_not_fall_while_the_learning_rate_warms_up():
    controller = grpo.AdaptiveKL(0.5, target=0.1)
    assert controller.update(0.0, can_decrease=False) == 0.5
    assert controller.update(0.2, can_decrease=False) == pytest.approx(0.51)
    assert controller.update(0.0) == pytest.approx(0.51 * 0.98)


def test_without_a_target_the_coefficient_stays():
    controller = grpo.AdaptiveKL(0.015, target=0.0)
    assert [controller.update(divergence) for divergence in (0.0, 1.0, 100.0)] == [0.015] * 3


# Stage II's penalties (Eq. 15).


def test_penalty_for_the_wrong_kind():
    scores, swapped = torch.tensor([0.2, 0.8, 0.5, 0.0]), torch.tensor([0.9, 0.3, 0.5, 1.0])
    invoked = torch.tensor([True, True, True, False])
    assert grpo.type_penalty(scores, swapped, invoked).tolist() == pytest.approx([0.7, 0, 0, 0])


def test_penalty_for_memory_that_did_harm():
    scores = torch.tensor([0.0, 1.0, 0.0, 1.0, 2.0, 2.0, 2.0, 6.0])  # groups of four, means 1/2 and 3
    invoked = torch.tensor([True, True, False, False, True, False, True, True])
    found = grpo.negative_penalty(scores, invoked, 4)
    assert found.tolist() == pytest.approx([0.5, 0, 0, 0, 1, 0, 1, 0])


def test_the_return_of_stage_two():
    """Scores less the baseline and, where memory was invoked, less both penalties."""
    scores, swapped = torch.tensor([0.2, 0.8, 0.5, 0.0]), torch.tensor([0.9, 0.3, 1.0, 0.0])
    invoked = torch.tensor([True, True, False, True])
    found = grpo.invocation_returns(scores, torch.tensor([0.4, 0.1]), swapped, invoked, 2, 0.5)
    assert found.type_penalty.tolist() == pytest.approx([0.7, 0, 0, 0])
    assert found.negative_penalty.tolist() == pytest.approx([0.3, 0, 0, 0.25])
    expected = [0.2 - 0.4 - 0.5 * (0.7 + 0.3), 0.8 - 0.4, 0.5 - 0.1, 0.0 - 0.1 - 0.5 * 0.25]
    assert found.total.tolist() == pytest.approx(expected)


# What decoding saw beside what is replayed.


def test_importance_weights_are_ratios_that_are_cut_off():
    replayed, decoded = torch.tensor([[-1.0, -1.0, -1.0]]), torch.tensor([[-1.0, -1.5, -3.0]])
    assert grpo.importance_weights(replayed, decoded, 2.0)[0].tolist() == pytest.approx([1, math.exp(0.5), 2])


def test_weights_scale_the_surrogate_and_not_the_divergence():
    log_probs = torch.tensor([[-1.0, -2.0]])
    old, reference, sampled = log_probs.clone(), log_probs - 0.5, torch.ones(1, 2, dtype=torch.bool)
    weights = torch.tensor([[0.5, 2.0]])
    found, figures = grpo.grpo_loss(log_probs, old, reference, torch.tensor([3.0]), sampled, CLIP, BETA, weights)
    assert found.item() == pytest.approx(-3 * 2.5 / 2 + BETA * figures["kl"].item())


# The same numbers by TRL's own trainer.


@pytest.fixture(scope="module")
def trl_trainer(tmp_path_factory):
    """A tiny `GRPOTrainer`, whose reward is the number that its row names."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    folder: Path = tmp_path_factory.mktemp("trl")
    words = tokenizer([], "")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape, **ids)).save_pretrained(folder)
    settings = trl.GRPOConfig(
        str(folder / "run"),
        loss_type="grpo",
        beta=BETA,
        epsilon=CLIP,
        scale_rewards="group",
        use_bias_correction_kl=False,  # an importance weight on the divergence, which Eq. 13 has not
        num_generations=GROUP,
        per_device_train_batch_size=3 * GROUP,
        max_completion_length=3,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
    )
    return trl.GRPOTrainer(
        LlamaForCausalLM.from_pretrained(folder),
        reward_funcs=lambda score, **_: score,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "a red cup", "score": 0.0}]),
        processing_class=words,
    )


def test_advantages_are_those_of_trl(trl_trainer):
    rewards = torch.tensor([0.0, 1.0, 0.25, -2.0, 0.7, 0.7, 0.7, 0.7, 0.0, 0.0, 0.0, 1e-3])
    rows = [{"prompt": "a red cup", "score": float(reward)} for reward in rewards]
    theirs = trl_trainer._generate_and_score_completions(rows)["advantages"]
    ours, _ = grpo.group_advantages(rewards, GROUP)
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert theirs[:4].abs().max() > 1 and not theirs[4:8].any()


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_and_its_gradient_are_those_of_trl(trl_trainer, seed, monkeypatch):
    generator = torch.Generator().manual_seed(seed)
    shape = (3 * GROUP, 9)
    old = -3 * torch.rand(shape, generator=generator)
    current, reference = (old + 0.4 * torch.randn(shape, generator=generator) for _ in range(2))
    advantages = torch.randn(shape[0], generator=generator)
    lengths = torch.randint(1, shape[1] + 1, (shape[0], 1), generator=generator)
    written = torch.arange(shape[1]) < lengths
    own = (torch.rand(shape, generator=generator) < 0.7) & written  # of what is written, what the policy sampled
    own[:, 0] = True  # TRL's figures divide by the count

    theirs = current.clone().requires_grad_()
    monkeypatch.setattr(
        trl_trainer, "_get_per_token_logps_and_entropies", lambda *_, **__: (theirs, torch.zeros(shape), None)
    )
    monkeypatch.setattr(trl_trainer, "_metrics", {mode: defaultdict(list) for mode in ("train", "eval")})
    ids = torch.zeros(shape, dtype=torch.long)
    expected = trl_trainer._compute_loss(
        trl_trainer.model,
        {
            "prompt_ids": ids[:, :2],
            "prompt_mask": torch.ones_like(ids[:, :2]),
            "completion_ids": ids,
            "completion_mask": written.int(),
            "tool_mask": own.int(),
            "advantages": advantages,
            "old_per_token_logps": old,
            "ref_per_token_logps": reference,
        },
    )
    expected.backward()
    figures = {name: values[0] for mode in trl_trainer._metrics.values() for name, values in mode.items()}

    ours = current.clone().requires_grad_()
    losses, found = grpo.grpo_loss(ours, old, reference, advantages, own, CLIP, BETA)
    losses.mean().backward()
    assert losses.mean().item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    share = own.sum(1) / own.sum()  # TRL's figures are means over tokens, ours over trajectories
    assert (found["kl"] * share).sum().item() == pytest.approx(figures["kl"], abs=1e-5)
    clipped = (found["clip_share"] * share).sum().item()
    assert clipped == pytest.approx(figures["clip_ratio/region_mean"], abs=1e-5) and clipped > 0.1
