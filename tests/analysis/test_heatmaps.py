"""Markers and heat maps of an answer: each in its right place, and figures that can be opened."""

from __future__ import annotations

import base64
import io
import sys

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from vismem.analysis.heatmaps import (
    Panel,
    data_url,
    enlarged,
    figure_of,
    overlaid,
    png,
    scale_end,
    strength,
)
from vismem.analysis.short_attention import short_term_attention
from vismem.cli.streaming import Streamer, TerminalWriter
from vismem.decoding.markers import CSS, Piece, html, pieces, plain
from vismem.decoding.policies import Forced

PICTURE = tiny.picture(3, (48, 32))


@pytest.fixture(scope="module")
def model():
    return tiny.equip("idefics3")


def test_markers_match_the_terminals(model):
    """The same text, mark for mark, as `vismem ask` streams; characters of several tokens stay whole."""
    tokenizer, tokens = model.processor.tokenizer, model.tokens
    invoked = {kind: [tokens.invocation_ids[kind], tokens.end_ids[kind]] for kind in ("short", "long")}
    words = [tokenizer.encode(text, add_special_tokens=False) for text in ("A red ", "cup é 漢 <b>", " look", "!")]
    ids = [*words[0], *invoked["short"], *words[1], *invoked["long"], *invoked["short"], *words[2], *words[3]]
    written = io.StringIO()
    streamer = Streamer(tokenizer, tokens, TerminalWriter(written))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    found = pieces([*ids, tokenizer.eos_token_id], tokenizer, tokens)
    assert plain(found) == written.getvalue() == "A red [◆short]cup é 漢 <b>[●long][◆short] look!"
    assert found[1] == Piece("", "short", 0) and [p.index for p in found if p.kind] == [0, 1, 2]
    page = html(found)
    assert "cup é 漢 &lt;b&gt;<span" in page and "<b>" not in page
    assert page.count('class="memory short"') == 2 and 'class="memory long" data-invocation="1"' in page
    assert ".memory.short" in CSS and ".memory.long" in CSS
    assert pieces([], tokenizer, tokens) == []


def test_a_marker_inside_a_character_does_not_break_it(model):
    tokenizer, tokens = model.processor.tokenizer, model.tokens
    parts = tokenizer.encode("漢", add_special_tokens=False)
    assert len(parts) > 1
    ids = [parts[0], tokens.invocation_ids["long"], tokens.end_ids["long"], *parts[1:]]
    assert plain(pieces(ids, tokenizer, tokens)) == "[●long]漢"
    assert plain(pieces(ids[:1], tokenizer, tokens)) == "\ufffd"


def test_heat_is_painted_at_its_position():
    heat = np.zeros((4, 6), dtype=np.float32)
    heat[1, 4] = 8
    found = np.asarray(overlaid(PICTURE, heat, side=240)).astype(int)
    assert found.shape == (160, 240, 3)
    hot = found[..., 0] - found[..., 2] > 40
    assert hot[40:80, 160:200].all() and hot.sum() == 40 * 40
    cold = found[~hot]
    assert (cold[:, 0] == cold[:, 2]).all()  # grey
    half = np.asarray(overlaid(PICTURE, heat, most=16, side=240)).astype(int)
    assert (half[..., 0] - half[..., 2])[40:80, 160:200].mean() < (found[..., 0] - found[..., 2])[40:80, 160:200].mean()


def test_colour_starts_above_uniform_attention():
    flat = np.ones((4, 6), dtype=np.float32) + 0.01 * np.eye(4, 6, dtype=np.float32)
    plain = np.asarray(overlaid(PICTURE, np.ones((4, 6)))).astype(int)
    assert np.ptp(plain, axis=-1).max() == 0 and np.array_equal(plain, np.asarray(overlaid(PICTURE, np.zeros((4, 6)))))
    assert np.abs(np.asarray(overlaid(PICTURE, flat)).astype(int) - plain).max() <= 3
    assert strength(np.array([0.2, 1.0, 2.0, 3.0, 9.0]), 3.0).tolist() == [0, 0, 0.5, 1, 1]
    assert scale_end([flat]) == 2 and scale_end([flat, 3 * flat]) == pytest.approx(3.03) and scale_end([flat], 5) == 5


def test_small_pictures_keep_hard_pixels_and_large_ones_shrink():
    small = np.asarray(enlarged(PICTURE, 256))
    assert small.shape == (160, 240, 3)
    assert np.array_equal(small[::5, ::5], np.asarray(PICTURE)) and np.array_equal(small[4::5, 4::5], small[::5, ::5])
    assert enlarged(Image.new("L", (1000, 400)), 256).size == (256, 102)
    assert enlarged(Image.new("RGB", (2000, 2)), 256).size == (256, 1)


def test_figures_are_plotted_and_saved(model, tmp_path):
    batch = tiny.prompts(model.processor, [tiny.message("look", PICTURE)])
    writing = {"return_dict_in_generate": True, "record": True, "max_new_tokens": 4, "do_sample": False}
    out = model.generate(**batch, invocation=Forced([(0, 1, "short")]), **writing)
    (look,) = short_term_attention(model, batch, out.invocations, [[PICTURE]])
    figure = figure_of(PICTURE, [Panel("picture"), None, Panel("look", look.on(0))], columns=2)
    assert [axis.get_title() for axis in figure.axes[:4]] == ["picture", "", "look", ""]
    drawn = png(figure, tmp_path / "look.png")
    assert drawn == (tmp_path / "look.png").read_bytes() == png(figure)  # the same picture is the same file
    width, height = Image.open(io.BytesIO(drawn)).size
    assert 400 < width < 600 and 200 < height < 400
    url = data_url(overlaid(PICTURE, look.on(0)))
    head, _, rest = url.partition(",")
    assert head == "data:image/png;base64" and Image.open(io.BytesIO(base64.b64decode(rest))).size == (240, 160)
    noisy = Image.effect_noise((64, 64), 60)
    assert data_url(noisy).startswith("data:image/jpeg;base64,")  # smaller
    assert data_url(noisy.convert("RGBA")).startswith("data:image/png;base64,")


def test_missing_matplotlib_names_the_extra(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"pip install 'vismem\[eval\]'"):
        figure_of(PICTURE, [Panel("picture")])
    assert overlaid(PICTURE, np.ones((2, 2))).size == (240, 160)  # needs none
