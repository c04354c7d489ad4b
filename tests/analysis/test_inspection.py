"""What the viewer shows of an answer: the analyses' numbers for any answer, and HTML that shows all of them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import lru_cache
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from contrast import contrast
from PIL import Image

from vismem.analysis.heatmaps import overlaid
from vismem.analysis.inspection import answer_tokens, inspect_answer
from vismem.analysis.long_attention import long_term_attention
from vismem.analysis.replacement import distributions
from vismem.analysis.short_attention import short_term_attention
from vismem.analysis.slot_attention import attention_to_slots
from vismem.app.export import exported
from vismem.app.panels import CSS, answer_html, layer, panel, percent, position_in_words, timeline
from vismem.app.session import AnswerSettings
from vismem.decoding.markers import INK, Piece
from vismem.decoding.policies import Forced
from vismem.decoding.queue import Request, RequestQueue
from vismem.loading import load_model

WRITING = {"return_dict_in_generate": True, "record": True, "do_sample": False}
SHELF = Path(__file__).parents[2] / "examples" / "shelf.png"
QUESTION = "What does row 1 cost with its promotion?"  # the pocket model invokes both kinds by itself
HOSTILE = "<script>alert(1)</script>\"'&<img src=x onerror=alert(2)>"


def written(model, conversation, schedule="learned", **more):
    """Inputs and rollout of one answer."""
    batch = tiny.prompts(model.processor, [conversation])
    out = model.generate(**batch, invocation=schedule, **{"max_new_tokens": 10, **WRITING, **more})
    return batch, out.rollout[0]


@lru_cache
def pocket():
    """The pocket model, a picture, and its answer to a question about it: inputs, rollout, inspection."""
    model, picture = load_model().model, Image.open(SHELF)
    batch, rollout = written(model, tiny.message(QUESTION, picture), max_new_tokens=64)
    return model, picture, batch, rollout, inspect_answer(model, batch, rollout, [picture])


# The data.


def test_inspection_matches_the_analysis_functions():
    model, picture, batch, rollout, found = pocket()
    assert [moment.kind for moment in found.moments] == ["short", "long"]
    assert [moment.position for moment in found.moments] == [i.position for i in rollout.invocations]
    assert not any(moment.missing or moment.forced for moment in found.moments)
    short, long = found.moments
    (look,), (reading,) = (
        short_term_attention(model, batch, [rollout.invocations], [[picture]]),
        long_term_attention(model, batch, [rollout]),
    )
    (seen,) = attention_to_slots(model, batch, [rollout])
    pairs = distributions(model, batch, [rollout], lambda *_: None)

    (heat,) = short.looked.maps
    assert heat.mean.shape == look.views[0].grid and heat.vectors.shape == (16, *heat.mean.shape)
    assert np.allclose(np.kron(heat.mean, np.ones((40, 40))), look.on(0), atol=1e-5)  # 320 pixels, 8 patches
    assert np.allclose(np.kron(heat.vectors[5], np.ones((40, 40))), look.on(0, vector=5), atol=1e-5)
    assert np.allclose(heat.read, look.read(seen.until_next(0).mean((0, 1)), 0, (8, 8)))
    assert heat.share == pytest.approx(short.looked.shares["picture"]) and sum(short.looked.shares.values()) == (
        pytest.approx(1, abs=1e-5)
    )
    assert np.allclose(long.read.mean, reading.mean()) and long.read.vectors.shape == (16, len(reading.tokens))
    assert sum(long.read.shares.values()) == pytest.approx(1, abs=1e-5)
    assert rollout.tokens[long.read.start : long.position + 1].tolist() == reading.tokens

    for moment, pair in zip(found.moments, pairs, strict=True):
        after = seen.after(moment.index)
        assert moment.later.start + len(moment.later.shares) == len(found.tokens)
        assert moment.later.shares == pytest.approx(after.sum(-1).mean(0).tolist(), abs=1e-5)
        assert moment.later.slots == pytest.approx(after.mean((0, 1)).tolist(), abs=1e-5)
        assert sum(moment.later.groups.values()) == pytest.approx(1, abs=1e-4)
        assert moment.later.places == {
            "this memory": 16, "other memories": 16, "picture": 16, "prompt": 15, "answer": len(found.tokens)
        }  # fmt: skip
        p, q = pair.log_probs.exp()
        assert moment.next.kl == pytest.approx(float((p * (p / q).log()).nansum()), abs=1e-4)
        assert sorted((c.given for c in moment.next.candidates), reverse=True)[0] == pytest.approx(float(p.max()))
        assert max(c.without for c in moment.next.candidates) == pytest.approx(float(q.max()))
        (chosen,) = (c for c in moment.next.candidates if c.written)
        assert chosen.text == found.tokens[moment.position + 2].text and not moment.next.put_in
    assert long.next.kl > 0.1  # this memory matters, and removing another would show
    for kind, slots in zip(("short", "long"), seen.slots, strict=True):
        assert found.attention[kind] == pytest.approx(slots.sum(-1).mean(0).tolist(), abs=1e-5)
    assert set(json.loads(json.dumps(found.to_dict()))) == {"tokens", "pieces", "moments", "attention"}


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_every_familys_answers_are_inspected_in_full(family):
    """Two pictures, one of them not square; short, long and short again; a text prompt."""
    model = tiny.equip(family)
    pictures = [tiny.picture(1), tiny.picture(3, (48, 32))]
    schedule = Forced([(0, 1, "short"), (0, 3, "long"), (0, 5, "short")])
    batch, rollout = written(model, tiny.message("Describe both.", *pictures), schedule, eos_token_id=None)
    found = inspect_answer(model, batch, rollout, pictures)
    assert not any(moment.missing for moment in found.moments) and all(moment.forced for moment in found.moments)
    for moment in (found.moments[0], found.moments[2]):
        assert [heat.picture for heat in moment.looked.maps] == [0, 1]
        assert all(heat.vectors.shape == (4, *heat.mean.shape) for heat in moment.looked.maps)
        assert sum(heat.share for heat in moment.looked.maps) == pytest.approx(
            moment.looked.shares["picture"], abs=1e-5
        )
        assert sum(moment.looked.shares.values()) == pytest.approx(1, abs=1e-4)
    assert len(found.moments[1].read.mean) == 3
    json.dumps(found.to_dict())
    for index in range(3):
        Checker(panel(found, index))
    batch, rollout = written(model, tiny.message("A red cup."), Forced([(0, 2, "long")]), eos_token_id=None)
    (moment,) = inspect_answer(model, batch, rollout, []).moments
    assert moment.read and moment.later.places["picture"] == 0 and not moment.missing


def test_chosen_blocks_are_framed():
    """Each vector's block, in its picture and where it lies, with the choice's probability."""
    model = tiny.equip("idefics3", memory_init="attended")
    pictures = [tiny.picture(1), tiny.picture(3)]
    batch, rollout = written(model, tiny.message("Describe both.", *pictures), Forced([(0, 1, "short")]))
    choice = rollout.invocations[0].choice
    found = inspect_answer(model, batch, rollout, pictures)
    blocks = {block.vector: (heat.picture, block) for heat in found.moments[0].looked.maps for block in heat.chosen}
    for vector, (image, row, column) in enumerate(choice.places):
        picture, block = blocks[vector]
        rows, columns = choice.grids[image]
        box = (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows)
        assert picture == image and block.box == pytest.approx(box, abs=0.01)
        assert block.certainty == pytest.approx(float(choice.log_probs[vector].exp()), abs=1e-5)
    html = panel(found, 0)
    Checker(html)
    assert html.count('class="vm-chosen"') >= 2 * len(choice.blocks) and "started from the framed block" in html
    assert json.loads(json.dumps(rollout.invocations[0].to_dict()))["blocks"][0]["image"] == choice.places[0][0]


def test_maps_of_tiles_match_the_attention():
    """Where patches form no regular grid, a map is the same attention at another size."""
    model = tiny.equip("llava_next")
    picture = tiny.picture(3, (48, 32))
    batch, rollout = written(model, tiny.message("look", picture), Forced([(0, 1, "short")]), eos_token_id=None)
    (heat,) = inspect_answer(model, batch, rollout, [picture]).moments[0].looked.maps
    (look,) = short_term_attention(model, batch, [rollout.invocations], [[picture]])
    assert heat.mean.shape == (43, 64) and np.allclose(heat.mean, look.on(0, (64, 43)))
    assert heat.mean.mean() == pytest.approx(1, abs=0.1)


def test_maps_of_whole_pictures_have_one_cell_per_patch():
    model = tiny.equip("qwen2_5_vl")
    picture = tiny.picture(3, (96, 32))
    batch, rollout = written(model, tiny.message("look", picture), Forced([(0, 1, "short")]), eos_token_id=None)
    (heat,) = inspect_answer(model, batch, rollout, [picture]).moments[0].looked.maps
    (look,) = short_term_attention(model, batch, [rollout.invocations], [[picture]])
    rows, columns = look.views[0].grid
    assert heat.mean.shape == (rows, columns) and columns == 3 * rows
    weights = look.mean(0).numpy()
    assert np.allclose(heat.mean, weights / weights.mean(), rtol=0.02)


def test_answers_without_memory_cost_nothing(monkeypatch):
    model, picture, *_ = pocket()
    batch, rollout = written(model, tiny.message("How many rows?", picture), "off")
    monkeypatch.setattr(type(model), "forward", None)
    found = inspect_answer(model, batch, rollout, [picture])
    assert found.moments == [] and found.attention == {} and len(found.tokens) == len(rollout.tokens)
    assert "memory was not invoked" in timeline(found.tokens, found.attention)
    assert "vm-chip" not in answer_html(found.pieces)


def test_an_invocation_without_memory_has_reasons_instead_of_parts():
    model = tiny.equip("qwen2_5_vl")
    schedule = Forced([(0, 2, "short"), (0, 5, "long")])
    schedule.forms = ("long",)
    picture = tiny.picture(0)
    batch, rollout = written(model, tiny.message("look", picture), schedule, eos_token_id=None)
    first, second = inspect_answer(model, batch, rollout, [picture]).moments
    assert first.vectors == 0 and set(first.missing) == {"looked", "later", "next"} and second.read is not None
    assert set(first.missing.values()) == {"this invocation formed no memory"}
    assert second.later.places["other memories"] == 0
    schedule.forms = ()
    batch, rollout = written(model, tiny.message("look", picture), schedule, eos_token_id=None)
    found = inspect_answer(model, batch, rollout, [picture])
    assert [set(moment.missing) for moment in found.moments] == [{"looked", "later", "next"}, {"read", "later", "next"}]
    html = panel(found, 1)
    assert html.count("this invocation formed no memory") == 1 and "Nothing formed" in html and "<table" not in html


def test_missing_parts_have_a_reason():
    """Without the language model's attention weights only looks and next words remain."""
    model = tiny.equip("idefics3")
    picture = tiny.picture(0)
    schedule = Forced([(0, 1, "short"), (0, 4, "long")])
    batch, rollout = written(model, tiny.message("look", picture), schedule, eos_token_id=None)
    attention = model.backbone.language_model.layers[1].self_attn
    usual = attention.forward
    attention.forward = lambda *args, **kwargs: (usual(*args, **kwargs)[0], None)
    found = inspect_answer(model, batch, rollout, [picture])
    short, long = found.moments
    assert short.looked.maps[0].read is None and short.next and long.next and found.attention == {}
    assert set(short.missing) == {"later"} and set(long.missing) == {"read", "later"}
    assert "layer 1 of the language model returns no attention weights" in long.missing["read"]
    html = panel(found, 1)
    assert html.count("Not shown") == 1 and "<table" in html and "Word by word" not in html
    Checker(timeline(found.tokens, found.attention))


