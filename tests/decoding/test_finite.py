"""Rows that are not finite: they fail alone, with a named error, and leave nothing behind in their slots."""

from __future__ import annotations

from itertools import cycle

import pytest
import tiny
import torch
from decoding_runs import alone, prompts, tempting
from torch._dynamo.testing import CompileCounter
from training_runs import low, rows, settings
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList

from vismem import NonFiniteError, Request, RequestQueue
from vismem.decoding import cache
from vismem.decoding.policies import Forced, Random
from vismem.decoding.rng import inverse_transform
from vismem.training.trainer import MemoryTrainer, TrainingDivergedError

EVERY_FAMILY = True
SAMPLED = {"do_sample": True, "temperature": 0.9, "top_p": 0.9}
SAMPLING = [{}, SAMPLED, {**SAMPLED, "repetition_penalty": 1.2}]


def poisoned(inputs: dict, value: float = torch.nan) -> dict:
    """The same request with pixel values of NaN or infinity."""
    return {n: t * value if n.startswith("pixel_values") else t for n, t in inputs.items()}


def visible(model, count: int) -> list[dict]:
    """Prompts of different lengths, each with a picture."""
    return [
        tiny.prompts(model.processor, [tiny.message("look again! " * (i % 3 + 1), tiny.picture(i))])
        for i in range(count)
    ]


def budget(number: int) -> int:
    """Tokens that a request may write, so that rows end at different times."""
    return 4 + 3 * (number % 3)


def answers_of(model, inputs, bad=(), values=(torch.nan,), **settings) -> dict:
    """The answers by number; the requests in `bad` are poisoned with the values in turn."""
    poison = dict(zip(bad, cycle(values)))
    requests = [
        Request(
            poisoned(each, poison[i]) if i in poison else each,
            seed=i,
            tag=i,
            generation={"max_new_tokens": budget(i)},
        )
        for i, each in enumerate(inputs)
    ]
    return {answer.tag: answer for answer in model.stream_batch(requests, batch_size=4, **settings)}


def same_but_for(found: dict, expected: dict, bad) -> None:
    assert sorted(found) == sorted(expected)
    for tag, answer in found.items():
        if tag in bad:
            assert answer.finish == "error" and isinstance(answer.error, NonFiniteError)
            assert "not finite" in str(answer.error) and "\n" not in str(answer.error)
        else:
            theirs = expected[tag]
            assert (answer.tokens, answer.invocations, answer.finish) == (
                theirs.tokens,
                theirs.invocations,
                theirs.finish,
            )


def test_a_poisoned_picture_fails_alone(family):
    """Sampling is shared by all families, so each tests one way of it; two different ones test all."""
    model = tempting(family)
    inputs = visible(model, 7)
    turn = list(tiny.FAMILIES).index(family) % 3
    for sampling in SAMPLING if family in tiny.UNLIKE else SAMPLING[turn : turn + 1]:
        expected = answers_of(model, inputs, **sampling)
        found = answers_of(model, inputs, bad=(1, 4), values=(torch.nan, torch.inf), **sampling)
        same_but_for(found, expected, (1, 4))


@pytest.fixture
def model():
    return tempting("qwen2_5_vl")


@pytest.fixture(scope="module")
def lasting():
    """A model that no test changes, so it compiles its slots once."""
    return tempting("qwen2_5_vl")


def mode_settings(mode: str, monkeypatch) -> dict:
    """Settings of a queue whose host runs ahead, or whose step is compiled."""
    if mode != "plain":
        monkeypatch.setattr(cache, "AHEAD", {"cpu"})
    return {"compile_config": CompileConfig(backend="eager", mode=None)} if mode == "compiled" else {}


@pytest.mark.parametrize("mode", ["ahead", "compiled"])
@pytest.mark.parametrize("sampling", SAMPLING[:2], ids=["greedy", "warped"])
def test_slots_of_every_kind_are_clean(lasting, mode, sampling, monkeypatch):
    inputs = visible(lasting, 9)
    more = {**mode_settings(mode, monkeypatch), **sampling}
    expected = answers_of(lasting, inputs, **more)
    same_but_for(answers_of(lasting, inputs, bad=(0, 1, 2, 5), **more), expected, (0, 1, 2, 5))


