"""Rollouts and their replay: the training forward reads what decoding saw, and no row depends on its neighbours."""

from __future__ import annotations

from itertools import chain

import pytest
import tiny
import torch
from torch.nn.utils.rnn import pad_sequence

from vismem.config import KINDS
from vismem.decoding.policies import Random
from vismem.memory import Formed, Observation
from vismem.training.replay import Learner, collate, without_memory
from vismem.training.rollout import counterfactuals, sampling, write

TEMPERATURE, COPIES, BUDGET = 0.7, 3, 18
CONVERSATIONS = [
    tiny.message("What is on the table?", tiny.picture(0)),
    tiny.message("Describe the image: a red cup, a blue book and two green pens.", tiny.picture(1), tiny.picture(2)),
    tiny.message("A red cup?"),
]
SIGHTED = [True, True, False]
BASES = [("idefics3", {}), ("idefics3", {"sliding_window": 12}), ("qwen2_5_vl", {})]
WITH_WINDOW = pytest.mark.parametrize(("family", "base"), BASES, ids=["idefics3", "idefics3-sliding", "qwen2_5_vl"])


def tempting(family: str, base: dict | None = None):
    """A tiny model that invokes often: the invocation tokens' output rows are perturbed and enlarged."""
    model = tiny.equip(family, min_gap=2, max_invocations=3, base=base)
    torch.manual_seed(7)
    with torch.no_grad():
        rows = (
            [model.tokens.invocation, model.tokens.end]
            if model.tokens.tied
            else [model.tokens.invocation_output, model.tokens.end_output]
        )
        for row in rows:
            row.add_(0.5 * row.std() * torch.randn_like(row))
            row.mul_(3)
    return model


def prompts(model, which: list[int] | None = None) -> dict:
    return tiny.prompts(model.processor, [CONVERSATIONS[i] for i in ([0, 1, 2] if which is None else which)])


def seeds_for(which: list[int], copies: int = COPIES) -> list[int]:
    """A seed for each row that depends on prompt and copy alone."""
    return [100 * prompt + copy for prompt in which for copy in range(copies)]


def policy_of(stage: str, seeds: list[int]):
    return Random(0.3, "anywhere", seed=seeds) if stage == "one" else "learned"


def rollouts_of(model, stage: str, which: list[int] | None = None, copies: int = COPIES):
    which = [0, 1, 2] if which is None else which
    seeds, settings = seeds_for(which, copies), sampling(model, BUDGET, TEMPERATURE)
    return write(model, prompts(model, which), policy_of(stage, seeds), settings, seeds, copies)


def replayed(model, rollouts, given: str, which: list[int] | None = None) -> dict:
    """Rollouts as arguments of the training forward: with states, with memories, or with neither."""
    pad = model.processor.tokenizer.pad_token_id
    batch = collate(prompts(model, which), rollouts, pad, TEMPERATURE, formed=given == "memories")
    if given == "recomputed":
        del batch["states"]
    return batch


def answers(batch: dict, log_probs: torch.Tensor) -> torch.Tensor:
    return log_probs[:, batch["prompt_length"] :]