def test_wrong_pictures_and_soft_prompts_leave_parts_out_with_a_reason():
    model = tiny.equip("qwen2_5_vl")
    batch, rollout = written(model, tiny.message("look", tiny.picture(0)), Forced([(0, 1, "short")]), eos_token_id=None)
    (moment,) = inspect_answer(model, batch, rollout, [tiny.picture(3, (90, 40))]).moments
    assert "patch grids" in moment.missing["looked"] and "\n" not in moment.missing["looked"] and moment.later
    with pytest.raises(ValueError, match="2 prompts"):
        inspect_answer(model, {name: torch.cat([t, t]) for name, t in batch.items()}, rollout, [])
    model = tiny.equip("qwen2_5_vl", content="soft")
    batch, rollout = written(
        model, tiny.message("look", tiny.picture(0)), Forced([(0, 1, "short"), (0, 2, "long")]), eos_token_id=None
    )
    for moment in inspect_answer(model, batch, rollout, [tiny.picture(0)]).moments:
        assert len(moment.missing) == 1 and "not formed" in next(iter(moment.missing.values()))
        assert moment.later and moment.next


def test_an_answer_may_end_right_after_an_invocation():
    model, picture, batch, *_ = pocket()
    batch = {name: tensor for name, tensor in batch.items() if name != "attention_mask"}
    queue = RequestQueue(model, 2, record=True, do_sample=False, max_new_tokens=64)
    (answer,) = queue.submit(Request(batch))
    while not answer.invocations:
        queue.step()
    queue.cancel([answer])
    found = inspect_answer(model, batch, answer.rollout, [picture])
    (moment,) = found.moments
    assert moment.position == len(found.tokens) - 2 and not moment.missing
    assert moment.later.start == len(found.tokens) - 1 and len(moment.later.shares) == 1
    assert moment.next.put_in and not any(candidate.written for candidate in moment.next.candidates)
    assert "nothing was sampled here" in panel(found, 0)


