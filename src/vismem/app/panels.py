"""An inspected answer as HTML: chips in the text, a timeline of its tokens, and a panel for each invocation.

Fragments need `CSS` and nothing else: no script, file or network. They work without colour, by keyboard, in light and
dark, and on narrow screens. `analysis/inspection.py` defines the numbers; `export.py` makes whole pages.

A heat map is a small transparent image over one pale grey picture. Blended with `mix-blend-mode: multiply` they look
like `analysis.heatmaps.overlaid`, at a fraction of the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import numpy as np
from PIL import Image

from vismem.analysis.heatmaps import HOT, PALE, data_url, enlarged, scale_end, strength
from vismem.analysis.inspection import AnswerToken, ChosenBlock, FloatArray, HeatMap, InspectedInvocation, Inspection
from vismem.analysis.templates import templates_of
from vismem.config import Kind
from vismem.decoding.markers import SHAPES, Piece

CSS: str = files("vismem.app").joinpath("templates/viewer.css").read_text(encoding="utf-8")
MAP_SIDE = 560  # pixels, longer side of the picture under a map: twice its size on the page
MAX_WORDS = 240  # tokens that a panel shows one by one
LABELLED = 3  # words labelled with their value
MIN_LATER = 12  # later tokens shown at least; then up to the last above MIN_SHARE
MIN_SHARE = 0.001
SHARES = {
    "picture": "picture",
    "padding": "padding around it",
    "class token": "class token",
    "segment": "words of the segment",
    "query": "its query",
    "memory": "itself",
}

environment = templates_of("vismem.app")


def answer_html(
    pieces: Sequence[Piece],
    *,
    turn: int = 0,
    side: str = "memory",
    selected: int | None = None,
    links: str | None = None,
    writing: bool = False,
) -> str:
    """An answer's text, with a chip at each invocation.

    Args:
        pieces: from `decoding.markers.pieces`, or `Inspection.pieces`.
        turn, side: the chips' `data-turn` and `data-side`; `data-index` is the invocation's index.
        selected: index of the invocation whose panel is open.
        links: makes chips links to `#<links>-<index>` instead of buttons, for pages without a script.
        writing: the answer is still being written; shows a cursor at its end.
    """
    return environment.get_template("answer.html").render(
        pieces=pieces, turn=turn, side=side, selected=selected, links=links, writing=writing, shapes=SHAPES
    )


def timeline(
    tokens: Sequence[AnswerToken],
    attention: Mapping[Kind, Sequence[float]] | None = None,
    *,
    turn: int = 0,
    side: str = "memory",
    selected: int | None = None,
    links: str | None = None,
) -> str:
    """A strip of an answer's tokens with a chip at each invocation, and how much each token attended to memory.

    `attention` is `Inspection.attention`; None shows none. The other arguments are those of `answer_html`.
    """
    attention = attention or {}
    none = [0.0] * len(tokens)
    short, long = attention.get("short", none), attention.get("long", none)
    return environment.get_template("timeline.html").render(
        columns=list(zip(tokens, short, long, strict=True)),
        count=sum(token.part == "mark" for token in tokens),
        most=max(map(sum, zip(short, long, strict=True)), default=0.0),
        turn=turn,
        side=side,
        selected=selected,
        links=links,
        shapes=SHAPES,
    )


def panel(inspection: Inspection, index: int, *, key: str = "0") -> str:
    """Everything about one invocation, as one fragment; `key` identifies the answer on the page.

    Raises:
        ValueError: if there is no such invocation.
    """
    if not 0 <= index < len(inspection.moments):
        raise ValueError(f"there is no invocation {index}; the answer has {len(inspection.moments)}")
    moment, pictures = inspection.moments[index], inspection.pictures
    return environment.get_template("panel.html").render(
        moment=moment,
        key=f"vm-{key}-{index}",
        shape=SHAPES[moment.kind],
        before="".join(token.text for token in inspection.tokens[: moment.position] if token.part == "word")[-60:],
        maps=[map_context(each, pictures[each.picture]) for each in moment.looked.maps] if moment.looked else [],
        total=len(inspection.moments),
        several=len(pictures) > 1,
        share_names=SHARES,
        words=segment_words(inspection, moment),
        unread=0 if moment.read is None else max(len(moment.read.mean) - MAX_WORDS, 0),
        later=later_tokens(inspection, moment),
    )


# Values for the template.


def map_context(found: HeatMap, picture: Image.Image) -> dict[str, Any]:
    """A short-term memory's maps over one picture, for the panel's template."""
    grey = picture if MAP_SIDE // 2 <= max(picture.size) <= MAP_SIDE else enlarged(picture, MAP_SIDE)
    pale = (255 * (1 - PALE * (1 - np.asarray(grey.convert("L"), dtype=np.float64) / 255))).round().astype(np.uint8)
    most = scale_end([found.mean, *([] if found.read is None else [found.read])])
    each = scale_end(list(found.vectors))
    blocks = {block.vector: block for block in found.chosen}
    return {
        "ground": data_url(Image.fromarray(pale)),
        "ratio": picture.height / picture.width,
        "number": found.picture + 1,
        "share": found.share,
        "views": [layer("mean of all vectors", "mean", found.mean, most, found.chosen)]
        + [
            layer(f"vector {i + 1}", str(i + 1), heat, each, [blocks[i]] if i in blocks else [])
            for i, heat in enumerate(found.vectors)
        ],
        "read": None if found.read is None else layer("what the answer read", "read", found.read, most),
    }


def layer(title: str, name: str, heat: FloatArray, end: float, chosen: Sequence[ChosenBlock] = ()) -> dict[str, Any]:
    """One map: its image, its scale, where its maximum is, in words, and the blocks that its vectors started from."""
    row, column = np.argwhere(heat >= heat.max() * (1 - 1e-4)).mean(0)  # centre of the maximum
    return {
        "title": title,
        "name": name,
        "url": data_url(painted(heat, end)),
        "end": end,
        "peak": float(heat.max()),
        "place": position_in_words((row + 0.5) / heat.shape[0], (column + 0.5) / heat.shape[1]),
        "chosen": chosen,
    }


def painted(heat: FloatArray, end: float) -> Image.Image:
    """A map as a small image of one colour, opaque where attention is far above the even share."""
    colour = np.broadcast_to(HOT, (*heat.shape, 3))
    return Image.fromarray(
        (255 * np.concatenate([colour, strength(heat, end)[..., None]], -1)).round().astype(np.uint8), "RGBA"
    )


def position_in_words(down: float, across: float) -> str:
    """A point of a picture in words; both coordinates are in [0, 1]."""
    rows, columns = ("at the top", "", "at the bottom"), ("left", "middle", "right")
    row, column = rows[min(int(3 * down), 2)], columns[min(int(3 * across), 2)]
    if not row:
        return "in the middle" if column == "middle" else f"in the middle, {column}"
    return row if column == "middle" else f"{row} {column}"


def segment_words(inspection: Inspection, moment: InspectedInvocation) -> list[dict[str, Any]]:
    """A long-term memory's segment: its last words with their attention, for the mean and for each vector."""
    if moment.read is None:
        return []
    end = moment.read.start + len(moment.read.mean)
    rows = [("mean of all vectors", "mean", moment.read.mean)]
    rows += [(f"vector {i + 1}", str(i + 1), row) for i, row in enumerate(moment.read.vectors)]
    found = []
    for title, name, weights in rows:
        shares = (weights / max(float(weights.mean()), 1e-12))[-MAX_WORDS:]  # 1 is an even share within the segment
        most, strongest = max(2.0, float(shares.max())), set(np.argsort(-shares)[:LABELLED].tolist())
        words = [
            {"token": token, "times": float(share), "strength": float(share) / most, "strong": i in strongest}
            for i, (token, share) in enumerate(zip(inspection.tokens[end - len(shares) : end], shares, strict=True))
        ]
        found.append({"title": title, "name": name, "words": words})
    return found


