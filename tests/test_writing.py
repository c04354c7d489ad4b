"""A choice on its way out: stop strings anywhere, log-probabilities beside their words, invocations in their place."""

from __future__ import annotations

import itertools

import pytest

from vismem.decoding.trace import Invocation, Top
from vismem.pocket import load_base
from vismem.serving.worker import News
from vismem.serving.writing import Delta, Ended, Invoked, Writer, longest_start


@pytest.fixture(scope="module")
def model():
    import vismem

    base, processor = load_base()
    return vismem.VisMem(base, processor, vismem.VisMemConfig.preset("pocket"))


def told(writer: Writer, ids: list[int], invocations=(), tops=None, finish="stop", size: int = 1) -> list:
    """The events of an answer whose tokens come `size` at a time."""
    found, waiting = [], list(invocations)
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        new = [one for one in waiting if start <= one.position < start + size]
        last = finish if start + size >= len(ids) else None
        found += writer.read(News(0, part, new, tops[start : start + size] if tops else [], last))
    return found


def text_of(events: list) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))


def words(model, text: str) -> list[int]:
    return model.processor.tokenizer.encode(text, add_special_tokens=False)


SENTENCE = "Row 1: 2 red, 8 blue. So 27."


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("stops", [[], ["red"], ["8 b"], ["So 27.!"], ["zzz", ". S", "blue"], ["R"], ["."]])
def test_stop_strings_cut_where_they_begin(model, stops, size):
    writer = Writer(0, model.processor.tokenizer, model.tokens, stops)
    events = told(writer, words(model, SENTENCE), size=size)
    places = [SENTENCE.find(stop) for stop in stops if stop in SENTENCE]
    assert text_of(events) == (SENTENCE[: min(places)] if places else SENTENCE)
    assert writer.stopped == bool(places)
    assert isinstance(events[-1], Ended) and events[-1].finish == "stop"
    assert list(writer.read(News(0, words(model, "more"), [], [], "cancelled"))) == [] or not places


def test_nothing_of_a_stop_string_gets_out_early(model):
    writer = Writer(0, model.processor.tokenizer, model.tokens, ["blue. So 27.!"])
    seen = ""
    for token in words(model, SENTENCE):
        seen += text_of(list(writer.read(News(0, [token], [], []))))
        assert SENTENCE.startswith(seen) and not seen.endswith("b")  # of blue
    assert text_of(list(writer.read(News(0, [], [], [], "length")))) != ""


def test_longest_start_against_all_prefixes():
    stops = ["aab", "abc", "b"]
    for length in range(5):
        for letters in itertools.product("abc", repeat=length):
            text = "".join(letters)
            starts = [n for n in range(1, 4) for s in stops if n < len(s) and text.endswith(s[:n])]
            assert longest_start(text, stops) == max(starts, default=0)


def test_invocations_stand_where_they_were(model):
    tokens = model.tokens
    first, second = words(model, "Row 1"), words(model, ": 27.")
    ids = [
        tokens.invocation_ids["short"],
        tokens.end_ids["short"],
        *first,
        tokens.invocation_ids["long"],
        tokens.end_ids["long"],
        *second,
        model.processor.tokenizer.eos_token_id,
    ]
    invocations = [Invocation("short", 0, 16, True), Invocation("long", 2 + len(first), 0, False)]
    for size in (1, 4, 100):
        writer = Writer(0, model.processor.tokenizer, model.tokens, ["zz"])
        events = told(writer, ids, invocations, size=size)
        found = [event.invocation for event in events if isinstance(event, Invoked)]
        assert [(i.kind, i.position, i.offset, i.length, i.forced) for i in found] == [
            ("short", 0, 0, 16, True),
            ("long", 2 + len(first), len("Row 1"), 0, False),
        ]
        assert text_of(events) == "Row 1: 27."
        end = events[-1]
        assert end.completion_tokens == len(first) + len(second) + 1  # the end of the answer is sampled too
        assert end.memory.model_dump() == {"invocation_tokens": 4, "short_vectors": 16, "long_vectors": 0}


@pytest.mark.parametrize("stops", [[], ["blue"]])
def test_log_probabilities_go_with_their_words(model, stops):
    ids = words(model, SENTENCE)
    tops = [Top(-0.1 * at, [(token, -0.1 * at), (5, float("-inf"))]) for at, token in enumerate(ids)]
    writer = Writer(0, model.processor.tokenizer, model.tokens, stops, top=2)
    events = told(writer, ids, tops=tops)
    entries = [entry for event in events if isinstance(event, Delta) for entry in event.logprobs]
    joined = "".join(entry.token for entry in entries)
    assert joined.startswith(text_of(events)) and (stops or joined == SENTENCE)
    assert [entry.logprob for entry in entries] == pytest.approx([-0.1 * at for at in range(len(entries))])
    assert all(entry.top_logprobs[1].logprob == -9999.0 for entry in entries)  # JSON knows no minus infinity
    assert bytes(entries[0].bytes).decode() == entries[0].token


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("stop", [" blue", ",", "27"])
def test_log_probabilities_end_before_a_stop_string(model, stop, size):
    ids = words(model, SENTENCE)
    assert {" blue", ",", " 2", "7"} <= {model.processor.tokenizer.decode(token) for token in ids}
    writer = Writer(0, model.processor.tokenizer, model.tokens, [stop], top=0)
    events = told(writer, ids, tops=[Top(-1.0, []) for _ in ids], size=size)
    joined = "".join(entry.token for event in events if isinstance(event, Delta) for entry in event.logprobs)
    place = SENTENCE.index(stop)
    assert text_of(events) == SENTENCE[:place]
    assert joined == (SENTENCE[: place + 1] if stop == "27" else SENTENCE[:place])  # within " 2", which stays


def test_a_character_of_several_tokens_comes_out_whole(model):
    tokenizer = model.processor.tokenizer
    ids = words(model, "漢")
    if len(ids) < 2 or tokenizer.decode(ids) != "漢":
        pytest.skip("this tokenizer has the character whole")
    writer = Writer(0, tokenizer, model.tokens)
    events = [list(writer.read(News(0, [token], [], []))) for token in ids]
    assert [text_of(each) for each in events] == [""] * (len(ids) - 1) + ["漢"]