def test_the_written_token_is_always_a_candidate():
    model, picture, batch, rollout, _ = pocket()
    rare = model.processor.tokenizer.convert_tokens_to_ids("Hello")
    tokens = rollout.tokens.clone()
    tokens[rollout.invocations[1].position + 2] = rare
    moment = inspect_answer(model, batch, replace(rollout, tokens=tokens), [picture]).moments[1]
    (written_,) = (candidate for candidate in moment.next.candidates if candidate.written)
    assert written_.text == "Hello" and len(moment.next.candidates) == 8 and written_ is moment.next.candidates[-1]


def test_answer_tokens_match_the_written_text():
    """Characters of several tokens come with the last of them; nothing is lost, and marks are told apart."""
    model = tiny.equip("qwen2_5_vl")
    tokenizer, tokens = model.processor.tokenizer, model.tokens
    words = tokenizer.encode("a cup, größer 图 🙂", add_special_tokens=False)
    marks = [tokens.invocation_ids["long"], tokens.end_ids["long"]]
    found = answer_tokens([*words[:2], *marks, *words[2:], tokenizer.eos_token_id], tokenizer, tokens)
    assert "".join(token.text for token in found if token.part == "word") == tokenizer.decode(words)
    assert any(token.text == "" and token.part == "word" for token in found)
    assert [(token.part, token.kind, token.index) for token in found[2:4]] == [("mark", "long", 0), ("end", "long", 0)]
    assert found[-1].part == "stop" and found[-1].text == tokenizer.eos_token
    assert answer_tokens([tokenizer.eos_token_id, words[0]], tokenizer, tokens)[0].part == "special"