def later_tokens(inspection: Inspection, moment: InspectedInvocation) -> dict[str, Any] | None:
    """Attention of each later token to the invocation's slots, up to the last token that attended to them."""
    if moment.later is None:
        return None
    every, start = moment.later.shares, moment.later.start
    most = max(every)
    last = max((i for i, share in enumerate(every) if share >= MIN_SHARE), default=0)
    shown = every[: min(max(last + 1, MIN_LATER), MAX_WORDS)]
    strongest = set(np.argsort([-share for share in shown])[:LABELLED].tolist())
    words = [
        {
            "token": token,
            "share": share,
            "height": share / most if most else 0.0,
            "strong": i in strongest and share >= MIN_SHARE,
        }
        for i, (token, share) in enumerate(zip(inspection.tokens[start:], shown, strict=False))
    ]
    rest = every[len(shown) :]
    return {"most": most, "words": words, "rest": len(rest), "rest_most": max(rest, default=0.0)}


def token_label(token: AnswerToken) -> str:
    """A token's description for titles and screen readers."""
    if token.part == "mark":
        return f"{token.kind}-term memory {(token.index or 0) + 1}"
    if token.part == "word":
        return visible(token.text) or "part of a character"
    return {"end": "end of the memory", "stop": "end of the answer"}.get(token.part, token.text)


def visible(text: str) -> str:
    """A token's text without leading spaces, line ends and tabs as symbols."""
    return text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥").strip(" ") or ("space" if text else "")


def percent(share: float) -> str:
    """A share as a percentage, with one decimal below 10 %.

    Example:
        >>> percent(0.1234), percent(0.00002)
        ('12 %', '<0.1 %')
    """
    if 0 < share < 0.001:
        return "<0.1\u202f%"
    if share > 0.999 and share < 1:
        return ">99.9\u202f%"
    digits = 0 if share >= 0.0995 or share == 0 else 1
    return f"{100 * share:.{digits}f}\u202f%"


def times(value: float) -> str:
    """A multiple of the even share."""
    return f"{value:.1f}\u00d7" if value < 9.95 else f"{value:.0f}\u00d7"


environment.filters |= {"label": token_label, "percent": percent, "times": times, "visible": visible}