def gradients(model, batch: dict, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a weighted sum of the log-probabilities, by parameter; `weights` [n] by row."""
    model.zero_grad()
    (model(**batch).log_probs.sum(1) * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_gradients(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        scale = float(theirs[name].abs().max())
        assert torch.allclose(gradient, theirs[name], atol=1e-4 * max(scale, 1), rtol=1e-3), name


# What a rollout is.


@pytest.mark.parametrize("stage", ["one", "two"])
def test_a_rollout_records_what_was_sampled(family, stage):
    model = tempting(family)
    rollouts = rollouts_of(model, stage)
    assert len(rollouts) == 3 * COPIES
    invocations = list(chain(*(r.invocations for r in rollouts)))
    assert {i.kind for i in invocations} == set(KINDS)
    assert max(len(r.invocations) for r in rollouts) > 1
    assert {i.forced for i in invocations} == {stage == "one"}
    for index, rollout in enumerate(rollouts):
        assert len({len(t) for t in (rollout.tokens, rollout.sampled, rollout.allowed, rollout.log_probs)}) == 1
        put_in = {i.position + 1 for i in rollout.invocations}
        put_in |= {i.position for i in rollout.invocations if stage == "one"}
        assert set((~rollout.sampled).nonzero().flatten().tolist()) == put_in
        assert (rollout.log_probs[~rollout.sampled] == 0).all() and (rollout.log_probs[rollout.sampled] < 0).all()
        assert rollout.sampled.sum() <= BUDGET
        assert not (rollout.allowed[:, 0].any() and not SIGHTED[index // COPIES])
        assert bool(rollout.allowed.any()) == (stage == "two")
        start = 0
        for i in rollout.invocations:
            assert i.states.shape == (i.position + 1 - start, model.backbone.hidden_size)
            start = i.position + 2


# Replay.


@pytest.mark.parametrize("given", ["states", "memories", "recomputed"])
@pytest.mark.parametrize("stage", ["one", "two"])
@WITH_WINDOW
def test_replay_equals_decoding(family, base, stage, given):
    model = tempting(family, base)
    rollouts = rollouts_of(model, stage)
    batch = replayed(model, rollouts, given)
    out = model(**batch)
    recorded = pad_sequence([r.log_probs for r in rollouts], batch_first=True)
    sampled = pad_sequence([r.sampled for r in rollouts], batch_first=True)
    found = answers(batch, out.log_probs)
    assert (found - recorded)[sampled].abs().max() < 1e-4
    assert not found[~sampled].any() and not out.log_probs[:, : batch["prompt_length"]].any()
    for rollout, formed in zip(rollouts, out.memories, strict=True):
        for seen, memory in zip(rollout.invocations, formed, strict=True):
            assert torch.allclose(seen.memory, memory, atol=1e-4)
    if given != "memories":
        for rollout, states in zip(rollouts, out.states, strict=True):
            for seen, state in zip(rollout.invocations, states, strict=True):
                assert torch.allclose(seen.states, state, atol=1e-4)


def test_replay_notices_another_memory(family):
    """The comparison above can fail: with other vectors in the slots, the words after them get other probabilities."""
    model = tempting(family)
    rollouts = rollouts_of(model, "two")
    batch = replayed(model, rollouts, "memories")
    before = model(**batch).log_probs
    batch["memories"] = [[m + 0.1 for m in row] for row in batch["memories"]]
    after = model(**batch).log_probs
    changed = (answers(batch, after - before).abs() > 1e-3).any(1)
    spoken = [bool(r.invocations) and bool(r.sampled[r.invocations[0].position + 1 :].any()) for r in rollouts]
    assert changed.tolist() == spoken and any(spoken)


@pytest.mark.parametrize("stage", ["one", "two"])
def test_copies_of_a_prompt_are_read_as_if_alone(family, stage):
    """Log-probabilities and gradients of G copies per prompt are those of each row in a batch of its own."""
    model = tempting(family)
    rollouts = rollouts_of(model, stage)
    given = "states" if stage == "one" else "memories"
    batch = replayed(model, rollouts, given)
    weights = torch.linspace(-1, 1, len(rollouts))
    together = answers(batch, model(**batch).log_probs)
    ours = gradients(model, batch, weights)
    theirs: dict[str, torch.Tensor] = {}
    for row, rollout in enumerate(rollouts):
        single = replayed(model, [rollout], given, [row // COPIES])
        assert single["copies"] == 1
        alone = answers(single, model(**single).log_probs)[0]
        assert torch.allclose(together[row, : len(alone)], alone, atol=1e-4)
        for name, gradient in gradients(model, single, weights[row : row + 1]).items():
            theirs[name] = theirs[name] + gradient if name in theirs else gradient
    touched = {name for name, gradient in theirs.items() if gradient.any()}
    assert any(name.startswith("tokens.") for name in touched)
    assert any(name.startswith("memory.") for name in touched) == (stage == "one")
    assert_equal_gradients({n: ours[n] for n in touched}, {n: theirs[n] for n in touched})


def layers_run(model) -> list[int]:
    """Counts, from now on, how often the base's first text layer is computed, in the backward pass too."""
    runs: list[int] = []
    first = model.backbone.language_model.layers[0].input_layernorm  # inside what is computed again
    first.register_forward_pre_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("stage", ["one", "two"])
@WITH_WINDOW
def test_gradient_checkpointing_gives_the_same_gradients(family, base, stage):
    model = tempting(family, base)
    rollouts = rollouts_of(model, stage)
    batch = replayed(model, rollouts, "states" if stage == "one" else "memories")
    weights = torch.linspace(-1, 1, len(rollouts))
    runs = layers_run(model)
    kept = gradients(model, batch, weights)
    plain = len(runs)
    model.gradient_checkpointing_enable()
    again = gradients(model, batch, weights)
    assert len(runs) == 2 * plain + 1  # the policy's layer once more, in the backward pass
    assert_equal_gradients(again, kept)
    assert not any(module.training for module in model.base.modules())


def test_the_learner_lets_every_trained_parameter_take_part(family):
    model = tempting(family)
    learner = Learner(model)
    rollouts = rollouts_of(model, "one")
    batch = replayed(model, rollouts, "states")
    assert torch.equal(learner(batch).log_probs, model(**batch).log_probs)
    learner.zero_grad()
    learner(None).log_probs.backward()
    assert all(p.grad is not None and not p.grad.any() for p in learner.parameters())
    assert not any(name.startswith("base") for name, _ in learner.named_parameters())


# Rows and their neighbours.


@pytest.mark.parametrize("stage", ["one", "two"])
@WITH_WINDOW
def test_rollouts_do_not_depend_on_the_batch(family, base, stage):
    model = tempting(family, base)
    together = rollouts_of(model, stage)
    orders = [[2, 0, 1], [1], [0, 2]]
    assert len({tuple(r.tokens.tolist()) for r in together}) == len(together)  # each seed writes its own
    for order in orders:
        for place, rollout in enumerate(rollouts_of(model, stage, order)):
            expected = together[order[place // COPIES] * COPIES + place % COPIES]
            assert torch.equal(rollout.tokens, expected.tokens)
            assert torch.equal(rollout.sampled, expected.sampled)
            assert torch.equal(rollout.allowed, expected.allowed)
            assert rollout.invocations == expected.invocations
            assert torch.allclose(rollout.log_probs, expected.log_probs, atol=1e-4)
    fewer = rollouts_of(model, stage, copies=1)
    assert [r.tokens.tolist() for r in fewer] == [r.tokens.tolist() for r in together[::COPIES]]


def test_seeds_must_be_as_many_as_rows(family):
    model = tempting(family)
    with pytest.raises(ValueError, match="one seed for each output row"):
        write(model, prompts(model), "learned", sampling(model, 4, 1.0), [1, 2], 1)


# Without memory.


def test_without_memory_gives_the_log_probabilities_of_the_base(family):
    """Without invocation and end tokens, the words get the base's own probabilities."""
    model = tempting(family)
    alone, _ = tiny.base_and_processor(family)  # a base that never met a memory
    ids = torch.tensor(model.tokens.ids)
    rollouts = rollouts_of(model, "two")
    batch = replayed(model, rollouts, "memories")
    bare, order = without_memory(batch, ids)
    found = torch.zeros(batch["input_ids"].shape).scatter(1, order, model(**bare).log_probs)
    found, compared = answers(batch, found), 0
    for row, rollout in enumerate(rollouts):
        inputs = prompts(model, [row // COPIES])
        start, word = inputs["input_ids"].shape[1], ~torch.isin(rollout.tokens, ids)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], rollout.tokens[word][None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        if "mm_token_type_ids" in inputs:
            more = inputs["input_ids"].shape[1] - start
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, more))
        with torch.no_grad():
            logits = alone(**inputs).logits[0, start - 1 : -1] / TEMPERATURE
        inside = ids[ids < logits.shape[-1]]  # padding of the base's vocabulary whose ids the four tokens took
        logits[:, inside] = float("-inf")
        expected = logits.log_softmax(-1).gather(1, rollout.tokens[word][:, None]).squeeze(1)
        assert torch.allclose(found[row, : len(word)][word], expected, atol=1e-4)
        assert not found[row, : len(word)][~word].any()
        compared += bool(rollout.invocations) * len(expected)
    assert compared > 50
    moved = gradients(model, bare, torch.ones(len(rollouts)))
    assert not any(gradient.any() for gradient in moved.values())  # nothing trained has a part in it


# Counterfactuals.


def turned_around(model):
    """Stage II's rollouts and their counterfactuals."""
    rollouts = rollouts_of(model, "two")
    settings, seeds = sampling(model, BUDGET, TEMPERATURE), [s + 1 for s in seeds_for([0, 1, 2])]
    return rollouts, counterfactuals(model, prompts(model), rollouts, COPIES, SIGHTED, settings, seeds)


def other(kind: str) -> str:
    return KINDS[1 - KINDS.index(kind)]


def test_counterfactuals_swap_the_first_invocation(family):
    model = tempting(family)
    rollouts, turned = turned_around(model)
    wanted = [i for i, r in enumerate(rollouts) if r.invocations and SIGHTED[i // COPIES]]
    assert list(turned) == wanted and len(wanted) > 3
    assert {rollouts[i].invocations[0].kind for i in wanted} == set(KINDS)
    for index, found in turned.items():
        one, first = rollouts[index], rollouts[index].invocations[0]
        here, kind = first.position, other(first.kind)
        assert torch.equal(found.tokens[:here], one.tokens[:here])
        assert found.tokens[here : here + 2].tolist() == [model.tokens.invocation_ids[kind], model.tokens.end_ids[kind]]
        assert found.invocations[0].kind == kind and found.invocations[0].position == here
        assert not found.sampled[: here + 2].any() and found.sampled[here + 2]
        written = here + 1 + int(found.sampled.sum())  # opening, its invocation, and what was sampled after it
        ended = int(found.tokens[-1]) == model.generation_config.eos_token_id
        assert written == BUDGET or ended
        # Its memory is the one that the other kind forms of what was observed.
        inputs = prompts(model, [index // COPIES])
        vision = {name: inputs[name] for name in model.backbone.image_inputs}
        with torch.no_grad():
            features = model.base.get_image_features(**vision, return_dict=True)
            visual = model.backbone.visual_states(inputs["input_ids"] == model.backbone.image_token_id, features)[0]
            patches = model.memory.short.encode(model.backbone.images(**vision))
            segment = model.tokens.embed(found.tokens[: here + 1])
            expected = model.memory.form(kind, [Observation(visual, first.states, segment, patches)]).vectors[0]
        assert torch.allclose(found.invocations[0].memory, expected, atol=1e-4)
        assert torch.equal(found.invocations[0].states, first.states)


@WITH_WINDOW
def test_counterfactuals_go_on_with_kinds_swapped(family, base):
    """Replayed, its words get the recorded probabilities; where it invokes again, the other kind's token does."""
    model = tempting(family, base)
    _, turned = turned_around(model)
    again = 0
    for index, found in turned.items():
        prompt = index // COPIES
        batch = replayed(model, [found], "states", [prompt])
        start = batch["prompt_length"]
        rest = {k: v for k, v in batch.items() if k not in ("sampled", "allowed", "temperature")}
        with torch.no_grad():
            logits = model(**rest).logits[0, start - 1 : -1]
        logits = model.tokens.forbid(logits, found.allowed) / TEMPERATURE
        drawn = found.tokens.clone()
        for later in found.invocations[1:]:
            drawn[later.position] = model.tokens.invocation_ids[other(later.kind)]
            again += 1
        expected = logits.log_softmax(-1).gather(1, drawn[:, None]).squeeze(1)
        assert torch.allclose(found.log_probs[found.sampled], expected[found.sampled], atol=1e-4)
        recomputed = model(**replayed(model, [found], "recomputed", [prompt]))
        for seen, states in zip(found.invocations, recomputed.states[0], strict=True):
            assert torch.allclose(seen.states, states, atol=1e-4)  # the observation is what the words lead to
    assert again > 2


def test_kinds_that_are_equally_good_give_the_same_words(family, monkeypatch):
    """From its own seed a counterfactual draws its answer's random numbers, token by token."""
    model = tempting(family)
    with torch.no_grad():
        for parameter in model.tokens.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))

    def zeros(_kind, seen):
        return Formed(torch.zeros(len(seen), 4, seen[0].states.shape[-1]), [None] * len(seen))

    monkeypatch.setattr(model.memory, "form", zeros)
    rollouts = rollouts_of(model, "two")
    settings = sampling(model, BUDGET, TEMPERATURE)
    turned = counterfactuals(model, prompts(model), rollouts, COPIES, SIGHTED, settings, seeds_for([0, 1, 2]))
    swap = {ids["short"]: ids["long"] for ids in (model.tokens.invocation_ids, model.tokens.end_ids)}
    swap |= {long: short for short, long in swap.items()}
    assert len(turned) > 3 and any(len(found.invocations) > 1 for found in turned.values())
    for index, found in turned.items():
        one = rollouts[index].tokens.tolist()
        assert [swap.get(token, token) for token in found.tokens.tolist()] == one


def test_counterfactuals_do_not_decode_the_opening_again(family):
    model = tempting(family)
    rollouts, _ = turned_around(model)
    late = [i for i, r in enumerate(rollouts) if r.invocations and r.invocations[0].position > 2 and i < 2 * COPIES]
    assert late
    settings, widths = sampling(model, BUDGET, TEMPERATURE), []
    model.base.model.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append(kwargs["inputs_embeds" if "input_ids" not in kwargs else "input_ids"]),
        with_kwargs=True,
    )
    for index in late:
        widths.clear()
        inputs, rollout = prompts(model, [index // COPIES]), rollouts[index]
        found = counterfactuals(model, inputs, [rollout], 1, [True], settings, [index])[0]
        read = [tensor.shape[1] for tensor in widths]
        opening = rollout.invocations[0].position + 1 + found.invocations[0].length + 1
        assert read[:2] == [inputs["input_ids"].shape[1], opening]
        assert len(read) == 1 + int(found.sampled.sum())  # one forward for each word after the opening


def test_rows_without_invocations_have_no_counterfactual(family):
    model = tempting(family)
    settings = sampling(model, 6, TEMPERATURE)
    rollouts = write(model, prompts(model), "off", settings, [1, 2, 3])
    assert counterfactuals(model, prompts(model), rollouts, 1, SIGHTED, settings, [1, 2, 3]) == {}
