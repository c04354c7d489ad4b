"""The queue of requests: what a row writes does not depend on when it enters, or on what is beside it."""

from __future__ import annotations

import gc
import weakref

import pytest
import tiny
import torch
from decoding_runs import SAMPLING, alone, prompts, readings, tempting
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, LogitsProcessor, StoppingCriteria

from vismem import Request, RequestQueue
from vismem.decoding import cache, decoder
from vismem.decoding import queue as queues
from vismem.decoding.policies import Forced, Random

EVERY_FAMILY = True


def test_answers_are_those_of_a_row_alone(family):
    """Sampling is shared by all families, so each tests one way of it; two different ones test all."""
    model = tempting(family, pull=12)
    inputs = prompts(model, 6)
    end = model.generation_config.eos_token_id
    turn = list(tiny.FAMILIES).index(family) % 3
    for sampling in SAMPLING if family in tiny.UNLIKE else SAMPLING[turn : turn + 1]:
        asked = [
            Request(e, seed=i, generation={"max_new_tokens": 6 + 3 * (i % 3)}, tag=i) for i, e in enumerate(inputs)
        ]
        found = {answer.tag: answer for answer in model.stream_batch(asked, batch_size=3, **sampling)}
        assert sorted(found) == list(range(len(inputs)))
        for i, each in enumerate(inputs):
            tokens, invocations = alone(model, each, seed=[i], max_new_tokens=6 + 3 * (i % 3), **sampling)
            assert (found[i].tokens, found[i].invocations) == (tokens, invocations)
            assert found[i].finish == ("stop" if tokens[-1] == end else "length")
        assert sum(len(answer.invocations) for answer in found.values()) > 3


@pytest.fixture
def model():
    return tempting("qwen2_5_vl")


@pytest.mark.parametrize("mode", ["ahead", "compiled"])
def test_ahead_and_compiled_answers_are_those_of_a_row_alone(model, mode, monkeypatch):
    monkeypatch.setattr(cache, "AHEAD", {"cpu"})
    more = {"compile_config": CompileConfig(backend="eager", mode=None)} if mode == "compiled" else {}
    answers = list(model.stream_batch(prompts(model, 6), batch_size=4, max_new_tokens=12, **more))
    assert len(answers) == 6
    for answer in answers:
        assert (answer.tokens, answer.invocations) == alone(model, answer.request.inputs, max_new_tokens=12)


def test_requests_have_settings_of_their_own(model):
    one, two = prompts(model, 3)[1:]
    asked = [
        Request(one, invocation=Forced([(0, 2, "short")])),
        Request(one, invocation="off"),
        Request(two, invocation=Random(0.5, "anywhere", seed=3)),
        Request(two, generation={"do_sample": True, "temperature": 0.7}, seed=5),
        Request(one, generation={"max_new_tokens": 3}),
    ]
    found = {id(answer.request): answer for answer in model.stream_batch(asked, max_new_tokens=10, eos_token_id=None)}
    for request in asked:
        settings = {"max_new_tokens": 10, "eos_token_id": None, **request.generation}
        policy = request.invocation or "learned"
        expected = alone(model, request.inputs, invocation=policy, seed=[request.seed or 0], **settings)
        assert (found[id(request)].tokens, found[id(request)].invocations) == expected


def test_a_request_may_name_the_cache_that_the_queue_has_anyway(model):
    each = prompts(model, 2)[1]
    request = Request(each, generation={"cache_implementation": "static"})
    (answer,) = model.stream_batch([request], max_new_tokens=6)
    assert (answer.tokens, answer.invocations) == alone(model, each, max_new_tokens=6)


def test_a_padded_batch_and_copies_are_one_request(model):
    batch = tiny.mixed_batch(model.processor)
    settings = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 2}
    answers = list(model.stream_batch([Request(batch, seed=10)], batch_size=8, **settings))
    out = model.generate(**batch, **settings, seed=list(range(10, 16)), return_dict_in_generate=True)
    assert len(answers) == 6
    for answer in answers:
        new = out.sequences[answer.index, batch["input_ids"].shape[1] :].tolist()
        assert answer.tokens == new[: len(answer.tokens)] and answer.invocations == out.invocations[answer.index]