# The HTML.


class Checker(HTMLParser):
    """Reads a fragment and refuses what is not well-formed, not unique, not labelled, or not self-contained."""

    VOID = ("img", "input", "meta", "br", "link")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, self.open
        assert len(set(self.ids)) == len(self.ids), "an id occurs twice"
        inputs = {a["id"]: a for tag, a in self.tags if tag == "input"}
        assert {a["for"] for tag, a in self.tags if tag == "label"} == set(inputs)
        assert all(a.get("aria-label") and a["type"] == "radio" for a in inputs.values())
        for name in {a["name"] for a in inputs.values()}:
            assert sum("checked" in a for a in inputs.values() if a["name"] == name) == 1, name
        for tag, attributes in self.tags:
            assert tag not in ("script", "iframe", "object", "link")
            assert not any(name.startswith("on") for name in attributes)
            address = attributes.get("src", "data:") if tag == "img" else attributes.get("href", "#")
            assert address.startswith(("data:image/", "#", "data:"))
            assert tag != "img" or "alt" in attributes
        assert not re.search(r"https?://|url\((?!data:)", html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"[ \n]+", " ", " ".join(self.words))


def test_chips_are_buttons_that_a_page_can_listen_to():
    *_, found = pocket()
    for html in (
        answer_html(found.pieces, turn=3, side="memory", selected=1),
        timeline(found.tokens, found.attention, turn=3, side="memory", selected=1),
    ):
        chips = [a for tag, a in Checker(html).tags if tag == "button"]
        assert [(a["data-turn"], a["data-side"], a["data-index"]) for a in chips] == [
            ("3", "memory", "0"),
            ("3", "memory", "1"),
        ]
        assert [a["aria-expanded"] for a in chips] == ["false", "true"]
        assert [a["aria-label"].split(":")[0] for a in chips] == ["short-term memory 1", "long-term memory 2"]
        assert all(a["type"] == "button" for a in chips)
    assert Checker(answer_html(found.pieces)).text.replace(" ", "").startswith("Row1◆\u202fshortdotted●\u202flong")
    assert "vm-cursor" in answer_html([Piece("so far")], writing=True) and "vm-cursor" not in answer_html(found.pieces)
    ticks = [a for tag, a in Checker(timeline(found.tokens, found.attention)).tags if a.get("class") == "vm-tick"]
    assert len(ticks) == len(found.tokens) - 4 and all("%" in a["title"] for a in ticks)
    Checker(timeline([]))
    Checker(timeline(found.tokens[:4]))  # while it is being written


