"""What answers attend to, against manual forwards, with windows, masked slots and shared prompts; nothing changes."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from vismem.analysis.slot_attention import GROUPS, attention_to_slots
from vismem.decoding.policies import Forced
from vismem.reading.attention import attention_weights
from vismem.reading.splice import Splice, find_invocations
from vismem.training.replay import collate

EVERY_FAMILY = True
SCHEDULE = Forced([(0, 2, "short"), (0, 7, "long"), (1, 5, "long"), (2, 3, "short")])
WRITING = {"return_dict_in_generate": True, "record": True, "eos_token_id": None, "max_new_tokens": 12}


def written(model, batch, schedule=SCHEDULE, **more):
    return model.generate(**batch, invocation=schedule, **{"do_sample": False, **WRITING, **more})


def spliced(model, batch, rollouts) -> Splice:
    call = collate(batch, rollouts, 0, 1.0, formed=True)
    ids, start = call["input_ids"], call["prompt_length"]
    places = find_invocations(ids, [start] * len(ids), model.tokens.invocation_ids, model.tokens.end_ids)
    return Splice(places, call["memories"], ids.shape[1])


def test_rows_sum_to_one_and_are_causal(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    for row, found in enumerate(attention_to_slots(model, batch, out.rollout)):
        rollout = out.rollout[row]
        layers, tokens = len(model.backbone.language_model.layers), len(rollout.tokens)
        assert found.row == row and found.kinds == [i.kind for i in rollout.invocations]
        assert set(found.shares) == set(GROUPS)
        assert all(s.shape == (layers, tokens) and s.dtype == torch.float32 for s in found.shares.values())
        assert torch.allclose(sum(found.shares.values()), torch.ones(layers, tokens), atol=1e-5)
        assert all((found.shares[name] > 0).any() for name in GROUPS)
        everything = torch.cat(found.slots, dim=-1).sum(-1)
        assert torch.allclose(everything, found.shares["memory"], atol=1e-5)
        for index, (slots, invocation) in enumerate(zip(found.slots, rollout.invocations, strict=True)):
            assert slots.shape == (layers, tokens, 4)
            assert not slots[:, : invocation.position + 1].any()
            assert (slots[:, invocation.position + 1] > 0).all()  # the end token stands right after them
            assert torch.equal(found.after(index), slots[:, invocation.position + 1 :])


def test_until_next_ends_at_the_next_memory_of_its_kind():
    model = tiny.equip("idefics3")
    batch = tiny.prompts(model.processor, [tiny.message("look again!", tiny.picture(0))])
    out = written(model, batch, Forced([(0, 2, "short"), (0, 4, "long"), (0, 7, "short")]))  # tokens 2, 6 and 11
    (found,) = attention_to_slots(model, batch, out.rollout)
    assert found.positions == [2, 6, 11]
    assert torch.equal(found.until_next(0), found.slots[0][:, 3:11])
    assert torch.equal(found.until_next(1), found.after(1)) and torch.equal(found.until_next(2), found.after(2))


def test_eager_attention_changes_nothing_and_is_undone(family):
    """Eager attention gives the states that decoding and training give, and is undone, after an error too."""
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    call = collate(batch, out.rollout, 0, 1.0, formed=True)
    call = {name: value for name, value in call.items() if name not in ("sampled", "allowed", "temperature")}
    with torch.no_grad():
        before = model(**call).last_hidden_state
        assert model.backbone.language_model.config._attn_implementation == "sdpa"
        with attention_weights(model.backbone, lambda *_: None):
            assert model.backbone.language_model.config._attn_implementation == "eager"
            inside = model(**call).last_hidden_state
        real = call["attention_mask"].bool()
        assert torch.allclose(inside[real], before[real], atol=1e-4)
        with pytest.raises(RuntimeError), attention_weights(model.backbone, lambda *_: None):
            raise RuntimeError("on purpose")
        assert model.backbone.language_model.config._attn_implementation == "sdpa"
        assert torch.equal(model(**call).last_hidden_state, before)
    attention_to_slots(model, batch, out.rollout)
    assert model.backbone.language_model.config._attn_implementation == "sdpa"
    assert not any(layer.self_attn._forward_hooks for layer in model.backbone.language_model.layers)


def test_matches_the_bases_own_weights(family):
    """A text prompt and its memories concatenated by hand, read in one forward of the base's language model."""
    model = tiny.equip(family)
    batch = tiny.prompts(model.processor, [tiny.message("A red cup and a blue book.")])
    out = written(model, batch, Forced([(0, 3, "long"), (0, 6, "long")]))
    (rollout,), start = out.rollout, batch["input_ids"].shape[1]
    embeds, parts, last, slots = model.tokens.embed(out.sequences[0]), [], 0, []
    for invocation in rollout.invocations:
        end = start + invocation.position + 1
        parts += [embeds[last:end], invocation.memory]
        slots.append(sum(map(len, parts)) - 4)
        last = end
    together = torch.cat([*parts, embeds[last:]])[None]
    language = model.backbone.language_model
    language.config._attn_implementation = "eager"
    with torch.no_grad():
        weights = language(inputs_embeds=together, output_attentions=True).attentions
    weights = torch.stack([layer[0].mean(0) for layer in weights])  # [layers, E, E]
    (found,) = attention_to_slots(model, batch, out.rollout)
    assert language.config._attn_implementation == "eager"  # as it was
    memory = [place for first in slots for place in range(first, first + 4)]
    tokens = [place for place in range(start, together.shape[1]) if place not in memory]
    for first, mine in zip(slots, found.slots, strict=True):
        assert torch.allclose(mine, weights[:, tokens][..., first : first + 4], atol=1e-5)
    assert torch.allclose(found.shares["prompt"], weights[:, tokens, :start].sum(-1), atol=1e-5)
    assert torch.allclose(found.shares["answer"], weights[:, tokens][..., tokens].sum(-1), atol=1e-5)
    assert not found.shares["visual"].any()


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "llavaonevision1_5"])
def test_visual_tokens_match_the_bases_own_weights(family):
    """Without memory: the share of the picture is what the base's own attention gives to its tokens."""
    model = tiny.equip(family)
    batch = tiny.prompts(model.processor, [tiny.message("look again!", tiny.picture(0))])
    marks = model.processor.tokenizer.all_special_ids  # one that was written would be taken for a picture here
    out = written(model, batch, "off", suppress_tokens=marks)
    (found,), start = attention_to_slots(model, batch, out.rollout), batch["input_ids"].shape[1]
    assert found.slots == [] and not found.shares["memory"].any()
    new = out.sequences.shape[1] - start
    more = {n: nn.functional.pad(v, (0, new)) for n, v in batch.items() if n.endswith("token_type_ids")}
    model.backbone.language_model.config._attn_implementation = "eager"
    with torch.no_grad():
        inputs = {**batch, **more, "input_ids": out.sequences, "attention_mask": torch.ones_like(out.sequences)}
        weights = model.base(**inputs, output_attentions=True).attentions
    weights = torch.stack([layer[0].mean(0) for layer in weights])[:, start:]
    seen = out.sequences[0] == model.backbone.image_token_id
    assert torch.allclose(found.shares["visual"], weights[..., seen].sum(-1), atol=1e-5)
    assert found.shares["visual"].max() > 0.01