def test_requests_are_taken_as_room_becomes_free(model):
    taken = []

    def source():
        for i, each in enumerate(prompts(model, 6)):
            taken.append(i)
            yield each

    answers = model.stream_batch(source(), batch_size=2, max_new_tokens=4, eos_token_id=None)
    assert taken == []
    next(answers)
    assert len(taken) <= 4
    assert len(list(answers)) == 5 and len(taken) == 6


def test_rows_enter_while_others_write(model, monkeypatch):
    """The batch stays full: a long answer does not hold up the short ones behind it."""
    widths = readings(monkeypatch)
    lengths = [30, 4, 4, 4, 4, 4, 4]
    asked = [Request(e, generation={"max_new_tokens": n}) for e, n in zip(prompts(model, 7), lengths, strict=True)]
    answers = list(model.stream_batch(asked, batch_size=2, invocation="off", eos_token_id=None))
    assert len(answers[-1].tokens) == 30
    assert widths[:20].count(2) >= 15 and len(widths) < 40


def test_cancelled_rows_free_their_places(model):
    first, second, third = prompts(model, 3)
    queue = RequestQueue(model, batch_size=2, max_new_tokens=20, eos_token_id=None)
    (one,), (two,), (waiting,) = (queue.submit(Request(each)) for each in (first, second, third))
    assert len(queue) == 3 and not queue.hungry
    for _ in range(5):
        queue.step()
    written = list(two.tokens)
    assert len(written) == 5 or two.invocations
    queue.cancel([two])
    assert two.finish == "cancelled" and two.tokens == written
    queue.step()
    assert waiting.tokens  # the place was taken at once
    queue.cancel([waiting, two])
    while not one.finish:
        queue.step()
    assert (one.tokens, one.invocations) == alone(model, first, max_new_tokens=20, eos_token_id=None)
    assert waiting.finish == "cancelled" and len(queue) == 0 and queue.step() == []
    late = queue.submit(Request(third))
    queue.cancel(late)
    assert queue.step() == [] and late[0].tokens == []


def test_a_bad_request_harms_no_other(model):
    good, bad = prompts(model, 2)
    bad = {**bad, "pixel_values": bad["pixel_values"][:0], "image_grid_thw": bad["image_grid_thw"][:0]}
    queue = RequestQueue(model, batch_size=4, max_new_tokens=6)
    (one,), (two,), (three,) = (
        queue.submit(request)
        for request in (Request(good), Request(bad), Request(good, invocation=Forced([(0, 1, "short")])))
    )
    ended = queue.step()
    assert {answer.finish for answer in ended} == {"error"} and set(ended) == {two, three}
    assert "image tokens" in str(two.error) and "no image" in str(three.error)
    while not one.finish:
        queue.step()
    assert (one.tokens, one.invocations) == alone(model, good, max_new_tokens=6)
    with pytest.raises(ValueError, match=r"request 1: .*image tokens"):
        list(model.stream_batch([good, bad], max_new_tokens=2))


def test_requests_that_do_not_fit_are_refused(model):
    with pytest.raises(ValueError, match="batch_size must be 1 or more"):
        RequestQueue(model, batch_size=0)
    with pytest.raises(ValueError, match="3 rows does not fit a batch of 2"):
        RequestQueue(model, batch_size=2).submit(Request(tiny.mixed_batch(model.processor)))
    with pytest.raises(ValueError, match=r"request 1: .*3 rows does not fit a batch of 2"):
        list(model.stream_batch([prompts(model, 1)[0], tiny.mixed_batch(model.processor)], 2, max_new_tokens=2))
    with pytest.raises(ValueError, match="request 0: Random has 1 seeds for 3 rows"):
        policy = Random(0.5, "anywhere", seed=[4])
        list(model.stream_batch([tiny.mixed_batch(model.processor)], invocation=policy, max_new_tokens=2))
    with pytest.raises(ValueError, match="request 0: memory decodes greedily"):
        list(model.stream_batch([prompts(model, 1)[0]], num_beams=2, max_new_tokens=2))


