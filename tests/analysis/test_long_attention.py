"""What long-term memory attended to: the right tokens, weights as computed by hand, and the memory unchanged."""

from __future__ import annotations

import pytest
import tiny
import torch

from vismem.analysis.long_attention import long_term_attention
from vismem.decoding.policies import Forced
from vismem.reading.attention import attention_weights

EVERY_FAMILY = True
WRITING = {"return_dict_in_generate": True, "record": True, "eos_token_id": None, "max_new_tokens": 10}
SCHEDULE = Forced([(0, 1, "long"), (0, 3, "short"), (0, 7, "long"), (1, 9, "long"), (2, 4, "short")])


def written(model, batch, schedule=SCHEDULE, **more):
    return model.generate(**batch, invocation=schedule, **{"do_sample": False, **WRITING, **more})


def test_weights_sum_to_one_and_memories_are_unchanged(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    found = long_term_attention(model, batch, out.rollout)
    assert [(reading.row, reading.index) for reading in found] == [(0, 0), (0, 2), (1, 0)]
    layers = len(model.backbone.language_model.layers)
    for reading in found:
        rollout = out.rollout[reading.row]
        invocation, ids = rollout.invocations[reading.index], rollout.tokens.tolist()
        assert torch.allclose(reading.memory, invocation.memory, atol=1e-5)
        # The segment: from the last end token to the invocation's own.
        before = [i for i in range(invocation.position) if ids[i] in model.tokens.end_ids.values()]
        start = before[-1] + 1 if before else 0
        assert reading.tokens == ids[start : invocation.position + 1]
        assert reading.tokens[-1] == model.tokens.invocation_ids["long"]
        assert len(reading.tokens) == len(invocation.states)
        assert reading.weights.shape == (layers, 4, len(reading.tokens)) and reading.weights.dtype == torch.float32
        assert reading.weights.min() >= 0 and (reading.weights.amax(0) > 0).all()  # a layer's window may be short
        shares = reading.shares()
        assert set(shares) == {"segment", "query", "memory"}
        assert all(share.shape == (layers, 4) and share.min() > 0 for share in shares.values())
        assert torch.allclose(sum(shares.values()), torch.ones(layers, 4), atol=1e-5)
        # Means are means of their parts.
        assert torch.allclose(reading.mean(), reading.weights.mean((0, 1)))
        assert torch.allclose(reading.mean(0, 2), reading.weights[0, 2])
        assert torch.allclose(reading.mean(vector=1), reading.weights[:, 1].mean(0))
    assert [len(reading.tokens) for reading in found] == [2, 5, 10]


def test_matches_the_language_models_own_weights(family):
    """Segment, query and memory concatenated by hand and read by the language model with the adapter on."""
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    former, language = model.memory.long, model.backbone.language_model
    visual = model.backbone.prompt_visual_states(batch["input_ids"], batch)
    for reading in long_term_attention(model, batch, out.rollout):
        states = out.rollout[reading.row].invocations[reading.index].states
        with torch.no_grad():
            query = model.memory.builder([visual[reading.row]], [states])[0]
            segment = model.tokens.embed(torch.tensor(reading.tokens))
            together = torch.cat([segment, query, former.memory_init + former.table_mean])[None]
            language.config._attn_implementation = "eager"
            with former.adapter.on():
                weights = language(inputs_embeds=together, output_attentions=True, use_cache=False).attentions
            language.config._attn_implementation = "sdpa"
        weights = torch.stack([layer[0].mean(0) for layer in weights])[:, -4:]  # [layers, N, z + K + N]
        z = len(reading.tokens)
        assert torch.allclose(reading.weights, weights[..., :z], atol=1e-5)
        assert torch.allclose(reading.rest["query"], weights[..., z : z + 4].sum(-1), atol=1e-5)
        assert torch.allclose(reading.rest["memory"], weights[..., z + 4 :].sum(-1), atol=1e-5)


def test_recording_changes_nothing(family):
    """The former's output is unchanged, and attention is restored afterwards, after an error too."""
    model = tiny.equip(family)
    former, language = model.memory.long, model.backbone.language_model
    layers = []

    def receive(layer, weights):
        assert layer == len(layers)
        layers.append(weights[:, :, -4:].mean(1))

    torch.manual_seed(0)
    query = torch.randn(2, 4, model.backbone.hidden_size)
    segments = [torch.randn(3, model.backbone.hidden_size), torch.randn(6, model.backbone.hidden_size)]
    with torch.no_grad():
        before = former(query, segments)
        with attention_weights(model.backbone, receive):
            inside = former(query, segments)
        assert torch.allclose(inside, before, atol=1e-5)
        assert len(layers) == len(language.layers) and all(w.shape == (2, 4, 14) for w in layers)
        assert all(torch.allclose(w.sum(-1), torch.ones(2, 4), atol=1e-5) for w in layers)
        assert not any(w[0, :, :3].any() for w in layers)  # padding of the shorter segment
        with pytest.raises(RuntimeError), attention_weights(model.backbone, receive):
            raise RuntimeError("on purpose")
        assert language.config._attn_implementation == "sdpa"
        assert not any(layer.self_attn._forward_hooks for layer in language.layers)
        assert torch.equal(former(query, segments), before)
        assert len(layers) == len(language.layers)


def test_copies_of_a_prompt_and_text_prompts_are_analysed():
    model = tiny.equip("idefics3")
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch, Forced([(0, 1, "long"), (3, 2, "long"), (5, 4, "long")]), num_return_sequences=2)
    found = long_term_attention(model, batch, out.rollout)
    assert [(reading.row, reading.index, len(reading.tokens)) for reading in found] == [(0, 0, 2), (3, 0, 3), (5, 0, 5)]
    for reading in found:
        assert torch.allclose(reading.memory, out.invocations[reading.row][0].memory, atol=1e-5)
    batch = tiny.prompts(model.processor, [tiny.message("A red cup and a blue book.")])
    out = written(model, batch, Forced([(0, 0, "long")]))  # before the first word
    (reading,) = long_term_attention(model, batch, out.rollout)
    assert reading.tokens == [model.tokens.invocation_ids["long"]]
    assert torch.allclose(reading.memory, out.invocations[0][0].memory, atol=1e-5)


