"""What the viewer shows of one finished answer, as plain data: tokens, invocations, maps, shares and chances.

Nothing here knows a model. How the numbers are found is said in `inspection.py`, how they are drawn in `panels.py`.
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

Map = NDArray[np.float32]


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Args:
        text: its text; of the first bytes of a character none, of a special token its name.
        part: `"word"`, an invocation's `"mark"`, its `"end"`, `"special"`, or `"stop"` for one that ends the answer.
        kind, index: of the invocation, for its mark and its end.
    """

    text: str
    part: Literal["word", "mark", "end", "special", "stop"] = "word"
    kind: Kind | None = None
    index: int | None = None


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Attention over one picture, in multiples of the even share, so that 1 everywhere is no preference.

    Args:
        picture: index among the prompt's pictures.
        share: of memory's attention that went to this picture's patches, 0 to 1.
        mean: [height, width], of all vectors.
        vectors: [N, height, width], of each.
        read: [height, width], what the answer read of this memory, each vector laid where it started; None where
            vectors start nowhere, or nothing was read.
    """

    picture: int
    share: float
    mean: Map
    vectors: Map
    read: Map | None


@dataclass(frozen=True)
class Looked:
    """Where a short-term memory looked.

    Args:
        maps: one for each picture that the vision tower saw.
        shares: where its attention went, 1 in all: `"picture"`, `"padding"`, `"class token"`, `"query"`, `"memory"`.
        layers: of the tower, which everything is a mean over.
    """

    maps: list[HeatMap]
    shares: dict[str, float]
    layers: int


@dataclass(frozen=True, eq=False)
class Read:
    """What a long-term memory read.

    Args:
        start: the segment's first token among the answer's; it has as many as there are weights.
        mean: [z], attention to each of the segment's tokens, 0 to 1, mean over vectors.
        vectors: [N, z], of each.
        shares: where attention went, 1 in all: `"segment"`, `"query"`, `"memory"`.
        layers: of the language model, which everything is a mean over.
    """

    start: int
    mean: Map
    vectors: Map
    shares: dict[str, float]
    layers: int


@dataclass(frozen=True)
class Later:
    """How much the tokens after an invocation attend to its slots, mean over heads and layers.

    Args:
        start: the first of them among the answer's tokens, which is the end token.
        shares: of each token's attention, as it is read.
        slots: [N], what each slot got, mean over these tokens.
        groups: where all of their attention went, 1 in all: `"this memory"`, `"other memories"`, `"picture"`,
            `"prompt"`, `"answer"`.
        places: how many places each group has before the last token, within the base's window or not.
    """

    start: int
    shares: list[float]
    slots: list[float]
    groups: dict[str, float]
    places: dict[str, int]


@dataclass(frozen=True)
class Candidate:
    """A token that might come next: its probability with the memory in place and without it.

    Args:
        text: the token.
        given, without: the probabilities.
        written: whether the answer has it there.
    """

    text: str
    given: float
    without: float
    written: bool


@dataclass(frozen=True)
class NextWord:
    """The next-token distribution right after an invocation, with the memory and with its vectors taken out.

    Args:
        candidates: the likeliest tokens of either, by the higher probability.
        kl: KL(with || without), in nats.
        put_in: whether the token that follows was put in, not sampled, or nothing follows.
    """

    candidates: list[Candidate]
    kl: float
    put_in: bool


@dataclass(frozen=True)
class Moment:
    """One invocation of an answer.

    Args:
        index: among the answer's invocations.
        kind: `"short"` or `"long"`.
        position: of its token among the answer's tokens.
        forced: whether a policy put it in.
        vectors: N, how many vectors were inserted; 0 if nothing was formed.
        looked: of a short memory; read: of a long one; later, next: of both. None where `missing` says why.
        missing: for each part that is not there the reason, in one line.
    """

    index: int
    kind: Kind
    position: int
    forced: bool
    vectors: int
    looked: Looked | None = None
    read: Read | None = None
    later: Later | None = None
    next: NextWord | None = None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Inspection:
    """What the viewer shows of one finished answer.

    Args:
        tokens: all tokens of the answer.
        pieces: its words and marks, as `evaluation.marks` gives them.
        moments: its invocations, in order.
        attention: for each kind that was invoked, the share of each token's attention that all its slots got.
        pictures: the prompt's pictures, the large ones smaller than they were.
    """

    tokens: list[Token]
    pieces: list[Piece]
    moments: list[Moment]
    attention: dict[Kind, list[float]]
    pictures: list[Image.Image] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, numbers of maps with five decimals; the pictures are left out."""
        return {name: plain(getattr(self, name)) for name in ("tokens", "pieces", "moments", "attention")}


def plain(value: Any) -> Any:
    """Dataclasses and arrays as dictionaries and lists."""
    if isinstance(value, np.ndarray):
        return np.round(value.astype(np.float64), 5).tolist()
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value