def test_cleaning_compiles_nothing_again(model):
    counter = CompileCounter()
    more = {"compile_config": CompileConfig(backend=counter, mode=None)}
    inputs = visible(model, 6)
    expected = answers_of(model, inputs, **more)
    frames = counter.frame_count
    same_but_for(answers_of(model, inputs, bad=(1,), **more), expected, (1,))
    assert counter.frame_count == frames


@pytest.mark.parametrize("mode", ["plain", "ahead", "compiled"])
@pytest.mark.parametrize("kind", ["short", "long"])
def test_a_memory_that_is_not_finite_costs_its_own_row(lasting, mode, kind, monkeypatch):
    """Rows form memories together, and the next request gets the slot of the one that failed."""
    model = lasting
    form, inputs = model.memory.form, visible(model, 8)
    more = {**mode_settings(mode, monkeypatch), "invocation": Forced([(0, 2, kind)])}
    expected = answers_of(model, inputs, **more)

    def poisoning(wanted, seen):
        for one in seen:
            if one.origin[0] in (1, 3):
                one.states = one.states * torch.nan
        return form(wanted, seen)

    monkeypatch.setattr(model.memory, "form", poisoning)
    found = answers_of(model, inputs, **more)
    same_but_for(found, expected, (1, 3))
    assert f"its {kind}-term memory is not finite" in str(found[1].error)
    assert len(found[1].tokens) == 4 and len(found[1].invocations) == 1  # what it wrote before is kept


def test_a_former_of_nan_fails_the_rows_that_invoke_it(model):
    with torch.no_grad():
        model.memory.long.log_gain.fill_(torch.nan)
    inputs = visible(model, 8)
    expected = answers_of(model, inputs, invocation="short")
    policy = [Forced([(0, 1, "long")]) if i % 3 == 0 else "short" for i in range(8)]
    requests = [
        Request(e, policy[i], seed=i, tag=i, generation={"max_new_tokens": budget(i)}) for i, e in enumerate(inputs)
    ]
    found = {answer.tag: answer for answer in model.stream_batch(requests, batch_size=4)}
    same_but_for(found, expected, (0, 3, 6))


@pytest.mark.parametrize("warper", [{"eta_cutoff": 1e-3}, {"top_h": 0.4}])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_warpers_that_refuse_a_batch_with_nan_refuse_its_row_alone(model, warper, value, monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # torch.compile turns it off
    inputs, more = visible(model, 6), {"do_sample": True, **warper}
    expected = answers_of(model, inputs, **more)
    same_but_for(answers_of(model, inputs, bad=(1, 2), values=(value,), **more), expected, (1, 2))


class Breaks(LogitsProcessor):
    """Sets the scores of rows that have written `after` tokens to `value`."""

    def __init__(self, value: float, after: int, length: int):
        self.value, self.length = value, after + length

    def __call__(self, input_ids, scores):
        return scores * 0 + self.value if input_ids.shape[1] == self.length else scores


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("sampling", SAMPLING[:2], ids=["greedy", "warped"])
def test_processors_that_leave_no_finite_score_fail_their_row(model, sampling, value):
    inputs = visible(model, 4)
    expected = answers_of(model, inputs, invocation="off", eos_token_id=None, **sampling)
    breaks = LogitsProcessorList([Breaks(value, 3, inputs[1]["input_ids"].shape[1])])
    requests = [
        Request(
            e,
            seed=i,
            tag=i,
            generation={"max_new_tokens": budget(i), **({"logits_processor": breaks} if i == 1 else {})},
        )
        for i, e in enumerate(inputs)
    ]
    found = {a.tag: a for a in model.stream_batch(requests, 4, invocation="off", eos_token_id=None, **sampling)}
    assert found[1].tokens == expected[1].tokens[:3] and isinstance(found[1].error, NonFiniteError)
    assert "logits processors left it no finite score at its token 3" in str(found[1].error)
    assert all(found[i].tokens == expected[i].tokens for i in (0, 2, 3))


ROWS_OF_THEIR_OWN = [{}, {**SAMPLED, "seed": [1, 2, 3]}]
STATIC = {"cache_implementation": "static"}


@pytest.mark.parametrize(
    "settings", [*ROWS_OF_THEIR_OWN, {**SAMPLED, "seed": 1}, *({**each, **STATIC} for each in ROWS_OF_THEIR_OWN)]
)
def test_generate_names_the_rows_and_keeps_the_others(model, settings):
    batch = tiny.prompts(model.processor, [tiny.message("look again!", tiny.picture(i)) for i in range(3)])
    settings = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True, "record": True, **settings}
    expected = model.generate(**batch, **settings)
    part = len(batch["pixel_values"]) // 3
    batch["pixel_values"] = batch["pixel_values"].clone()
    batch["pixel_values"][part : 2 * part] = torch.nan
    with pytest.raises(NonFiniteError, match=r"^row 1: its hidden states are not finite at its token 0") as caught:
        model.generate(**batch, **settings)
    assert caught.value.rows == [1]
    found = caught.value.output
    for row in (0, 2):
        assert torch.equal(found.sequences[row], expected.sequences[row])
        assert found.invocations[row] == expected.invocations[row]
        assert torch.equal(found.rollout[row].log_probs, expected.rollout[row].log_probs)
    assert len(found.rollout[1].tokens) == 0