def test_a_panel_describes_everything_in_text():
    *_, found = pocket()
    short, long = Checker(panel(found, 0)), Checker(panel(found, 1))
    for moment, checked in zip(found.moments, (short, long), strict=True):
        for candidate in moment.next.candidates:
            assert percent(candidate.given) in checked.text and candidate.text.strip() in checked.text
        for share in moment.later.groups.values():
            assert percent(share) in checked.text
        assert percent(max(moment.later.shares)) in checked.text
        assert f"{moment.next.kl:.2g} nats" in checked.text
        assert checked.text.count("does not say") + checked.text.count("not what it saw there") >= 1
    rows = re.findall(r"<tr.*?</tr>", panel(found, 1), re.S)[1:]
    for row, candidate in zip(rows, found.moments[1].next.candidates, strict=True):
        cells = [unescape(re.sub(r"<[^>]+>", "", cell)).strip() for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.S)]
        assert cells[0] == percent(candidate.given) and cells[2] == percent(candidate.without)
        assert candidate.text.strip() in cells[1] and ("(written)" in cells[1]) == candidate.written
    segment = re.search(r'class="vm-segment.*?</p>', panel(found, 1), re.S)[0]
    assert "dotted" in segment and "last" not in segment and segment.count("vm-word") == 2
    best = max(found.moments[1].next.candidates, key=lambda c: c.given)
    assert f"With the memory “{best.text.strip()}” comes first ({percent(best.given)})" in long.text
    assert "comes first either way" in short.text
    images = [a for tag, a in short.tags if tag == "img"]
    assert len(images) == 17 + 16 + 1  # large maps, the sheet, what was read
    assert all(a["src"].startswith("data:image/png") for a in images)
    assert "What it read" in long.text and "img" not in [tag for tag, _ in long.tags]


def test_later_tokens_are_shaded_by_their_attention():
    *_, found = pocket()
    later = replace(found.moments[0].later, shares=[0.2] * 14 + [0.0] * 3 + [0.05, 0.0005, 0.0, 0.0004])
    html = panel(replace(found, moments=[replace(found.moments[0], later=later)]), 0)
    assert html.count('<span class="vm-column') == 18 and "3 tokens after these got &lt;0.1" in html
    later = replace(later, shares=[0.0] * 21)
    html = panel(replace(found, moments=[replace(found.moments[0], later=later)]), 0)
    assert html.count('<span class="vm-column') == 12 and "vm-column vm-strong" not in html
    later = replace(later, shares=[0.3])
    assert "ends right after the memory" in panel(replace(found, moments=[replace(found.moments[0], later=later)]), 0)


def test_positions_and_shares_as_text():
    assert position_in_words(0.1, 0.1) == "at the top left" and position_in_words(0.9, 0.5) == "at the bottom"
    assert position_in_words(0.5, 0.5) == "in the middle" and position_in_words(0.5, 0.9) == "in the middle, right"
    heat = np.ones((4, 6), dtype=np.float32)
    heat[3, 0] = 3
    assert layer("", "", heat, 3.0)["place"] == "at the bottom left" and layer("", "", heat, 3.0)["peak"] == 3
    region = np.repeat([0.0, 2.0], 4)[:, None] + np.zeros(4)
    assert layer("", "", region, 2.0)["place"] == "at the bottom"  # its middle, not its first cell
    corner = np.array([[1.0, 1.0], [1.0, 2.0]])
    assert layer("", "", corner, 2.0)["place"] == "at the bottom right"  # a cell lies where its middle does
    assert [percent(share) for share in (0, 0.00001, 0.004, 0.12, 0.9999, 1)] == [
        f"{text}\u202f%" for text in ("0", "<0.1", "0.4", "12", ">99.9", "100")
    ]