def test_an_invocation_without_memory_still_ends_a_segment():
    model = tiny.equip("qwen2_5_vl")
    batch = tiny.prompts(model.processor, [tiny.message("look again!", tiny.picture(0))])
    schedule = Forced([(0, 2, "short"), (0, 5, "long")])
    schedule.forms = ("long",)
    out = written(model, batch, schedule)
    assert [invocation.length for invocation in out.invocations[0]] == [0, 4]
    (reading,) = long_term_attention(model, batch, out.rollout)
    assert reading.index == 1 and len(reading.tokens) == 4
    assert torch.allclose(reading.memory, out.invocations[0][1].memory, atol=1e-5)
    schedule.forms = ("short",)
    assert long_term_attention(model, batch, written(model, batch, schedule).rollout) == []


def test_the_pocket_models_weights_sum_to_one():
    from vismem.loading import load_model

    model = load_model().model
    batch = tiny.prompts(model.processor, [tiny.message("What does row 1 cost?", tiny.picture(0, (64, 64)))])
    out = written(model, batch, Forced([(0, 3, "long"), (0, 8, "long")]))
    first, second = long_term_attention(model, batch, out.rollout)
    for reading, length in ((first, 4), (second, 6)):
        assert reading.weights.shape == (5, 16, length)
        assert torch.allclose(sum(reading.shares().values()), torch.ones(5, 16), atol=1e-5)
        assert torch.allclose(reading.memory, out.invocations[0][reading.index].memory, atol=1e-4)


def test_mismatched_inputs_raise():
    model = tiny.equip("idefics3")
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    with pytest.raises(ValueError, match="2 rollouts for 3 prompts"):
        long_term_attention(model, batch, out.rollout[:2])
    for invocation in out.rollout[0].invocations:
        invocation.states = None
    with pytest.raises(ValueError, match="record=True"):
        long_term_attention(model, batch, out.rollout)
    assert long_term_attention(model, batch, written(model, batch, Forced([(0, 1, "short")])).rollout) == []
    with pytest.raises(ValueError, match="content='soft'"):
        long_term_attention(tiny.equip("idefics3", content="soft"), batch, out.rollout)