def test_finished_answers_hold_no_image(model):
    """A prompt's images are freed with its last row, so a long evaluation does not fill the memory."""
    sights = []
    made = decoder.PromptImages.__init__

    def watched(self, *args, **kwargs):
        made(self, *args, **kwargs)
        sights.append(weakref.ref(self))

    decoder.PromptImages.__init__ = watched
    try:
        schedule = Forced([(0, 2, "short")])
        answers = list(model.stream_batch(prompts(model, 5)[1:3], invocation=schedule, max_new_tokens=6))
    finally:
        decoder.PromptImages.__init__ = made
    gc.collect()
    assert len(answers) == 2 and len(sights) == 2 and all(sight() is None for sight in sights)


def test_recorded_answers_are_rollouts(model):
    (answer,) = model.stream_batch(prompts(model, 2)[1:], record=True, max_new_tokens=12, do_sample=True)
    rollout = answer.rollout
    assert rollout.tokens.tolist() == answer.tokens and rollout.sampled.sum() == answer.sampled
    assert bool((rollout.log_probs[rollout.sampled] < 0).all())


def test_without_a_seed_the_global_generator_gives_it(model):
    def words():
        torch.manual_seed(7)
        return [a.tokens for a in model.stream_batch(prompts(model, 3), max_new_tokens=8, do_sample=True)]

    assert words() == words()


@pytest.mark.parametrize(
    "policy", [Random(0.5, "anywhere", seed=3), Forced([(0, 2, "long"), (0, 9, "long")])], ids=["random", "forced"]
)
def test_one_policy_object_serves_many_requests(model, policy):
    """A request that enters does not make the policy forget where the others are."""
    settings = {"max_new_tokens": 12, "eos_token_id": None}
    asked = [Request(each, generation={"max_new_tokens": 5 + 3 * i}) for i, each in enumerate(prompts(model, 6))]
    answers = list(model.stream_batch(asked, batch_size=2, invocation=policy, **settings))
    assert len(answers) == 6
    for answer in answers:
        expected = alone(model, answer.request.inputs, invocation=policy, **(settings | answer.request.generation))
        assert (answer.tokens, answer.invocations) == expected


def test_every_request_keeps_its_own_criteria(model):
    """Rows that are sampled together need not end together."""

    class After(StoppingCriteria):
        def __init__(self, count):
            self.count = count

        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= self.count)

    each = prompts(model, 1)[0]
    length = each["input_ids"].shape[1]
    asked = [
        Request(each, generation={"stopping_criteria": [After(length + n)] if n else None}, tag=n) for n in (0, 4, 7)
    ]
    answers = model.stream_batch(asked, invocation="off", max_new_tokens=10, eos_token_id=None)
    assert {a.tag: (len(a.tokens), a.finish) for a in answers} == {0: (10, "length"), 4: (4, "stop"), 7: (7, "stop")}


class Fails(LogitsProcessor):
    """Raises at the third token."""

    def __init__(self, error):
        self.error, self.seen = error, 0

    def __call__(self, input_ids, scores):
        self.seen += 1
        if self.seen == 3:
            raise self.error
        return scores