def test_panels_start_with_the_mean_and_can_stand_on_one_page():
    *_, found = pocket()
    for index in (0, 1):
        chosen = [a["value"] for tag, a in Checker(panel(found, index)).tags if tag == "input" and "checked" in a]
        assert chosen == ["mean"]
    Checker(panel(found, 0, key="0-memory") + panel(found, 0, key="0-vanilla") + panel(found, 1, key="0-memory"))
    with pytest.raises(ValueError, match="no invocation 2"):
        panel(found, 2)


def hostile():
    """An inspection whose every text looks like HTML."""
    *_, found = pocket()
    tokens = [replace(token, text=HOSTILE) if token.part == "word" else token for token in found.tokens]
    moments = [
        replace(
            moment,
            missing={"later": HOSTILE},
            later=None,
            next=replace(moment.next, candidates=[replace(c, text=HOSTILE) for c in moment.next.candidates]),
        )
        for moment in found.moments
    ]
    pieces = [replace(piece, text=HOSTILE) if piece.kind is None else piece for piece in found.pieces]
    return replace(found, tokens=tokens, moments=moments, pieces=pieces)


def finished(pieces, inspection=None, side="memory", error=None):
    """A finished answer, as an export needs it."""
    return SimpleNamespace(
        side=side,
        pieces=pieces,
        inspection=inspection,
        error=error,
        finish="stop",
        sampled=9,
        seconds=1,
        invocations=[],
    )


def page(*turns, name="pocket"):
    """The export of a conversation: for each turn its question, pictures, answers and settings."""
    found = [
        SimpleNamespace(
            question=question,
            pictures=pictures,
            replies=replies,
            main=replies[-1],
            settings=settings,
            unreached=0,
            over=1,
        )
        for question, pictures, replies, settings in turns
    ]

    def inspect(turn, side):
        (reply,) = (reply for reply in turn.replies if reply.side == side)
        if reply.inspection is None:
            raise ValueError("nothing to inspect")
        return SimpleNamespace(result=lambda: reply.inspection)

    chat = SimpleNamespace(loaded=SimpleNamespace(base=name, checkpoint=name), inspect=inspect)
    return exported(chat, SimpleNamespace(turns=found))


def test_answers_are_escaped():
    _, picture, *_ = pocket()
    bad = hostile()
    reply = finished(bad.pieces, bad, error=HOSTILE)
    for html in (
        answer_html(bad.pieces, side=HOSTILE), timeline(bad.tokens, bad.attention), panel(bad, 0), panel(bad, 1),
        page((HOSTILE, [picture], [reply], AnswerSettings(HOSTILE)), name=HOSTILE),
    ):  # fmt: skip
        assert "<script" not in html.lower() and "<img src=x" not in html and "&lt;script&gt;" in html
        Checker(html)


def test_a_conversation_is_one_page():
    model, picture, _, _, found = pocket()
    batch, rollout = written(model, tiny.message(QUESTION, picture), "off", max_new_tokens=64)
    vanilla = inspect_answer(model, batch, rollout, [picture])
    both = [finished(found.pieces, found), finished(vanilla.pieces, vanilla, "vanilla")]
    cut_off = finished([Piece("Stop"), Piece("", "short", 0)])
    html = page(
        (QUESTION, [picture], both, AnswerSettings()),
        ("And row 2?", [], [cut_off], AnswerSettings(temperature=0.5, seed=7)),
    )
    checked = Checker(html)
    links = [a["href"] for tag, a in checked.tags if tag == "a"]
    assert len(links) == 6 and {link[1:] for link in links} <= set(
        checked.ids
    )  # a chip, a mark and the way back, twice
    assert {"vm-0-0-0", "vm-0-0-1"} <= set(checked.ids)
    assert sum(tag == "button" for tag, _ in checked.tags) == 1  # of the answer that was not inspected
    for text in ("A conversation", "pocket", QUESTION, "And row 2?", "without memory", "model decides", "seed 7"):
        assert text in checked.text
    pictures = [a for tag, a in checked.tags if tag == "img" and a["alt"].startswith("Picture")]
    assert len(pictures) == 1 and len(html) < 400_000
    Checker(page())


