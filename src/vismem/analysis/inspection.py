"""Inspects one finished answer: what its memories attended to, what attends to them, how they change the next token.

Combines the other modules of `vismem.analysis` into plain data. Parts that a model cannot provide are None, with the
reason in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vismem.analysis.image_geometry import Box
from vismem.analysis.long_attention import long_term_attention
from vismem.analysis.replacement import NextTokenPair, distributions
from vismem.analysis.rollouts import segment_start
from vismem.analysis.short_attention import ShortTermAttention, short_term_attention
from vismem.analysis.slot_attention import SlotAttention, attention_to_slots
from vismem.config import KINDS, Kind
from vismem.data.images import to_rgb
from vismem.decoding.detokenizer import Detokenizer, special_ids
from vismem.decoding.markers import Piece, pieces
from vismem.decoding.trace import Rollout
from vismem.deprecation import renamed
from vismem.model import VisMem

CANDIDATES = 8  # most probable tokens listed after an invocation
LARGEST = 640  # pixels of the longer side of the pictures that are kept
FINEST = 128  # cells of the longer side of a heat map, if the patches do not form one regular grid over the picture
FloatArray = NDArray[np.float32]
T = TypeVar("T")


@dataclass(frozen=True)
class AnswerToken:
    """One token of an answer."""

    text: str  # empty for the first bytes of a character, the token's name for a special token
    part: Literal["word", "mark", "end", "special", "stop"] = "word"  # an invocation's mark and end; the answer's stop
    kind: Kind | None = None  # of the invocation, for its mark and its end
    index: int | None = None


@dataclass(frozen=True)
class ChosenBlock:
    """The block of a picture that a memory vector started from, with `memory_init="attended"`."""

    vector: int
    box: Box  # left, top, right and bottom, as fractions of the picture
    certainty: float  # the choice's probability of it


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Attention over one picture, relative to uniform attention: 1 everywhere means no preference."""

    picture: int  # index among the prompt's pictures
    share: float  # of the memory's attention, on this picture's patches
    mean: FloatArray  # [height, width], averaged over vectors
    vectors: FloatArray  # [N, height, width]
    # [height, width], later tokens' attention to the memory's slots, each slot laid over the region its vector started
    # from; None if vectors start from learned constants or nothing attended to them.
    read: FloatArray | None
    chosen: list[ChosenBlock] = field(default_factory=list)  # in this picture


@dataclass(frozen=True)
class ImageAttention:
    """What a short-term memory attended to, as means over heads and layers."""

    maps: list[HeatMap]  # one for each picture that the vision tower saw
    shares: dict[str, float]  # "picture", "padding", "class token", "query" and "memory", summing to 1
    layers: int  # of the tower, in the mean


@dataclass(frozen=True, eq=False)
class SegmentAttention:
    """What a long-term memory attended to, as means over heads and layers."""

    start: int  # index of the segment's first token among the answer's tokens
    mean: FloatArray  # [z], attention to each of the segment's tokens, averaged over vectors
    vectors: FloatArray  # [N, z]
    shares: dict[str, float]  # "segment", "query" and "memory", summing to 1
    layers: int  # of the language model, in the mean


@dataclass(frozen=True)
class LaterAttention:
    """How much the tokens after an invocation attend to its slots, as means over heads and layers."""

    start: int  # index of the first of them, the end token, among the answer's tokens
    shares: list[float]  # for each of these tokens, the fraction of its attention on the slots
    slots: list[float]  # [N], for each slot, averaged over these tokens
    # Fractions of all their attention, summing to 1: "this memory", "other memories", "picture", "prompt", "answer".
    groups: dict[str, float]
    places: dict[str, int]  # positions in each group before the last token, in the base's window or not


@dataclass(frozen=True)
class Candidate:
    """A possible next token and its probability with the memory in place and without it."""

    text: str
    given: float
    without: float
    written: bool  # whether the answer continues with it


@dataclass(frozen=True)
class NextTokens:
    """The next-token distribution right after an invocation, with the memory and with its vectors removed."""

    candidates: list[Candidate]  # the most probable of either distribution, sorted by the higher probability
    kl: float  # KL(with || without), in nats
    put_in: bool  # whether the following token was not sampled: it was inserted, or the answer ends here