@pytest.mark.parametrize("error", [ValueError("wrong"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("ahead", [False, True], ids=["plain", "ahead"])
def test_an_error_in_the_middle_of_a_step_ends_running_answers(model, error, ahead, monkeypatch):
    """Running answers end with it, waiting ones are written later."""
    if ahead:
        monkeypatch.setattr(cache, "AHEAD", {"cpu"})
    one, two, three = prompts(model, 3)
    settings = {"max_new_tokens": 8, "eos_token_id": None}
    queue = RequestQueue(model, batch_size=2, **settings)
    (other,), (failing,), (waiting,) = (
        queue.submit(request)
        for request in (Request(one), Request(two, generation={"logits_processor": [Fails(error)]}), Request(three))
    )
    with pytest.raises(type(error)):
        for _ in range(40):
            queue.step()
    assert other.finish == failing.finish == "error" and other.error is failing.error is error
    assert waiting.finish is None and len(queue) == 1
    while not waiting.finish:
        queue.step()
    assert (waiting.tokens, waiting.invocations) == alone(model, three, **settings)


def test_an_error_while_a_prompt_is_read_ends_that_request(model, monkeypatch):
    """Whatever it is, it ends only that request; running ones go on."""
    one, two = prompts(model, 2)
    settings = {"max_new_tokens": 6, "eos_token_id": None}
    queue = RequestQueue(model, batch_size=2, **settings)
    (answer,) = queue.submit(Request(one))
    queue.step()
    (failing,) = queue.submit(Request(two))
    with monkeypatch.context() as patch:
        patch.setattr(decoder.Decoder, "read_prompts", lambda *_: 1 / 0)
        assert queue.step() == [failing]
    assert failing.finish == "error" and isinstance(failing.error, ZeroDivisionError) and not failing.taken
    while not answer.finish:
        queue.step()
    assert answer.taken and (answer.tokens, answer.invocations) == alone(model, one, **settings)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(decoder.Decoder, "read_prompts", lambda *_: 1 / 0)
        list(queues.stream(queue, [one]))


def test_an_error_while_rows_get_their_places_ends_all(model, monkeypatch):
    """Then no row is intact; all end, and the queue goes on."""
    one, two = prompts(model, 2)
    queue = RequestQueue(model, batch_size=2, max_new_tokens=6)
    (answer,) = queue.submit(Request(one))
    queue.step()
    (failing,) = queue.submit(Request(two))
    with monkeypatch.context() as patch:
        patch.setattr(cache.Slots, "place", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            queue.step()
    assert answer.finish == failing.finish == "error" and len(queue) == 0
    (again,) = queue.submit(Request(two))
    queue.step()
    assert again.sampled == 1


def test_what_a_queue_remembers_of_settings_is_bounded(model, monkeypatch):
    monkeypatch.setattr(queues, "MOST_KINDS", 3)
    queue = RequestQueue(model, max_new_tokens=1, do_sample=True)
    for index in range(8):
        queue.submit(Request(prompts(model, 1)[0], generation={"temperature": 1 + index / 10}))
    while len(queue):
        queue.step()
    assert len(queue.paddable) <= 3


def test_a_stream_that_is_left_early_holds_nothing(model):
    queue = RequestQueue(model, batch_size=2, eos_token_id=None)
    asked = [Request(each, generation={"max_new_tokens": 4 + i}) for i, each in enumerate(prompts(model, 5))]
    answers = queues.stream(queue, asked)
    next(answers)
    assert len(queue)
    answers.close()
    assert len(queue) == 0 and not queue.decoder.rows


def readings_of_prompts(monkeypatch) -> list[int]:
    """The number of prompts in each prefill, recorded from now on."""
    counts, read = [], decoder.Decoder.read_prompts

    def noted(self, call):
        counts.append(len(call.input_ids))
        return read(self, call)

    monkeypatch.setattr(decoder.Decoder, "read_prompts", noted)
    return counts


def test_waiting_requests_are_read_together(family, monkeypatch):
    """As one padded batch, once nothing is known to read the padding; every row keeps its own budget."""
    model = tempting(family)
    texts = ["look again!", "A red cup, a blue book.", "Describe the image: it is bright; look again!", "look"]
    inputs = [tiny.prompts(model.processor, [tiny.message(t, tiny.picture(i))]) for i, t in enumerate(texts)]
    asked = [Request(x, seed=i, generation={"max_new_tokens": 5 + i}, tag=i) for i, x in enumerate(inputs)]
    for sampling in SAMPLING[:2]:
        with monkeypatch.context() as patch:
            counts = readings_of_prompts(patch)
            answers = list(model.stream_batch(asked, batch_size=4, eos_token_id=None, **sampling))
        assert counts[0] == 1 and max(counts) > 1 and sum(counts) == 4
        for answer in answers:
            settings = {"max_new_tokens": 5 + answer.tag, "eos_token_id": None, "seed": [answer.tag], **sampling}
            assert (answer.tokens, answer.invocations) == alone(model, inputs[answer.tag], **settings)


def test_requests_that_differ_are_not_read_together(model, monkeypatch):
    one, two, three = (prompts(model, 3)[1] for _ in range(3))
    long = tiny.prompts(model.processor, [tiny.message("look again! " * 60, tiny.picture(0))])
    counts = readings_of_prompts(monkeypatch)
    asked = [
        Request(one),
        Request(two, generation={"repetition_penalty": 1.2}),
        Request(three, generation={"repetition_penalty": 1.2}),  # looks at the ids, and so would at padding
        Request(one, invocation=Forced([(0, 1, "short")])),
        Request(two, invocation=Forced([(0, 1, "short")])),  # counts the rows of its call
        Request(one),
        Request(long),  # would be mostly padding for the others
    ]
    assert len(list(model.stream_batch(asked, batch_size=8, max_new_tokens=4))) == 7
    assert counts == [1] * 7


def test_settings_that_print_alike_are_not_alike(model):
    """A long tensor is printed with its middle left out."""
    (one,) = prompts(model, 2)[1:]
    queue = RequestQueue(model, max_new_tokens=4)
    numbers = torch.arange(2000), torch.arange(2000)
    numbers[1][1000] = 5
    kinds = [
        queue.kind_of(Request(one, generation={"suppress_tokens": each})) for each in (*numbers, numbers[0].clone())
    ]
    assert repr(numbers[0]) == repr(numbers[1])
    assert kinds[0] != kinds[1] and kinds[0] == kinds[2]


def test_a_bad_request_among_those_read_together_fails_alone(model, monkeypatch):
    good = prompts(model, 2)[1]
    bad = {**good, "input_ids": good["input_ids"].clone()}
    bad["input_ids"][bad["input_ids"] == model.backbone.image_token_id] = 100
    counts = readings_of_prompts(monkeypatch)
    queue = RequestQueue(model, batch_size=5, max_new_tokens=6)
    answers = [queue.submit(Request(each))[0] for each in (good, good, bad, good, good)]
    while len(queue):
        queue.step()
    assert [answer.finish == "error" for answer in answers] == [False, False, True, False, False]
    expected = alone(model, good, max_new_tokens=6)
    assert all((a.tokens, a.invocations) == expected for a in answers if a.finish != "error")
    assert set(counts) == {1} and not queue.alone  # when all failed, each was read by itself


def test_compiled_slots_are_not_taken_from_a_stream_under_way(model):
    """They are kept with the base, but one decoder at a time writes into them."""
    settings = {"max_new_tokens": 10, "eos_token_id": None, "compile_config": CompileConfig(backend="eager", mode=None)}
    inputs = prompts(model, 3)
    plain = {"max_new_tokens": 10, "eos_token_id": None}
    found = []
    for answer in model.stream_batch(inputs, batch_size=1, **settings):
        found.append(answer)
        assert alone(model, inputs[0], cache_implementation="static", **settings) == alone(model, inputs[0], **plain)
    queues = [RequestQueue(model, batch_size=1, **settings) for _ in range(2)]
    beside = [queue.submit(Request(inputs[i + 1]))[0] for i, queue in enumerate(queues)]
    while not all(answer.finish for answer in beside):
        for queue in queues:
            queue.step()
    assert len(found) == 3
    for answer in found + beside:
        assert (answer.tokens, answer.invocations) == alone(model, answer.request.inputs, **plain)


def test_compiled_slots_grow_once_for_a_longer_request(model):
    counter = CompileCounter()
    one, two = prompts(model, 2)
    lengths = (4, 600)
    queue = RequestQueue(model, batch_size=2, compile_config=CompileConfig(backend=counter, mode=None))
    queue.submit(Request(one, generation={"max_new_tokens": lengths[0]}))
    queue.step()
    queue.submit(Request(two, generation={"max_new_tokens": lengths[1]}))
    queue.step()
    columns = queue.decoder.cache.columns
    assert columns >= two["input_ids"].shape[1] + 600
    queue.step()
    assert counter.frame_count <= 2


def test_many_requests_leave_nothing_behind(model):
    """The number of live tensors does not grow with the number of answers."""
    inputs, counts = prompts(model, 6), []
    answers = model.stream_batch((inputs[i % 6] for i in range(60)), batch_size=6, max_new_tokens=5, do_sample=True)
    for number, _ in enumerate(answers):
        if number in (20, 55):
            gc.collect()
            counts.append(sum(torch.is_tensor(each) for each in gc.get_objects()))
    assert counts[1] < counts[0] + 60


def test_a_request_goes_on_without_its_cancelled_row(model):
    """Before it starts and while it is written; processors still see all its rows."""
    batch = tiny.mixed_batch(model.processor)
    settings = {"max_new_tokens": 8, "repetition_penalty": 1.3, "eos_token_id": None}
    queue = RequestQueue(model, batch_size=4, **settings)
    answers = queue.submit(Request(batch))
    queue.cancel(answers[:1])
    for _ in range(3):
        queue.step()
    queue.cancel(answers[1:2])
    while not answers[2].finish:
        queue.step()
    out = model.generate(**batch, **settings, return_dict_in_generate=True)
    new = out.sequences[:, batch["input_ids"].shape[1] :].tolist()
    assert [answer.finish for answer in answers] == ["cancelled", "cancelled", "length"]
    assert all(answer.tokens == row[: len(answer.tokens)] for answer, row in zip(answers, new, strict=True))
    assert answers[0].tokens == [] and answers[1].tokens and answers[2].sampled == 8


def test_top_gives_log_probabilities_before_truncation(model):
    """`top` gives log-probabilities before temperature and truncation, and leaves out inserted tokens."""
    each = prompts(model, 2)[1]
    settings = {"do_sample": True, "temperature": 0.5, "top_k": 3, "max_new_tokens": 8, "eos_token_id": None}
    asked = [
        Request(each, top=2, seed=4),
        Request(each, top=0, seed=4),
        Request(each, seed=4),
        Request(each, top=5, seed=4, invocation=Forced([(0, 3, "short")])),
    ]
    found = {id(a.request): a for a in model.stream_batch(asked, batch_size=4, invocation="off", **settings)}
    out = model.generate(
        **each, **settings, invocation="off", seed=[4], return_dict_in_generate=True, output_logits=True
    )
    two, none, nothing, forced = (found[id(request)] for request in asked)
    assert two.tokens == none.tokens == nothing.tokens and nothing.tops == []
    for token, logits, top, bare in zip(two.tokens, out.logits, two.tops, none.tops, strict=True):
        expected = logits[0].log_softmax(-1)
        assert top.log_prob == pytest.approx(float(expected[token]), abs=1e-4) and bare.likeliest == []
        assert bare.log_prob == top.log_prob
        values, ids = expected.topk(2)
        assert [one for one, _ in top.likeliest] == ids.tolist()
        assert [value for _, value in top.likeliest] == pytest.approx(values.tolist(), abs=1e-4)
    (look,) = forced.invocations
    assert [i for i, top in enumerate(forced.tops) if top is None] == [look.position, look.position + 1]
    assert all(len(top.likeliest) == 5 for top in forced.tops if top is not None)
