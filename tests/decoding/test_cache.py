"""Slots, the preallocated cache: rows leave and enter, the host runs ahead, the step is compiled."""

from __future__ import annotations

import pytest
import tiny
import torch
from decoding_runs import readings, tempting
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import EtaLogitsWarper, TemperatureLogitsWarper

import vismem
from vismem.decoding import cache
from vismem.decoding.policies import Forced, Random, policy_of
from vismem.decoding.row import DecodingSettings

EVERY_FAMILY = True
SCHEDULE = Forced([(0, 0, "short"), (0, 7, "long"), (1, 3, "long"), (1, 3, "short"), (1, 9, "short"), (2, 5, "short")])
POLICIES = {"forced": SCHEDULE, "off": "off", "learned": "learned", "random": Random(0.3, "anywhere", seed=1)}


def same(found: vismem.VisMemOutput, expected: vismem.VisMemOutput) -> None:
    """Tokens and invocations are equal, memories and log-probabilities to 1e-4."""
    assert torch.equal(found.sequences, expected.sequences)
    assert found.invocations == expected.invocations
    for ours, theirs in zip(found.rollout, expected.rollout, strict=True):
        assert torch.equal(ours.sampled, theirs.sampled) and torch.equal(ours.allowed, theirs.allowed)
        assert torch.allclose(ours.log_probs, theirs.log_probs, atol=1e-4)
        for one, other in zip(ours.invocations, theirs.invocations, strict=True):
            if other.memory is not None:
                assert torch.allclose(one.memory, other.memory, atol=1e-4)
                assert torch.allclose(one.states, other.states, atol=1e-4)


def written(model, batch, policy, **more) -> vismem.VisMemOutput:
    """Answers of rows with their own seeds, and everything recorded of them."""
    settings = {"max_new_tokens": 16, "return_dict_in_generate": True, "record": True, "invocation": policy}
    settings |= {"do_sample": True, "temperature": 0.9, "top_k": 30, "seed": [1, 2, 3]}
    return model.generate(**batch, **settings | more)


def both(model, batch, policy, **more) -> tuple[vismem.VisMemOutput, vismem.VisMemOutput]:
    """The same call with slots and with a dynamic cache."""
    slots = written(model, batch, policy, cache_implementation="static", **more)
    return slots, written(model, batch, policy, **{name: more[name] for name in more if name != "compile_config"})


def test_slots_write_what_the_dynamic_cache_writes(family, monkeypatch):
    """Rows of different lengths end at different times, and write the same whatever is beside them.

    One model for all, since it keeps its compiled slots, and compiling takes most of the time. Two different families
    take every policy, the others two each. Uncompiled, the host runs ahead for every other policy.
    """
    model = tempting(family, pull=12)
    batch = tiny.mixed_batch(model.processor)
    compiled = {"compile_config": CompileConfig(backend="eager", mode=None)}
    turn = list(tiny.FAMILIES).index(family)
    policies = list(POLICIES.values())
    for number, policy in enumerate(policies if family in tiny.UNLIKE else policies[turn % 2 :: 2], turn // 2):
        expected = written(model, batch, policy)
        assert policy == "off" or sum(map(len, expected.invocations)) > 3
        for ahead, more in ((("cpu",) * (number % 2), {}), (("cpu",), compiled)):
            monkeypatch.setattr(cache, "AHEAD", ahead)
            same(written(model, batch, policy, cache_implementation="static", **more), expected)


@pytest.mark.parametrize("mode", ["plain", "ahead"])
def test_slots_with_a_sliding_window_write_the_same(mode, monkeypatch):
    if mode == "ahead":
        monkeypatch.setattr(cache, "AHEAD", {"cpu"})
    model = tempting("idefics3", base={"sliding_window": 12})
    same(*both(model, tiny.mixed_batch(model.processor), SCHEDULE, max_new_tokens=40))


def test_slots_with_eager_attention_write_the_same():
    model = tempting("qwen2_5_vl")
    model.base.set_attn_implementation("eager")
    same(*both(model, tiny.mixed_batch(model.processor), "learned"))


def test_slots_refuse_an_attention_that_cannot_read_them():
    model = tempting("qwen2_5_vl")
    model.base.config.get_text_config()._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'static' needs attn_implementation 'sdpa' or 'eager'"):
        both(model, tiny.mixed_batch(model.processor), "off")


def test_slots_refuse_layers_that_they_cannot_hold():
    config = tempting("qwen2_5_vl").base.config.get_text_config()
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ValueError, match="layers of type 'chunked_attention'"):
        cache.Slots(config, rows=1, columns=8, device=torch.device("cpu"))


def test_slots_grow_where_they_do_not_suffice(monkeypatch):
    monkeypatch.setattr(cache, "BLOCK", 4)
    model = tempting("qwen2_5_vl", max_invocations=2)  # forced invocations are not counted out
    schedule = Forced([(row, step, "long") for row in range(3) for step in range(0, 30, 2)])
    grown = []
    reserve = cache.Slots.reserve
    monkeypatch.setattr(
        cache.Slots,
        "reserve",
        lambda self, columns: (grown.append(columns > self.columns), reserve(self, columns))[1],
    )
    same(*both(model, tiny.mixed_batch(model.processor), schedule))
    assert any(grown)


def test_finished_rows_leave_the_batch(monkeypatch):
    model = tempting("idefics3")
    batch = tiny.mixed_batch(model.processor)
    settings = {"max_new_tokens": 20, "invocation": "off", "do_sample": True, "seed": [1, 2, 3]}
    answers = model.generate(**batch, **settings)[:, batch["input_ids"].shape[1] :].tolist()
    ends = {token: sorted((*row, token).index(token) for row in answers) for row in answers for token in row}
    token, places = next((token, places) for token, places in ends.items() if 0 < places[0] < places[1] < places[2])
    widths = readings(monkeypatch)
    model.generate(**batch, **settings, eos_token_id=token, cache_implementation="static")
    assert widths == [3] * places[0] + [2] * (places[1] - places[0]) + [1] * (min(places[2], 19) - places[1])


