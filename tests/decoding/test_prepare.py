"""Generation settings from keywords, configs and the base's defaults, and what penalties leave alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from decoding_runs import tempting
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.generation import logits_process

from vismem import Request, RequestQueue
from vismem.decoding import cache, processors
from vismem.decoding.policies import Forced
from vismem.training.rollout import sampling, write

WAYS = ["keyword", "config", "base", "base and config", "base and queue"]
# Two different families are asked in every way, the others each in two of them.
ASKED = [
    (family, way)
    for turn, family in enumerate(tiny.FAMILIES)
    for number, way in enumerate(WAYS)
    if family in tiny.UNLIKE or (number - turn) % len(WAYS) < 2
]
LOOKS = Forced([(0, 0, "short"), (0, 3, "long"), (1, 2, "short"), (2, 1, "long"), (2, 4, "short")])


@pytest.fixture
def laid_out(monkeypatch) -> list:
    """A list of all `Slots` made since."""
    made, init = [], cache.Slots.__init__
    monkeypatch.setattr(cache.Slots, "__init__", lambda self, *a, **k: (made.append(self), init(self, *a, **k))[1])
    return made


@pytest.mark.parametrize(("family", "way"), ASKED)
def test_a_static_cache_is_used_however_it_is_asked_for(family, way, laid_out):
    model = tempting(family)
    batch, more = tiny.mixed_batch(model.processor), {"max_new_tokens": 8}
    expected = model.generate(**batch, **more)
    if way.startswith("base"):
        model.base.generation_config.cache_implementation = "static"
    if way == "base and queue":
        answers = list(model.stream_batch([Request(batch)], **more))
        for answer in answers:
            assert answer.tokens == expected[answer.index, batch["input_ids"].shape[1] :].tolist()[: len(answer.tokens)]
    else:
        if way == "keyword":
            more["cache_implementation"] = "static"
        elif way != "base":
            given = {} if way == "base and config" else {"cache_implementation": "static"}
            more = {"generation_config": GenerationConfig(**more, **given)}
        assert torch.equal(model.generate(**batch, **more), expected)
        if "generation_config" in more:
            assert more["generation_config"].cache_implementation == (None if way == "base and config" else "static")
    assert len(laid_out) == 1


@pytest.fixture
def model():
    return tempting("qwen2_5_vl")


def test_a_keyword_counts_more_than_a_default(model, laid_out):
    batch = tiny.mixed_batch(model.processor)
    model.base.generation_config.cache_implementation = "static"
    model.generate(**batch, max_new_tokens=2, cache_implementation="dynamic")
    model.base.generation_config.cache_implementation = "hybrid"  # an old default, which transformers drops
    model.generate(**batch, max_new_tokens=2)
    assert not laid_out
    model.generate(**batch, max_new_tokens=2, cache_implementation="sliding_window")
    assert len(laid_out) == 1


@pytest.mark.parametrize("name", ["quantized", "offloaded_static", "paged", "offloaded"])
def test_caches_that_cannot_be_had_are_refused_by_name(model, name):
    batch = tiny.mixed_batch(model.processor)
    for given in ({"cache_implementation": name}, {"generation_config": GenerationConfig(cache_implementation=name)}):
        with pytest.raises(ValueError, match=f"cache_implementation='{name}'"):
            model.generate(**batch, **given)
        with pytest.raises(ValueError, match=f"request 0: .*cache_implementation='{name}'"):
            list(model.stream_batch([Request(batch, generation=given)], max_new_tokens=2))
    model.base.generation_config.cache_implementation = name
    with pytest.raises(ValueError, match=f"cache_implementation='{name}'"):
        RequestQueue(model, max_new_tokens=2)
    with pytest.raises(ValueError, match=f"cache_implementation='{name}'"):
        model.generate(**batch)
    assert model.generate(**batch, cache_implementation="static", max_new_tokens=2).shape[0] == 3


def test_a_cache_object_other_than_a_dynamic_one_is_refused_by_name(model):
    batch = tiny.mixed_batch(model.processor)
    static = StaticCache(config=model.base.config.get_text_config(), max_cache_len=400)
    for invocation in ("learned", "off"):
        with pytest.raises(ValueError, match=r"past_key_values cannot be a StaticCache: .* cache_implementation$"):
            model.generate(**batch, max_new_tokens=2, past_key_values=static, invocation=invocation)
    expected = model.generate(**batch, max_new_tokens=6)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, past_key_values=DynamicCache()), expected)


DEFAULTS = [
    ({"num_beams": 2}, "set num_beams=1"),
    ({"prompt_lookup_num_tokens": 3}, "unset prompt_lookup_num_tokens"),
    ({"penalty_alpha": 0.5, "top_k": 4}, "unset penalty_alpha"),
    ({"output_attentions": True}, "output_attentions"),
    ({"output_hidden_states": True}, "output_hidden_states"),
    ({"guidance_scale": 1.5}, "guidance_scale=1.5 is not supported"),
    ({"token_healing": True}, "token_healing is not supported"),
]


@pytest.mark.parametrize(("defaults", "message"), DEFAULTS)
def test_defaults_of_the_base_that_cannot_be_honoured_are_refused_by_name(model, defaults, message):
    batch = tiny.mixed_batch(model.processor)
    for name, value in defaults.items():
        setattr(model.base.generation_config, name, value)
    with pytest.raises(ValueError, match=message):
        model.generate(**batch, max_new_tokens=3)
    plain = sampling(model, 3, 1.0)
    assert len(write(model, batch, "learned", plain, seeds=[1, 2, 3])) == 3  # training has its own settings


@pytest.mark.parametrize(
    "defaults",
    [
        {"min_length": 90},
        {"min_new_tokens": 6, "eos_token_id": list(range(20, 120))},
        {"bad_words_ids": [[3], [4, 5]]},
        {"suppress_tokens": [3, 4]},
        {"forced_eos_token_id": 7},
        {"stop_strings": ["a"]},
        {"do_sample": True, "top_k": 5},
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"return_dict_in_generate": True},
        {"use_cache": False},
    ],
)
def test_defaults_of_the_base_are_those_of_memory_off(model, defaults):
    batch = tiny.mixed_batch(model.processor)
    for name, value in defaults.items():
        setattr(model.base.generation_config, name, value)
    more = {"tokenizer": model.processor.tokenizer} if "stop_strings" in defaults else {}
    torch.manual_seed(1)
    expected = model.base.generate(**batch, max_new_tokens=8, **more)
    torch.manual_seed(1)
    found = model.generate(**batch, max_new_tokens=8, invocation="off")
    if "return_dict_in_generate" in defaults:
        expected, found = expected.sequences, found.sequences
    assert torch.equal(found, expected)


def test_rollouts_are_sampled_without_the_bases_defaults(model):
    batch, plain = tiny.mixed_batch(model.processor), sampling(model, 8, 1.0)
    expected = write(model, batch, "learned", plain, seeds=[1, 2, 3])
    for name, value in {"min_p": 0.5, "suppress_tokens": [*range(100)], "sequence_bias": [[[200], 9.0]]}.items():
        setattr(model.base.generation_config, name, value)
    defaults = model.base.generation_config
    found = write(model, batch, "learned", plain, seeds=[1, 2, 3])
    assert model.base.generation_config is defaults
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.tokens, other.tokens) and torch.equal(one.log_probs, other.log_probs)


# Penalties.

PENALTIES = [
    {"repetition_penalty": 1.5},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 1.5},
    {"encoder_no_repeat_ngram_size": 1},
    {"bad_words_ids": [[3], [4, 5]]},
    {"sequence_bias": {(3,): 2.0, (4, 5): -3.0}},
    {"min_new_tokens": 9},
]


@pytest.fixture(scope="module")
def compiled_once():
    """A model that nothing changes, so that its compiled slots serve every penalty."""
    return tempting("qwen2_5_vl")


@pytest.mark.parametrize("penalty", PENALTIES, ids=lambda p: next(iter(p)))
@pytest.mark.parametrize("layout", [{}, {"cache_implementation": "static"}, {"compile_config": True}])
def test_penalties_leave_the_four_tokens_alone(compiled_once, penalty, layout):
    """Scores of the four tokens are the logits that they came from, also after the tokens were used."""
    model = compiled_once
    if "compile_config" in layout:
        layout = {"cache_implementation": "static", "compile_config": CompileConfig(backend="eager", mode=None)}
    batch = tiny.mixed_batch(model.processor)
    settings = {"max_new_tokens": 12, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    out = model.generate(**batch, **settings, **layout, **penalty, eos_token_id=5)
    start, kinds = batch["input_ids"].shape[1], list(model.tokens.invocation_ids.values())
    after = changed = 0
    for row in range(3):
        used = [i.position for i in out.invocations[row]]
        for place, (scores, logits) in enumerate(zip(out.scores, out.logits, strict=True)):
            token = int(out.sequences[row, start + place])
            if token in model.tokens.end_ids.values() or not scores[row, token].isfinite() or scores[row].max() == 0:
                continue
            seen = scores[row, kinds]
            assert torch.equal(seen[seen.isfinite()], logits[row, kinds][seen.isfinite()])
            after += any(position < place for position in used) and bool(seen.isfinite().any())
            changed += not torch.equal(scores[row, :300], logits[row, :300])
    assert after > 3 and changed > 3


def test_penalties_in_a_queue_are_those_of_generate(model):
    batch = tiny.prompts(model.processor, [tiny.message("look again!", tiny.picture(1))])
    settings = {"max_new_tokens": 16, "repetition_penalty": 1.5, "eos_token_id": None}
    expected = model.generate(**batch, **settings, return_dict_in_generate=True)
    (answer,) = model.stream_batch([Request(batch)], **settings)
    assert answer.tokens == expected.sequences[0, batch["input_ids"].shape[1] :].tolist()
    assert len(answer.invocations) > 2


def test_the_model_invokes_as_often_with_a_penalty(model):
    """Even an extreme penalty stops no later look."""
    batch = tiny.mixed_batch(model.processor)
    free = model.generate(**batch, max_new_tokens=20, repetition_penalty=1e4, return_dict_in_generate=True)
    assert all(len(row) > 2 for row in free.invocations)


def test_words_before_and_after_a_memory_are_neighbours(model):
    ids, (look, end) = model.tokens.ids, (model.tokens.invocation_ids["long"], model.tokens.end_ids["long"])
    spared = processors.WordsOnly(logits_process.NoRepeatNGramLogitsProcessor(2), ids)
    scores = torch.zeros(1, model.tokens.vocabulary)
    found = spared(torch.tensor([[7, look, end, 8, 9, look, end, 7]]), scores)
    assert found.isinf().nonzero()[:, 1].tolist() == [8]
    found = spared(torch.tensor([[9, look, end, 8, 7, look, end]]), scores)  # after a memory any word may come
    assert not found.isinf().any()


@pytest.mark.parametrize("processor", [logits_process.SuppressTokensLogitsProcessor, None])
def test_a_bias_that_names_an_invocation_token_is_kept(model, processor):
    batch = tiny.mixed_batch(model.processor)
    looks = list(model.tokens.invocation_ids.values())
    more = {"suppress_tokens": looks} if processor else {"sequence_bias": {(look,): -1e4 for look in looks}}
    assert model.generate(**batch, max_new_tokens=8, return_dict_in_generate=True).invocations != [[], [], []]
    out = model.generate(**batch, max_new_tokens=8, return_dict_in_generate=True, **more)
    assert out.invocations == [[], [], []]
