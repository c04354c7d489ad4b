"""Chunks of a choice: stop strings, log-probabilities, token bytes and invocations."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from families.words import tokenizer as byte_level
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from vismem.decoding.trace import Invocation, Top
from vismem.pocket import load_base
from vismem.serving.protocol import MemoryUsage, Usage
from vismem.serving.responses import ChoiceStream, TokenBytes, partial_stop_length
from vismem.serving.worker import RowUpdate


@pytest.fixture(scope="module")
def model():
    import vismem

    base, processor = load_base()
    return vismem.VisMem(base, processor, vismem.VisMemConfig.preset("pocket"))


def choice(tokenizer, tokens, stops=(), **more) -> ChoiceStream:
    usage = Usage(prompt_tokens=0, completion_tokens=0, total_tokens=0, memory=MemoryUsage())
    return ChoiceStream(0, tokenizer, tokens, usage, stops, **more)


def told(writer: ChoiceStream, ids: list[int], invocations=(), tops=None, finish="stop", size: int = 1) -> list:
    """The chunks of an answer whose tokens come `size` at a time."""
    found, waiting = [], list(invocations)
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        new = [one for one in waiting if start <= one.position < start + size]
        last = finish if start + size >= len(ids) else None
        found += writer.read(RowUpdate(0, part, new, tops[start : start + size] if tops else [], last))
    return found


def text_of(events: list) -> str:
    return "".join(event.delta.content or "" for event in events)


def entries_of(events: list) -> list:
    """Their log-probabilities."""
    return [entry for event in events if event.logprobs for entry in event.logprobs.content]


def words(model, text: str) -> list[int]:
    return model.processor.tokenizer.encode(text, add_special_tokens=False)


SENTENCE = "Row 1: 2 red, 8 blue. So 27."


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("stops", [[], ["red"], ["8 b"], ["So 27.!"], ["zzz", ". S", "blue"], ["R"], ["."]])
def test_text_ends_where_a_stop_string_starts(model, stops, size):
    writer = choice(model.processor.tokenizer, model.tokens, stops)
    events = told(writer, words(model, SENTENCE), size=size)
    places = [SENTENCE.find(stop) for stop in stops if stop in SENTENCE]
    assert text_of(events) == (SENTENCE[: min(places)] if places else SENTENCE)
    assert writer.stopped == bool(places)
    assert events[-1].finish_reason == "stop"
    assert list(writer.read(RowUpdate(0, words(model, "more"), [], [], "cancelled"))) == [] or not places


def test_a_partial_stop_string_is_held_back(model):
    writer = choice(model.processor.tokenizer, model.tokens, ["blue. So 27.!"])
    seen = ""
    for token in words(model, SENTENCE):
        seen += text_of(list(writer.read(RowUpdate(0, [token], [], []))))
        assert SENTENCE.startswith(seen) and not seen.endswith("b")  # of blue
    assert text_of(list(writer.read(RowUpdate(0, [], [], [], "length")))) != ""


def test_partial_stop_length_against_all_prefixes():
    stops = ["aab", "abc", "b"]
    for length in range(5):
        for letters in itertools.product("abc", repeat=length):
            text = "".join(letters)
            starts = [n for n in range(1, 4) for s in stops if n < len(s) and text.endswith(s[:n])]
            assert partial_stop_length(text, stops) == max(starts, default=0)


def test_invocations_have_the_right_position_and_offset(model):
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
        writer = choice(model.processor.tokenizer, model.tokens, ["zz"])
        events = told(writer, ids, invocations, size=size)
        found = [each for event in events if event.vismem for each in event.vismem.invocations]
        assert [(i.kind, i.position, i.offset, i.length, i.forced) for i in found] == [
            ("short", 0, 0, 16, True),
            ("long", 2 + len(first), len("Row 1"), 0, False),
        ]
        assert text_of(events) == "Row 1: 27."
        count = len(first) + len(second) + 1  # the end of the answer is sampled too
        assert writer.usage.completion_tokens == writer.usage.total_tokens == count
        assert writer.usage.memory.model_dump() == {"invocation_tokens": 4, "short_vectors": 16, "long_vectors": 0}


@pytest.mark.parametrize("stops", [[], ["blue"]])
def test_log_probabilities_arrive_with_their_text(model, stops):
    ids = words(model, SENTENCE)
    tops = [Top(-0.1 * at, [(token, -0.1 * at), (5, float("-inf"))]) for at, token in enumerate(ids)]
    writer = choice(model.processor.tokenizer, model.tokens, stops, top=2)
    events = told(writer, ids, tops=tops)
    entries = entries_of(events)
    joined = "".join(entry.token for entry in entries)
    assert joined.startswith(text_of(events)) and (stops or joined == SENTENCE)
    assert [entry.logprob for entry in entries] == pytest.approx([-0.1 * at for at in range(len(entries))])
    assert all(entry.top_logprobs[1].logprob == -9999.0 for entry in entries)  # JSON knows no minus infinity
    assert bytes(entries[0].bytes).decode() == entries[0].token


def test_a_special_token_without_a_role_has_neither_text_nor_bytes(model):
    tokenizer = model.processor.tokenizer
    (mark,) = words(model, "<user>")
    assert mark not in tokenizer.all_special_ids
    ids = [mark, *words(model, SENTENCE), mark]
    events = told(choice(tokenizer, model.tokens, top=0), ids, tops=[Top(-1.0, []) for _ in ids])
    entries = entries_of(events)
    assert text_of(events) == b"".join(bytes(entry.bytes) for entry in entries).decode() == SENTENCE


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize("stop", [" blue", ",", "27"])
def test_log_probabilities_end_before_a_stop_string(model, stop, size):
    ids = words(model, SENTENCE)
    assert {" blue", ",", " 2", "7"} <= {model.processor.tokenizer.decode(token) for token in ids}
    writer = choice(model.processor.tokenizer, model.tokens, [stop], top=0)
    events = told(writer, ids, tops=[Top(-1.0, []) for _ in ids], size=size)
    joined = "".join(entry.token for entry in entries_of(events))
    place = SENTENCE.index(stop)
    assert text_of(events) == SENTENCE[:place]
    assert joined == (SENTENCE[: place + 1] if stop == "27" else SENTENCE[:place])  # within " 2", which stays


def test_a_character_of_several_tokens_is_emitted_once(model):
    tokenizer = model.processor.tokenizer
    ids = words(model, "漢")
    if len(ids) < 2 or tokenizer.decode(ids) != "漢":
        pytest.skip("this tokenizer has the character whole")
    writer = choice(tokenizer, model.tokens)
    events = [list(writer.read(RowUpdate(0, [token], [], []))) for token in ids]
    assert [text_of(each) for each in events] == [""] * (len(ids) - 1) + ["漢"]


def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer like those converted from SentencePiece: spaces are letters, unknown characters are bytes."""
    pieces = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdx,", "\u2581a"]
    merges = [("\u2581", "a")]
    core = Tokenizer(
        models.BPE({piece: at for at, piece in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True)
    )
    core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")


VOCABULARIES = {"byte-level": lambda: byte_level(["<image>"], "<image>"), "byte fallback": byte_fallback}
TEXTS = ["\u00e9\U0001f642", "a b \u00e9\U0001f642, c", "  a", "\u6f22\u5b57 a", "x\ufffdx", "a , b", "a\n\ta"]
NO_MEMORY = SimpleNamespace(kind_of={}, end_ids={})


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", VOCABULARIES)
def test_bytes_of_tokens_join_to_the_text(kind, text):
    tokenizer = VOCABULARIES[kind]()
    ids = tokenizer.encode(text, add_special_tokens=False)
    alternatives = [(ids[0], -1.0), (ids[-1], -2.0), (tokenizer.eos_token_id, -3.0)]
    writer = choice(tokenizer, NO_MEMORY, top=3)
    events = told(writer, ids, tops=[Top(-1.0, alternatives) for _ in ids])
    entries = entries_of(events)
    assert text_of(events) == text and len(entries) == len(ids)
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == text
    for entry in entries:
        assert entry.token == bytes(entry.bytes).decode("utf-8", "backslashreplace")
        assert entry.top_logprobs[1].bytes == entries[-1].bytes or entry is entries[0]
        assert bytes(entry.top_logprobs[2].bytes).decode() == entry.top_logprobs[2].token == tokenizer.eos_token


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_part_of_a_character_has_its_own_byte(kind):
    tokenizer = VOCABULARIES[kind]()
    ids = tokenizer.encode("\U0001f642", add_special_tokens=False)[-4:]
    spell = TokenBytes(tokenizer)
    assert [list(spell(token)) for token in ids] == [[0xF0], [0x9F], [0x99], [0x82]]
    assert spell(len(tokenizer) + 5) == b""  # embeddings may have more rows than the vocabulary has words


@pytest.mark.parametrize("kind", VOCABULARIES)
@pytest.mark.parametrize("last", ["stop", "length"])
def test_an_answer_ending_inside_a_character_has_its_bytes(kind, last):
    tokenizer = VOCABULARIES[kind]()
    ids = tokenizer.encode("a\U0001f642", add_special_tokens=False)[:-2]
    events = told(choice(tokenizer, NO_MEMORY, top=0), ids, tops=[Top(-1.0, []) for _ in ids], finish=last)
    entries = entries_of(events)
    assert b"".join(bytes(entry.bytes) for entry in entries) == b"a\xf0\x9f"
    assert text_of(events).rstrip("\ufffd") == "a"


@pytest.mark.parametrize("kind", VOCABULARIES)
def test_a_continuation_keeps_its_leading_space(kind):
    tokenizer = VOCABULARIES[kind]()
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in ("x", "x a"))
    assert after[: len(before)] == before
    for given, wanted in ((before, " a"), ([], "a" if kind == "byte fallback" else " a")):
        ids = after[len(before) :]
        writer = choice(tokenizer, NO_MEMORY, top=0, before=given)
        events = told(writer, ids, tops=[Top(-1.0, []) for _ in ids])
        entries = entries_of(events)
        assert text_of(events) == "".join(entry.token for entry in entries) == wanted
