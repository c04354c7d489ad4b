"""Answers read again with other memories: the KL of the next tokens, against decoding and a manual forward."""

from __future__ import annotations

import pytest
import tiny
import torch

from vismem.analysis.replacement import distributions, next_token_kl
from vismem.decoding.policies import Forced

EVERY_FAMILY = True
SCHEDULE = Forced([(0, 2, "short"), (0, 7, "long"), (1, 5, "long"), (2, 3, "short")])
WRITING = {"return_dict_in_generate": True, "record": True, "eos_token_id": None, "max_new_tokens": 12}


def written(model, batch, schedule=SCHEDULE, **more):
    settings = {"do_sample": True, "seed": 1, **WRITING, **more}
    return model.generate(**batch, invocation=schedule, **settings)


def same(row, index, invocation):
    return invocation.memory


def test_only_a_different_memory_changes_the_next_tokens(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch, output_logits=True)
    asked = []

    def none(row, index, invocation):
        asked.append((row, index, invocation.kind))
        return None

    still, moved = next_token_kl(model, batch, out.rollout, same), next_token_kl(model, batch, out.rollout, none)
    assert [(s.row, s.index, s.kind) for s in moved] == sorted(asked)
    assert sorted(asked) == [(0, 0, "short"), (0, 1, "long"), (1, 0, "long"), (2, 0, "short")]
    assert all(abs(s.first) < 1e-5 and abs(s.rest) < 1e-5 for s in still)
    assert all(s.first > 1e-4 and s.rest > 2e-5 for s in moved)
    for shift in moved:
        invocation = out.rollout[shift.row].invocations[shift.index]
        after = out.rollout[shift.row].sampled[invocation.position + 3 :]
        assert shift.tokens == int(after.sum()) > 0
    # With the memory in place it is the distribution that decoding sampled from.
    width = min(model.tokens.base_vocabulary, *model.tokens.ids)
    for pair, shift in zip(distributions(model, batch, out.rollout, none), moved, strict=True):
        place = out.rollout[pair.row].invocations[pair.index].position + 2
        seen = out.logits[place][pair.row][:width].log_softmax(-1)
        assert torch.allclose(pair.log_probs[0, :width].log_softmax(-1), seen, atol=1e-4)
        p, q = pair.log_probs[:, pair.log_probs[0].isfinite()]
        assert shift.first == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-5)
        assert pair.log_probs.exp().sum(-1) == pytest.approx([1, 1], abs=1e-5)


@pytest.mark.parametrize("family", tiny.UNLIKE)
def test_matches_a_manual_forward(family):
    """A text prompt with its two memories inserted by hand, the first one replaced by a longer one."""
    model = tiny.equip(family)
    batch = tiny.prompts(model.processor, [tiny.message("A red cup and a blue book.")])
    out = written(model, batch, Forced([(0, 3, "long"), (0, 6, "long")]))
    (rollout,) = out.rollout
    other = rollout.invocations[0].memory.repeat(2, 1).flip(0) * 1.5

    def logits(first):
        ids, start = out.sequences[0], batch["input_ids"].shape[1]
        embeds, parts, last = model.tokens.embed(ids), [], 0
        for memory, invocation in zip([first, rollout.invocations[1].memory], rollout.invocations, strict=True):
            end = start + invocation.position + 1
            parts += [embeds[last:end], memory]
            last = end
        together = torch.cat([*parts, embeds[last:]])[None]
        hidden = model.base.model(inputs_embeds=together).last_hidden_state[0, -(len(ids) - start) :]
        return model.tokens.extend(model.backbone.head(hidden), hidden)

    with torch.no_grad():
        own, changed = logits(rollout.invocations[0].memory), logits(other)
    # States count back from the end, where only the second memory's slots lie between: after it they are in line.
    second = rollout.invocations[1].position
    later = [t for t in range(second + 2, len(rollout.tokens)) if rollout.sampled[t]]
    mask = model.tokens.ids
    own[:, mask], changed[:, mask] = float("-inf"), float("-inf")
    p, q = own.log_softmax(-1), changed.log_softmax(-1)
    by_hand = (p.exp() * (p - q)).nan_to_num(0).sum(-1)
    shifts = next_token_kl(
        model, batch, out.rollout, lambda row, index, invocation: other if index == 0 else invocation.memory
    )
    first = rollout.invocations[0].position
    between = [t for t in range(first + 3, second) if rollout.sampled[t]]
    assert shifts[1].first == pytest.approx(0, abs=1e-5)
    assert shifts[0].tokens == len(later) + len(between)
    found = next_token_kl(
        model, batch, [cut(rollout, later)], lambda row, index, invocation: other if not index else None
    )
    assert found[0].tokens == len(later)
    assert found[0].rest == pytest.approx(float(by_hand[[t - 1 for t in later]].mean()), rel=1e-3, abs=1e-5)


def cut(rollout, kept):
    """The rollout with only some of its tokens counted as sampled."""
    sampled = torch.zeros_like(rollout.sampled)
    sampled[kept] = True
    return type(rollout)(rollout.tokens, sampled, rollout.allowed, rollout.log_probs, rollout.invocations)


def test_an_answer_that_ends_with_its_memory_has_no_later_tokens():
    model = tiny.equip("idefics3")
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch, Forced([(0, 3, "long")]), max_new_tokens=4)
    (shift,) = next_token_kl(model, batch, out.rollout, lambda *_: None)
    assert shift.tokens == 0 and shift.rest != shift.rest and shift.first > 0


def test_rollouts_of_one_prompt_are_independent_and_mismatches_raise():
    model = tiny.equip("idefics3")
    batch = tiny.prompts(model.processor, [tiny.message("look again!", tiny.picture(0))])
    twice = written(model, batch, Forced([(0, 2, "short"), (1, 4, "long")]), num_return_sequences=2)
    once = [next_token_kl(model, batch, [rollout], lambda *_: None)[0] for rollout in twice.rollout]
    both = next_token_kl(model, batch, twice.rollout, lambda *_: None)
    assert [shift.first for shift in both] == pytest.approx([shift.first for shift in once], abs=1e-5)
    with pytest.raises(ValueError, match=r"\[N, 48\]"):
        next_token_kl(model, batch, twice.rollout, lambda row, index, invocation: invocation.memory[:, :4])
    with pytest.raises(ValueError, match="same number for each prompt"):
        next_token_kl(model, tiny.mixed_batch(model.processor), twice.rollout, lambda *_: None)
    for rollout in twice.rollout:
        rollout.invocations[0].memory = None
    with pytest.raises(ValueError, match="has no memory"):
        next_token_kl(model, batch, twice.rollout, lambda *_: None)