@dataclass(frozen=True)
class InspectedInvocation:
    """One invocation of an answer."""

    index: int  # among the answer's invocations
    kind: Kind
    position: int  # of its token among the answer's tokens
    forced: bool  # whether a policy inserted it
    vectors: int  # N; 0 if no memory was formed
    looked: ImageAttention | None = None  # of a short-term memory
    read: SegmentAttention | None = None  # of a long-term memory
    later: LaterAttention | None = None
    next: NextTokens | None = None
    missing: dict[str, str] = field(default_factory=dict)  # for each of these that is None, the reason in one line


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

        def plain(fields: list[tuple[str, Any]]) -> dict[str, Any]:
            return {k: v.astype(float).round(5).tolist() if isinstance(v, np.ndarray) else v for k, v in fields}

        found = asdict(replace(self, pictures=[]), dict_factory=plain)
        del found["pictures"]
        return found


@torch.no_grad()
def inspect_answer(
    model: VisMem,
    inputs: Mapping[str, Tensor],
    rollout: Rollout,
    pictures: Sequence[Image.Image],
    **processor_kwargs: Any,
) -> Inspection:
    """Inspects one answer. Nothing else may run the model meanwhile; in a server, call it through `Worker.call`.

    Forms every memory again, and needs two forwards plus one for each invocation; one forward runs with eager
    attention. An answer without invocations needs none.

    Args:
        model: the model that wrote it.
        inputs: the processor's output for its prompt, one row.
        rollout: the recorded answer (`Answer.rollout` of a queue with `record=True`).
        pictures: the prompt's pictures in order; empty for a text prompt.
        **processor_kwargs: the arguments of the prompt's processor call, except padding.

    Raises:
        ValueError: if `inputs` has several rows.

    Example:
        >>> found = worker.call(inspect_answer, model, inputs, answer.rollout, [picture]).result()
        >>> found.moments[0].looked.maps[0].mean
    """
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"inspect_answer takes one answer, but the inputs have {len(inputs['input_ids'])} prompts")
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    tokenizer, ids, invocations = model.processor.tokenizer, rollout.tokens.tolist(), rollout.invocations
    formed = [invocation.kind for invocation in invocations if invocation.length]

    seen = attempt(lambda: attention_to_slots(model, inputs, [rollout])[0]) if formed else ""
    slots = seen if isinstance(seen, SlotAttention) else None
    found: dict[str, Any] = {"later": seen}  # the source of each part, or the reason why there is none
    if "short" in formed:
        found["looked"] = attempt(
            lambda: short_term_attention(model, inputs, [invocations], [pictures], **processor_kwargs)
        )
    if "long" in formed:
        found["read"] = attempt(lambda: long_term_attention(model, inputs, [rollout]))
    if formed:
        found["next"] = attempt(lambda: distributions(model, inputs, [rollout], lambda *_: None))

    def part(name: str, index: int) -> Any:
        """The part of one invocation, from its source."""
        if name == "later":
            return later_attention(found[name], index, inputs, model.backbone.image_token_id)
        (one,) = (each for each in found[name] if each.index == index)
        if name == "looked":
            return image_attention(one, slots)
        if name == "next":
            return next_tokens(one, rollout, model)
        shares = {target: float(share.mean()) for target, share in one.shares().items()}
        vectors = one.weights.mean(0).numpy()
        return SegmentAttention(
            segment_start(rollout, index), one.mean().numpy(), vectors, shares, layers=len(one.weights)
        )

    moments = []
    for index, invocation in enumerate(invocations):
        names = ("looked" if invocation.kind == "short" else "read", "later", "next")
        sources = {name: found[name] if invocation.length else "this invocation formed no memory" for name in names}
        missing = {name: source for name, source in sources.items() if isinstance(source, str)}
        moments.append(
            InspectedInvocation(
                index,
                invocation.kind,
                invocation.position,
                invocation.forced,
                invocation.length,
                **{name: part(name, index) for name in names if name not in missing},
                missing=missing,
            )
        )
    return Inspection(
        answer_tokens(ids, tokenizer, model.tokens),
        pieces(ids, tokenizer, model.tokens),
        moments,
        {} if slots is None else attention_by_kind(slots),
        [thumbnail(picture) for picture in pictures],
    )