def test_one_graph_serves_every_call(monkeypatch):
    """Prompts of other lengths, memories and rows that end early compile nothing anew."""
    counter = CompileCounter()
    model = tempting("qwen2_5_vl")
    config = CompileConfig(backend=counter, mode=None)
    batch = tiny.mixed_batch(model.processor)
    for _ in range(2):
        same(*both(model, batch, "learned", compile_config=config))
    longer = tiny.prompts(model.processor, [tiny.message("look again! " * 3, tiny.picture(i)) for i in range(3)])
    same(*both(model, longer, SCHEDULE, compile_config=config))
    assert counter.frame_count == 1


@torch._dynamo.config.patch(recompile_limit=2)
def test_slots_of_every_size_are_compiled():
    """torch recompiles a function only so many times; slots do not share that limit."""
    model = tempting("qwen2_5_vl")
    for count in (1, 2, 3, 4):
        counter = CompileCounter()
        batch = tiny.prompts(model.processor, [tiny.message("look again!", tiny.picture(0))] * count)
        config = CompileConfig(backend=counter, mode=None)
        same(*both(model, batch, "off", max_new_tokens=4, seed=list(range(count)), compile_config=config))
        assert counter.frame_count == 1


def test_slots_compiled_by_inductor_write_the_same():
    """Compiles the graph to code, too: of a single layer, since a second one's code is almost the same."""
    model = tempting("idefics3", base={"layers": 1})
    same(*both(model, tiny.mixed_batch(model.processor), SCHEDULE, compile_config=CompileConfig()))


class Letters(LogitsProcessor):
    """Lets row n of the call write only certain tokens, and ends it after 4 + 3 n of them."""

    def __init__(self, start, end):
        self.start, self.end, self.shapes = start, end, set()

    def __call__(self, input_ids, scores):
        self.shapes.add(len(input_ids))
        found = torch.full_like(scores, float("-inf"))
        for n, length in enumerate((4, 7, 10)):
            ids = [self.end] if input_ids.shape[1] - self.start >= length else range(20 + 10 * n, 25 + 10 * n)
            found[n, ids] = scores[n, ids]
        return found


class Lasts(StoppingCriteria):
    """Ends row n after 4 + 3 n tokens; records its inputs."""

    def __init__(self, start):
        self.start, self.seen = start, []

    def __call__(self, input_ids, scores, **kwargs):
        self.seen.append(input_ids.tolist())
        return torch.tensor([input_ids.shape[1] - self.start >= length for length in (4, 7, 10)])


@pytest.mark.parametrize("mode", ["plain", "ahead", "compiled"])
def test_processors_and_criteria_see_the_rows_of_the_call(mode, monkeypatch):
    """All of them, in order, finished ones padded, as in transformers' own loop, whichever have left the batch."""
    if mode != "plain":
        monkeypatch.setattr(cache, "AHEAD", {"cpu"})
    more = {"compile_config": CompileConfig(backend="eager", mode=None)} if mode == "compiled" else {}
    model = tempting("idefics3")
    batch = tiny.mixed_batch(model.processor)
    end, start = model.generation_config.eos_token_id, batch["input_ids"].shape[1]
    end = end[0] if isinstance(end, list) else end
    processors = [Letters(start, end) for _ in range(2)]
    runs = [
        model.generate(**batch, max_new_tokens=14, invocation="off", logits_processor=[one], eos_token_id=end, **how)
        for one, how in zip(processors, ({}, {"cache_implementation": "static", **more}), strict=True)
    ]
    assert torch.equal(*runs) and all(one.shapes == {3} for one in processors)
    settings = {"max_new_tokens": 14, "eos_token_id": end, "return_dict_in_generate": True}
    for policy in ("off", Forced([(0, 2, "short"), (2, 1, "long")])):
        criteria = [Lasts(start), Lasts(start)]
        runs = [
            model.generate(**batch, **settings, invocation=policy, stopping_criteria=[one], **how)
            for one, how in zip(criteria, ({}, {"cache_implementation": "static", **more}), strict=True)
        ]
        assert torch.equal(runs[0].sequences, runs[1].sequences)
        if policy == "off":
            assert criteria[0].seen == criteria[1].seen
            theirs = Lasts(start)
            model.base.generate(**batch, max_new_tokens=14, eos_token_id=end, stopping_criteria=[theirs])
            assert criteria[1].seen == theirs.seen


def test_compiled_slots_made_in_inference_mode_are_used_outside():
    model = tempting("idefics3")
    batch = tiny.mixed_batch(model.processor)
    config = CompileConfig(backend="eager", mode=None)
    with torch.inference_mode():
        same(*both(model, batch, SCHEDULE, max_new_tokens=12, compile_config=config))
    same(*both(model, batch, SCHEDULE, max_new_tokens=12, compile_config=config))


def test_settings_that_differ_a_little_are_told_apart():
    def key(*processors):
        none = {"criteria": [], "eos_ids": frozenset(), "budget": 1, "delimiters": frozenset, "pad": 0}
        config = GenerationConfig(do_sample=True)
        return DecodingSettings(policy_of("off"), config, LogitsProcessorList(processors), **none).sampling_key

    assert key(EtaLogitsWarper(1e-4)) == key(EtaLogitsWarper(1e-4)) != key(EtaLogitsWarper(1.00001e-4))
    assert key(TemperatureLogitsWarper(0.7)) != key(TemperatureLogitsWarper(0.70001))