def test_colours_contrast_with_their_backgrounds():
    schemes = [
        dict(re.findall(r"(--vm-[\w-]+): ?([^;]+);", block))
        for block in re.findall(r"\{([^{}]*--vm-ink:[^{}]*)\}", CSS)
    ]
    light, automatic, dark = schemes
    assert automatic == dark and set(light) == set(dark) and light != dark
    assert {light["--vm-short"], light["--vm-long"]} == set(INK.values())
    for scheme in (light, dark):
        on = {name: scheme[f"--vm-{name}"] for name in ("card", "well", "tint-short", "tint-long")}
        for ground in ("card", "well"):
            assert contrast(scheme["--vm-ink"], on[ground]) >= 7 and contrast(scheme["--vm-faint"], on[ground]) >= 4.5
        for kind in ("short", "long"):
            for ground in ("card", f"tint-{kind}"):
                assert contrast(scheme[f"--vm-{kind}"], on[ground]) >= 4.5, (kind, ground)
        assert contrast(scheme["--vm-neutral"], on["card"]) >= 3 and contrast(scheme["--vm-focus"], on["card"]) >= 3
        heat = [int(value) for value in scheme["--vm-heat"].split()]  # under words at three quarters at most
        card = [int(on["card"][i : i + 2], 16) for i in (1, 3, 5)]
        hot = "#" + "".join(f"{round(0.75 * h + 0.25 * c):02x}" for h, c in zip(heat, card, strict=True))
        assert contrast(scheme["--vm-ink"], hot) >= 4.5


# In a browser.


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium on the PATH")
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    _, picture, _, _, found = pocket()
    path = tmp_path_factory.mktemp("page") / "conversation.html"
    turn = (QUESTION, [picture], [finished(found.pieces, found)], AnswerSettings())
    path.write_text(page(turn, turn), encoding="utf-8")
    return path.as_uri()


def test_panels_open_and_vectors_are_chosen_by_keyboard(browser, saved):
    tab = browser.new_page(viewport={"width": 1100, "height": 900})
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(saved)
    assert not tab.locator("#vm-0-0-0").is_visible()
    chip = tab.locator(".vm-answer .vm-chip").first
    chip.focus()
    tab.keyboard.press("Enter")
    shown = tab.locator("#vm-0-0-0")
    assert shown.is_visible() and not tab.locator("#vm-1-0-0").is_visible()
    assert shown.locator(".vm-large:visible .vm-note").inner_text().startswith("Mean of all vectors")
    tab.locator("#vm-0-0-0-picture-1-mean").focus()
    for _ in range(3):
        tab.keyboard.press("ArrowRight")
    assert shown.locator(".vm-large:visible").count() == 1
    assert shown.locator(".vm-large:visible .vm-note").inner_text().startswith("Vector 3")
    shown.locator("label[for=vm-0-0-0-picture-1-7]").click()
    assert shown.locator(".vm-large:visible .vm-note").inner_text().startswith("Vector 7")
    tab.emulate_media(media="print")
    assert all(tab.locator(f"#vm-{turn}-0-{index}").is_visible() for turn in (0, 1) for index in (0, 1))
    assert all(url.startswith(("file:", "data:")) for url in asked)
    tab.close()


def test_maps_match_overlaid(browser, saved, tmp_path):
    _, picture, _, _, found = pocket()
    tab = browser.new_page(viewport={"width": 1100, "height": 900})
    tab.goto(saved + "#vm-0-0-0")
    read = tab.locator("#vm-0-0-0 .vm-read .vm-map")
    read.screenshot(path=tmp_path / "map.png")
    (heat,) = found.moments[0].looked.maps
    most = max(2.0, float(heat.mean.max()), float(heat.read.max()))
    drawn = Image.open(tmp_path / "map.png").convert("RGB")
    wanted = overlaid(picture.convert("RGB"), heat.read, most, 560).resize(drawn.size, Image.Resampling.LANCZOS)
    small = [np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=float) for image in (drawn, wanted)]
    apart = np.abs(small[0] - small[1])[1:-1, 1:-1]
    assert apart.mean() < 2 and apart.max() < 12
    tab.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_narrow_screens(browser, saved, scheme):
    tab = browser.new_page(viewport={"width": 320, "height": 640}, color_scheme=scheme)
    for index in (0, 1):
        tab.goto(saved + f"#vm-0-0-{index}")
        assert tab.evaluate("document.documentElement.scrollWidth") <= 320
        size = tab.locator(f"#vm-0-0-{index} .vm-large:visible").bounding_box()
        assert size["width"] >= 240
    ink = tab.evaluate("getComputedStyle(document.querySelector('#vm-0-0-1 h3')).color")
    assert ink == ("rgb(27, 31, 36)" if scheme == "light" else "rgb(232, 234, 236)")
    tab.close()
