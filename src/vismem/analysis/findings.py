"""The inspection of one finished answer as plain data: tokens, invocations, heat maps, attention shares.

Knows no model; `inspection.py` computes the numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vismem.config import Kind
from vismem.decoding.markers import Piece
from vismem.deprecation import renamed

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class AnswerToken:
    """One token of an answer.

    Args:
        text: its text; empty for the first bytes of a character, the token's name for a special token.
        part: `"word"`, an invocation's `"mark"` or `"end"`, `"special"`, or `"stop"` if it ends the answer.
        kind, index: of the invocation, for its two tokens.
    """

    text: str
    part: Literal["word", "mark", "end", "special", "stop"] = "word"
    kind: Kind | None = None
    index: int | None = None


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Attention over one picture, relative to uniform attention: 1 everywhere means no preference.

    Args:
        picture: index among the prompt's pictures.
        share: fraction of the memory's attention on this picture's patches.
        mean: [height, width], averaged over vectors.
        vectors: [N, height, width], one map for each vector.
        read: [height, width], later tokens' attention to the memory's slots, each slot laid over the region its vector
            started from; None if vectors start from learned constants or nothing attended to them.
    """

    picture: int
    share: float
    mean: FloatArray
    vectors: FloatArray
    read: FloatArray | None


@dataclass(frozen=True)
class ImageAttention:
    """What a short-term memory attended to, as means over heads and layers.

    Args:
        maps: one for each picture that the vision tower saw.
        shares: fractions of its attention, summing to 1: `"picture"`, `"padding"`, `"class token"`, `"query"`,
            `"memory"`.
        layers: number of the tower's layers in the mean.
    """

    maps: list[HeatMap]
    shares: dict[str, float]
    layers: int


@dataclass(frozen=True, eq=False)
class SegmentAttention:
    """What a long-term memory attended to, as means over heads and layers.

    Args:
        start: index of the segment's first token among the answer's tokens.
        mean: [z], attention to each of the segment's tokens, averaged over vectors.
        vectors: [N, z], for each vector.
        shares: fractions of its attention, summing to 1: `"segment"`, `"query"`, `"memory"`.
        layers: number of the language model's layers in the mean.
    """

    start: int
    mean: FloatArray
    vectors: FloatArray
    shares: dict[str, float]
    layers: int


@dataclass(frozen=True)
class LaterAttention:
    """How much the tokens after an invocation attend to its slots, as means over heads and layers.

    Args:
        start: index of the first of them, the end token, among the answer's tokens.
        shares: for each of these tokens, the fraction of its attention on the slots.
        slots: [N], for each slot, averaged over these tokens.
        groups: fractions of all their attention, summing to 1: `"this memory"`, `"other memories"`, `"picture"`,
            `"prompt"`, `"answer"`.
        places: number of positions in each group before the last token, whether or not the base's window reaches them.
    """

    start: int
    shares: list[float]
    slots: list[float]
    groups: dict[str, float]
    places: dict[str, int]


@dataclass(frozen=True)
class Candidate:
    """A possible next token and its probability with and without the memory.

    Args:
        text: the token.
        given, without: its probability with the memory in place, and without it.
        written: whether the answer continues with it.
    """

    text: str
    given: float
    without: float
    written: bool


@dataclass(frozen=True)
class NextTokens:
    """The next-token distribution right after an invocation, with the memory and with its vectors removed.

    Args:
        candidates: the most probable tokens of either distribution, sorted by the higher probability.
        kl: KL(with || without), in nats.
        put_in: whether the following token was not sampled: it was inserted, or the answer ends here.
    """

    candidates: list[Candidate]
    kl: float
    put_in: bool


@dataclass(frozen=True)
class InspectedInvocation:
    """One invocation of an answer.

    Args:
        index: among the answer's invocations.
        kind: `"short"` or `"long"`.
        position: of its token among the answer's tokens.
        forced: whether a policy inserted it.
        vectors: N, the number of vectors inserted; 0 if no memory was formed.
        looked, read: attention of a short-term and of a long-term memory.
        later, next: its effect on later tokens and on the next one.
        missing: for each of these that is None, the reason in one line.
    """

    index: int
    kind: Kind
    position: int
    forced: bool
    vectors: int
    looked: ImageAttention | None = None
    read: SegmentAttention | None = None
    later: LaterAttention | None = None
    next: NextTokens | None = None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Inspection:
    """An inspected answer.

    Args:
        tokens: all tokens of the answer.
        pieces: its text and invocations, from `vismem.decoding.markers`.
        moments: its invocations, in order.
        attention: by invoked kind, the fraction of each token's attention on all slots of that kind.
        pictures: the prompt's pictures, large ones scaled down.
    """

    tokens: list[AnswerToken]
    pieces: list[Piece]
    moments: list[InspectedInvocation]
    attention: dict[Kind, list[float]]
    pictures: list[Image.Image] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, without the pictures; maps are rounded to five decimals."""
        return {name: plain(getattr(self, name)) for name in ("tokens", "pieces", "moments", "attention")}


def plain(value: Any) -> Any:
    """Converts dataclasses and arrays to dictionaries and lists."""
    if isinstance(value, np.ndarray):
        return np.round(value.astype(np.float64), 5).tolist()
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


__getattr__ = renamed(
    __name__,
    {
        "Map": "FloatArray",
        "Token": "AnswerToken",
        "Looked": "ImageAttention",
        "Read": "SegmentAttention",
        "Later": "LaterAttention",
        "NextWord": "NextTokens",
        "Moment": "InspectedInvocation",
    },
)