def test_compiled_slots_are_clean_after_an_error(model, monkeypatch):
    """The slots are kept with the base, and the next call gets them as they are."""
    settings = {"max_new_tokens": 8, "cache_implementation": "static", "invocation": "off"}
    settings |= {"compile_config": CompileConfig(backend="eager", mode=None)}
    first, second = visible(model, 2)
    expected = model.generate(**second, **settings)
    calls = []

    def failing(ids, scores):
        calls.append(ids)
        if len(calls) == 3:
            raise KeyError("mine")
        return torch.zeros_like(scores)

    with pytest.raises(KeyError):
        model.generate(**poisoned(first), **settings, logits_processor=[failing])
    assert torch.equal(model.generate(**second, **settings), expected)


def test_a_cancelled_poisoned_request_leaves_nothing(model):
    bad, good = visible(model, 2)
    queue = RequestQueue(model, batch_size=1, max_new_tokens=6)
    (one,) = queue.submit(Request(poisoned(bad), invocation=Forced([(0, 0, "long")])))
    queue.step()
    queue.cancel([one])
    (two,) = queue.submit(Request(good))
    while two.finish is None:
        queue.step()
    assert one.finish == "cancelled" and (two.tokens, two.invocations) == alone(model, good, max_new_tokens=6)


@pytest.mark.parametrize("stage", ["stage1", "grpo"])
def test_training_stops_at_an_answer_that_cannot_be_sampled(stage, tmp_path):
    model = tiny.equip("idefics3")
    poison = model.memory if stage == "stage1" else model.base.lm_head

    for parameter in poison.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    trainer = MemoryTrainer(model, settings(tmp_path, stage), rows(2), low)
    with pytest.raises(
        TrainingDivergedError, match=r"could not be sampled .* at step 0, rows row-\d, row-\d; last good"
    ):
        trainer.train()


def test_random_places_do_not_change_beside_a_poisoned_row(model):
    inputs = prompts(model, 8)
    more = {"invocation": Random(0.4, "anywhere", seed=3)}
    expected = answers_of(model, inputs, **more)
    same_but_for(answers_of(model, inputs, bad=(1, 2), **more), expected, (1, 2))


@pytest.mark.parametrize("value", [torch.nan, 0.0, torch.inf])
def test_sampling_from_an_invalid_distribution_gives_some_token(value):
    assert 0 <= int(inverse_transform(torch.full((1, 10), value), torch.tensor([0.3]))) < 10
    assert inverse_transform(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([0.75])).tolist() == [2]