def attempt(find: Callable[[], T]) -> T | str:
    """The result, or one line that says why there is none."""
    try:
        return find()
    except ValueError as error:  # the model does not provide this part
        return " ".join(str(error).split())
    except torch.OutOfMemoryError:
        return "the device is out of memory; this answer is too long to analyse here"


def thumbnail(picture: Image.Image) -> Image.Image:
    """A copy of at most `LARGEST` pixels a side."""
    copy = to_rgb(picture)
    copy.thumbnail((LARGEST, LARGEST))
    return copy


def attention_by_kind(seen: SlotAttention) -> dict[Kind, list[float]]:
    """By invoked kind, the fraction of each token's attention on all slots of that kind."""
    found = {}
    for kind in KINDS:
        mine = [slots.sum(-1).mean(0) for slots, of in zip(seen.slots, seen.kinds, strict=True) if of == kind]
        if mine:
            found[kind] = torch.stack(mine).sum(0).tolist()
    return found


class TokenReader:
    """Turns the ids of one answer into `AnswerToken`s while it is written; `tokens` is `model.tokens`."""

    def __init__(self, tokenizer: Any, tokens: Any) -> None:
        self.tokenizer, self.words, self.special = tokenizer, Detokenizer(tokenizer), special_ids(tokenizer)
        self.marks, self.ends, self.count = tokens.kind_of, {i: kind for kind, i in tokens.end_ids.items()}, 0

    def read(self, token: int) -> AnswerToken:
        """The next token."""
        if token in self.marks:
            self.count += 1
            return AnswerToken("", "mark", self.marks[token], self.count - 1)
        if token in self.ends:
            return AnswerToken("", "end", self.ends[token], self.count - 1)
        if token in self.special:
            return AnswerToken(str(self.tokenizer.convert_ids_to_tokens(token)), "special")
        return AnswerToken(self.words.put(token))


def answer_tokens(ids: Sequence[int], tokenizer: Any, tokens: Any) -> list[AnswerToken]:
    """A finished answer's tokens with their text; `tokens` is `model.tokens`."""
    reader = TokenReader(tokenizer, tokens)
    return stopped([reader.read(each) for each in ids])


def stopped(tokens: list[AnswerToken]) -> list[AnswerToken]:
    """The tokens of a finished answer, in which a special token at the end is its stop."""
    return [*tokens[:-1], replace(tokens[-1], part="stop")] if tokens and tokens[-1].part == "special" else tokens


def image_attention(attention: ShortTermAttention, seen: SlotAttention | None) -> ImageAttention:
    """A short-term memory's heat maps and shares; with `seen`, also what later tokens read of it."""
    got = None if seen is None or not attention.starts else seen.until_next(attention.index)
    maps = []
    for picture in sorted({view.picture for view in attention.views if view.picture >= 0}):
        size = map_size(attention, picture)
        mean = attention.on(picture, size)
        vectors = np.stack([attention.on(picture, size, vector=vector) for vector in range(len(attention.memory))])
        read = None
        if got is not None and any(attention.views[view].picture == picture for view, _ in attention.starts):
            read = attention.read(got.mean((0, 1)), picture, size)
        share = sum(
            float((weights * torch.from_numpy(view.shown)).sum((-2, -1)).mean())
            for view, weights in zip(attention.views, attention.weights, strict=True)
            if view.picture == picture
        )
        maps.append(HeatMap(picture, share, mean, vectors, read, chosen_blocks(attention, picture)))
    shares = {name: float(share.mean()) for name, share in attention.shares().items()}
    return ImageAttention(maps, shares, attention.layers)


def chosen_blocks(attention: ShortTermAttention, picture: int) -> list[ChosenBlock]:
    """The blocks in one picture that a memory chose to start from."""
    found = []
    for vector, (view, (left, top, right, bottom)) in enumerate(attention.starts):
        if attention.certainty is not None and attention.views[view].picture == picture:
            wide, high = attention.views[view].size
            box = (left / wide, top / high, right / wide, bottom / high)
            found.append(ChosenBlock(vector, box, float(attention.certainty[vector])))
    return found


