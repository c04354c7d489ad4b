"""Stage I with a short memory that chooses: sampled blocks are actions with a surrogate of their own."""

from __future__ import annotations

import pytest
import tiny
import torch

from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.replay import Learner, chosen_blocks, collate
from vismem.training.trainer import MemoryTrainer

REPLY = "a red <ms_I>cup, and two green <ms_I>pens."


def rows(count=4) -> list[dict]:
    return [
        {"prompt": f"What is on picture {i}?", "images": [tiny.picture(i)], "answer": "cup", "completion": REPLY}
        for i in range(count)
    ]


def trainer(tmp_path, model, reward, **changes) -> MemoryTrainer:
    settings = {
        "stage": "stage1",
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "group_size": 4,
        "max_new_tokens": 6,
        "learning_rate": 1e-2,
        "injection_places": "anywhere",
        "anywhere_rate": 1.0,
        "kl_coef": 0.0,
        "baseline": "off",
        "skip_solved": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
        **changes,
    }
    args = MemoryTrainingArguments(str(tmp_path / "run"), **settings)
    return MemoryTrainer(model, args, rows(), reward_funcs=reward)


def first_blocks(model) -> torch.Tensor:
    """Probabilities [N, P] of the first look's blocks, for one row with the image in view."""
    batch = tiny.prompts(model.processor, [tiny.message("What is on picture 0?", tiny.picture(0))])
    policy = tiny.vismem.invocation.Forced([(0, 0, "short")])
    out = model.generate(**batch, invocation=policy, max_new_tokens=2, return_dict_in_generate=True)
    return out.invocations[0][0].choice.scores.softmax(-1)


@pytest.fixture
def collected(monkeypatch):
    """Drops the words' part of the objective, and rewards a look by the blocks it took."""
    from vismem.training import experience

    def advantages(self, rows, step, places, state=None, collect=experience.Collector.collect):
        found = collect(self, rows, step, places, state)
        looks = [[i.choice.blocks for i in r.invocations if i.choice is not None] for r in found.rollouts]
        taken = [float((torch.cat(blocks) == 0).float().mean()) if blocks else 0.25 for blocks in looks]
        found.advantages, _ = experience.grpo.group_advantages(torch.tensor(taken), self.args.group_size)
        return found

    monkeypatch.setattr(experience.Collector, "collect", advantages)


def test_blocks_that_earn_more_become_likelier(tmp_path, collected):
    model = tiny.equip("idefics3", memory_init="attended", min_gap=1)
    with torch.no_grad():
        model.memory.short.choice.log_scale.fill_(-1.0)  # undecided, so that every block is tried
        before = first_blocks(model)[:, 0].mean()
    run = trainer(tmp_path, model, lambda completions, **_: [0.0] * len(completions), max_steps=16, logging_steps=1)
    run.train()
    assert first_blocks(model)[:, 0].mean() > before + 0.2
    assert any("choice/clip_share" in entry for entry in run.state.log_history)


def test_without_their_weight_blocks_are_no_actions(tmp_path, collected):
    """Words' gradients alone never move the choice's own parameters."""
    model = tiny.equip("idefics3", memory_init="attended")
    choice = {name: p.detach().clone() for name, p in model.memory.short.choice.named_parameters()}
    rest = model.memory.short.memory_init.detach().clone()
    trainer(tmp_path, model, lambda completions, **_: [0.0] * len(completions), choice_coef=0.0, max_steps=2).train()
    for name, p in model.memory.short.choice.named_parameters():
        assert torch.equal(p, choice[name]), name
    assert not torch.equal(model.memory.short.memory_init, rest)


def test_the_replayed_choice_is_the_decoded_one(tmp_path):
    """The log-probabilities of recorded blocks, padded to the row with the most of them."""
    model = tiny.equip("qwen2_5_vl", memory_init="attended")
    batch = tiny.mixed_batch(model.processor)
    policy = tiny.vismem.invocation.Forced([(0, 0, "short"), (0, 3, "short"), (1, 1, "long"), (2, 2, "short")])
    out = model.generate(
        **batch,
        invocation=policy,
        max_new_tokens=6,
        do_sample=True,
        seed=[1, 2, 3],
        record=True,
        sample_blocks=True,
        return_dict_in_generate=True,
    )
    replayed = Learner(model)(collate(batch, out.rollout, 0, 1.0, formed=False))
    taken = chosen_blocks(out.rollout, torch.device("cpu"))
    assert replayed.choices.shape == (3, 8) and taken.sum(1).tolist() == [8, 0, 4]
    decoded = torch.cat([i.choice.log_probs for r in out.rollout for i in r.invocations if i.choice is not None])
    assert torch.allclose(replayed.choices[taken], decoded, atol=1e-3)
    assert not replayed.choices[~taken].any()


def test_the_warm_up_learns_the_gaze(tmp_path):
    model = tiny.equip("idefics3", memory_init="attended")
    run = trainer(tmp_path, model, None, stage="warmup", max_steps=24, max_new_tokens=16, logging_steps=1)
    run.train()
    gaze = [entry["gaze"] for entry in run.state.log_history if "gaze" in entry]
    assert len(gaze) > 12 and sum(gaze[-4:]) < 0.7 * sum(gaze[:4])


def test_a_warm_up_without_the_gaze_leaves_the_choice_alone(tmp_path):
    model = tiny.equip("idefics3", memory_init="attended")
    choice = {name: p.detach().clone() for name, p in model.memory.short.choice.named_parameters()}
    trainer(tmp_path, model, None, stage="warmup", gaze_coef=0.0, max_new_tokens=16).train()
    for name, p in model.memory.short.choice.named_parameters():
        assert torch.equal(p, choice[name]), name