@pytest.mark.parametrize("family", ["idefics3", "gemma3"])
def test_windowed_layers_attend_within_their_window(family):
    model = tiny.equip(family, base={"sliding_window": 12})
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch, max_new_tokens=24)
    splice, start = spliced(model, batch, out.rollout), batch["input_ids"].shape[1]
    beyond = within = 0
    windowed = [0] if family == "gemma3" else [0, 1]
    for row, found in enumerate(attention_to_slots(model, batch, out.rollout)):
        slots = splice.slot[row].nonzero().flatten()
        kept = splice.kept[row, start : start + len(out.rollout[row].tokens)]
        distance = kept[:, None] - slots[None]  # [tokens, slots]
        weights = torch.cat(found.slots, dim=-1)
        assert torch.allclose(sum(found.shares.values()), torch.ones(weights.shape[:2]), atol=1e-5)
        for layer in range(len(weights)):
            far = (distance >= 12) if layer in windowed else torch.zeros_like(distance).bool()
            assert not weights[layer][far].any()
            assert (weights[layer][~far & (distance > 0)] > 0).all()
            beyond, within = beyond + int(far.sum()), within + int((~far & (distance > 0)).sum())
    assert beyond > 20 and within > 20


def test_a_masked_slot_gets_nothing(family, monkeypatch):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    mask = Splice.mask

    def masked(self, attention_mask):
        found = mask(self, attention_mask)
        found[0, self.slot[0].nonzero()[1]] = 0  # the second slot of the first memory
        return found

    monkeypatch.setattr(Splice, "mask", masked)
    found = attention_to_slots(model, batch, out.rollout)
    assert not found[0].slots[0][..., 1].any()
    assert (found[0].after(0)[..., [0, 2, 3]] > 0).any() and (found[2].after(0)[:, 0] > 0).all()
    assert torch.allclose(sum(found[0].shares.values()), torch.ones(found[0].shares["memory"].shape), atol=1e-5)


@pytest.mark.parametrize("base", [{}, {"sliding_window": 12}], ids=["full", "sliding"])
def test_rows_do_not_depend_on_their_neighbours_or_on_sharing_a_prompt(base):
    model = tiny.equip("idefics3", base=base)
    conversations = [tiny.message("look again!", tiny.picture(0)), tiny.message("A red cup?", tiny.picture(1))]
    batch = tiny.prompts(model.processor, conversations)
    schedule = Forced([(0, 2, "short"), (1, 9, "long"), (2, 4, "long"), (3, 6, "short"), (3, 8, "long")])
    out = written(model, batch, schedule, num_return_sequences=2)
    together = attention_to_slots(model, batch, out.rollout)
    for row, shared in enumerate(together):
        single = tiny.prompts(model.processor, conversations[row // 2 : row // 2 + 1])
        (alone,) = attention_to_slots(model, single, [out.rollout[row]])
        assert len(alone.slots) == len(shared.slots) == (2 if row == 3 else 1)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(alone.slots, shared.slots, strict=True))
        assert all(torch.allclose(alone.shares[name], shared.shares[name], atol=1e-5) for name in GROUPS)


def test_layers_without_weights_raise():
    model = tiny.equip("idefics3")
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    with pytest.raises(ValueError, match="same number for each prompt"):
        attention_to_slots(model, batch, out.rollout[:2])
    layer = model.backbone.language_model.layers[1]
    layer.self_attn.forward, forward = lambda **kwargs: (kwargs["hidden_states"], None), layer.self_attn.forward
    with pytest.raises(ValueError, match=r"layer 1 .* no attention weights"):
        attention_to_slots(model, batch, out.rollout)
    layer.self_attn.forward = forward
    layer.linear_attn = layer.self_attn
    del layer.self_attn
    with pytest.raises(ValueError, match=r"idefics3 has layers without attention .*DecoderLayer"):
        attention_to_slots(model, batch, out.rollout)