def map_size(attention: ShortTermAttention, picture: int) -> tuple[int, int]:
    """Width and height of a picture's maps: one cell per patch if a single grid covers it exactly, finer otherwise."""
    shown = [view for view in attention.views if view.picture == picture]
    (wide, high), finest = shown[0].size, 0.0
    for view in shown:
        (left, top, right, bottom), (rows, columns) = view.box, view.grid
        patch = min((right - left) / columns, (bottom - top) / rows)
        if len(shown) == 1 and np.allclose(view.box, (0, 0, wide, high), atol=patch / 4):
            return columns, rows
        finest = max(finest, max(wide, high) / patch)
    longer = min(max(2 * round(finest), FINEST // 2), FINEST)
    scale = longer / max(wide, high)
    return max(round(wide * scale), 1), max(round(high * scale), 1)


def later_attention(seen: SlotAttention, index: int, inputs: Mapping[str, Tensor], image_token: int) -> LaterAttention:
    """The attention of all tokens after an invocation to its slots and to everything else."""
    after, start = seen.after(index).mean(0), seen.positions[index] + 1  # [later, N]
    shares = {name: float(share[:, start:].mean()) for name, share in seen.shares.items()}
    mine = float(after.sum(-1).mean())
    groups = {"this memory": mine, "other memories": max(shares["memory"] - mine, 0.0)}
    groups |= {"picture": shares["visual"], "prompt": shares["prompt"], "answer": shares["answer"]}
    pictures = int((inputs["input_ids"] == image_token).sum())
    lengths = [slots.shape[-1] for slots in seen.slots]
    places = {"this memory": lengths[index], "other memories": sum(lengths) - lengths[index], "picture": pictures}
    places |= {"prompt": int(inputs["attention_mask"].sum()) - pictures, "answer": seen.shares["answer"].shape[1]}
    return LaterAttention(start, after.sum(-1).tolist(), after.mean(0).tolist(), groups, places)


def next_tokens(pair: NextTokenPair, rollout: Rollout, model: VisMem) -> NextTokens:
    """The most probable tokens right after an invocation, with its memory and without."""
    given, without = pair.log_probs
    first = rollout.invocations[pair.index].position + 2
    follows = first < len(rollout.tokens) and bool(rollout.sampled[first])
    written = int(rollout.tokens[first]) if follows else -1
    best = torch.maximum(given, without).topk(min(CANDIDATES, len(given))).indices.tolist()
    if follows and written not in best:
        best[-1] = written
    probabilities = pair.log_probs.exp()
    marks = {*model.tokens.kind_of, *model.tokens.end_ids.values()}
    before = [int(token) for token in rollout.tokens[: first - 2] if int(token) not in marks][-1:]
    found = [
        Candidate(
            text=token_text(before, token, model),
            given=float(probabilities[0, token]),
            without=float(probabilities[1, token]),
            written=token == written,
        )
        for token in best
        if probabilities[:, token].max() > 0
    ]
    found.sort(key=lambda each: -max(each.given, each.without))
    divergence = (probabilities[0] * (given - without)).masked_fill(probabilities[0] == 0, 0).sum()
    return NextTokens(found, float(divergence), not follows)


def token_text(before: list[int], token: int, model: VisMem) -> str:
    """A token's text after the tokens `before`, with its leading space; the name of an invocation or special token."""
    tokenizer = model.processor.tokenizer
    if token in model.tokens.kind_of:
        return f"{model.tokens.kind_of[token]}-term memory"
    if token >= len(tokenizer):
        return f"token {token}"
    if token in special_ids(tokenizer):
        return str(tokenizer.convert_ids_to_tokens(token))
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) if before else 0 :]


__getattr__ = renamed(
    __name__,
    {
        "Token": "AnswerToken",
        "Looked": "ImageAttention",
        "Read": "SegmentAttention",
        "Later": "LaterAttention",
        "NextWord": "NextTokens",
        "Moment": "InspectedInvocation",
        "spelled": "answer_tokens",
    },
)
