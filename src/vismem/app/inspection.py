"""Everything the viewer shows of one finished answer, as data: what memory looked at, read, and did to the words.

The numbers are those of `evaluation/` (looks, readings, attention, replaying), brought together for one answer; how
they are drawn is for `panels.py`. What a model cannot show is left out, with the reason in one line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vismem.config import KINDS, Kind
from vismem.decoding.text import Detokenizer
from vismem.decoding.trace import Rollout
from vismem.evaluation.attention import SlotAttention, attention_to_slots
from vismem.evaluation.looks import Look, looks
from vismem.evaluation.marks import Piece, pieces
from vismem.evaluation.readings import Reading, readings, segment_start
from vismem.evaluation.replaying import Pair, distributions
from vismem.model import VisMem

LIKELIEST = 8  # tokens listed of the two distributions after an invocation
LARGEST = 640  # pixels of the longer side of the pictures that are kept
FINEST = 128  # cells of the longer side of a heat map, where a picture's patches do not lie on one plain grid
T = TypeVar("T")
Map = NDArray[np.float32]


@dataclass(frozen=True)
class Token:
    """One token of an answer.

    Args:
        text: its text; of the first bytes of a character none, of a special token its name.
        part: `"word"`, an invocation's `"mark"`, its `"end"`, or `"special"` as the end of an answer.
        kind, index: of the invocation, for its mark and its end.
    """

    text: str
    part: Literal["word", "mark", "end", "special"] = "word"
    kind: Kind | None = None
    index: int | None = None


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
        places: how many places each group has, as the last token sees them.
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


@dataclass(frozen=True)
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
        """Plain values for JSON, numbers of maps with four digits; the pictures are left out."""
        return {name: plain(getattr(self, name)) for name in ("tokens", "pieces", "moments", "attention")}


def plain(value: Any) -> Any:
    """Dataclasses and arrays as dictionaries and lists."""
    if isinstance(value, np.ndarray):
        return np.vectorize(lambda each: float(f"{each:.4g}"), otypes=[object])(value).tolist() if value.size else []
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list) else value


@torch.no_grad()
def inspect_answer(
    model: VisMem,
    inputs: Mapping[str, Tensor],
    rollout: Rollout,
    pictures: Sequence[Image.Image],
    **processor_kwargs: Any,
) -> Inspection:
    """Inspects one answer; to be called where nothing else runs the model (`Worker.call`).

    Costs a formation of every memory, one forward with eager attention, and one more forward for each invocation and
    one for all.

    Args:
        model: the model that wrote it.
        inputs: the processor's output for its prompt, one row.
        rollout: the answer, recorded (`Answer.rollout` of a queue with `record=True`).
        pictures: the prompt's pictures, in order; empty for text alone.
        **processor_kwargs: as the prompt's processor was called with, besides padding.

    Raises:
        ValueError: if there are several prompts.

    Example:
        >>> found = worker.call(inspect_answer, model, inputs, answer.rollout, [picture]).result()
        >>> found.moments[0].looked.maps[0].mean
    """
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"one answer is inspected at a time, but the inputs have {len(inputs['input_ids'])} prompts")
    inputs = {"attention_mask": torch.ones_like(inputs["input_ids"]), **inputs}
    tokenizer, ids = model.processor.tokenizer, rollout.tokens.tolist()
    tokens = spelled(ids, tokenizer, model.tokens)
    formed = [i for i, invocation in enumerate(rollout.invocations) if invocation.length]
    kinds = {rollout.invocations[index].kind for index in formed}
    looked, read, seen, pairs = [attempted(lambda: None)] * 4
    if "short" in kinds:
        looked = attempted(
            lambda: {
                look.index: look for look in looks(model, inputs, [rollout.invocations], [pictures], **processor_kwargs)
            }
        )
    if "long" in kinds:
        read = attempted(lambda: {reading.index: reading for reading in readings(model, inputs, [rollout])})
    if formed:
        seen = attempted(lambda: attention_to_slots(model, inputs, [rollout])[0])
        pairs = attempted(lambda: {p.index: p for p in distributions(model, inputs, [rollout], lambda *_: None)})
    moments = []
    for index, invocation in enumerate(rollout.invocations):
        moment = {"index": index, "kind": invocation.kind, "position": invocation.position}
        moment |= {"forced": invocation.forced, "vectors": invocation.length}
        if index not in formed:
            moments.append(
                Moment(**moment, missing=dict.fromkeys(parts(invocation.kind), "this invocation formed no memory"))
            )
            continue
        missing: dict[str, str] = {}

        def part(
            name: str, found: tuple[Any, str], make: Callable[[Any], Any], missing: dict[str, str] = missing
        ) -> Any:
            value, reason = found
            if value is None:
                missing[name] = reason
                return None
            return make(value)

        if invocation.kind == "short":
            moment["looked"] = part("looked", looked, lambda found, i=index: looked_of(found[i], seen[0]))
        else:
            moment["read"] = part("read", read, lambda found, i=index: read_of(found[i], segment_start(rollout, i)))
        moment["later"] = part(
            "later", seen, lambda found, i=index: later_of(found, i, inputs, model.backbone.image_token_id)
        )
        moment["next"] = part("next", pairs, lambda found, i=index: next_of(found[i], rollout, model))
        moments.append(Moment(**moment, missing=missing))
    attention = {}
    if seen[0] is not None:
        for kind in KINDS:
            mine = [slots.sum(-1).mean(0) for slots, of in zip(seen[0].slots, seen[0].kinds, strict=True) if of == kind]
            if mine:
                attention[kind] = sum(mine).tolist()
    kept = [smaller(picture) for picture in pictures]
    return Inspection(tokens, pieces(ids, tokenizer, model.tokens), moments, attention, kept)


def parts(kind: Kind) -> tuple[str, ...]:
    """Names of what there is to show of an invocation."""
    return ("looked" if kind == "short" else "read", "later", "next")


def attempted(find: Callable[[], T]) -> tuple[T | None, str]:
    """What was found, or None and the reason in one line."""
    try:
        return find(), ""
    except ValueError as error:  # what the model cannot show
        return None, " ".join(str(error).split())
    except torch.OutOfMemoryError:
        return None, "the device has not enough memory left to read this answer again"


def smaller(picture: Image.Image) -> Image.Image:
    """A copy of a picture, of `LARGEST` pixels at most."""
    copy = picture.convert("RGB")
    copy.thumbnail((LARGEST, LARGEST))
    return copy


def spelled(ids: Sequence[int], tokenizer: Any, tokens: Any) -> list[Token]:
    """An answer's tokens with their texts, as its timeline shows them.

    Args:
        ids: its ids, invocation and end ids among them.
        tokenizer: of the processor.
        tokens: `model.tokens`.
    """
    words, found, count = Detokenizer(tokenizer), [], 0
    ends, special = {index: kind for kind, index in tokens.end_ids.items()}, set(tokenizer.all_special_ids)
    for each in ids:
        if each in tokens.kind_of:
            found.append(Token("", "mark", tokens.kind_of[each], count))
            count += 1
        elif each in ends:
            found.append(Token("", "end", ends[each], count - 1))
        elif each in special:
            found.append(Token(str(tokenizer.convert_ids_to_tokens(each)), "special"))
        else:
            found.append(Token(words.put(each)))
    return found


def looked_of(look: Look, seen: SlotAttention | None) -> Looked:
    """A look as the viewer shows it; with the answer's attention also what was read of it."""
    got = None if seen is None or not look.starts else seen.reading(look.index)
    maps = []
    for picture in sorted({view.picture for view in look.views if view.picture >= 0}):
        size = map_size(look, picture)
        mean = look.on(picture, size)
        vectors = np.stack([look.on(picture, size, vector=vector) for vector in range(len(look.memory))])
        read = None
        if got is not None and got.shape[1] and any(look.views[view].picture == picture for view, _ in look.starts):
            read = look.read(got.mean((0, 1)), picture, size)
        share = sum(
            float((weights * torch.from_numpy(view.shown)).sum((-2, -1)).mean())
            for view, weights in zip(look.views, look.weights, strict=True)
            if view.picture == picture
        )
        maps.append(HeatMap(picture, share, mean, vectors, read))
    return Looked(maps, {name: float(share.mean()) for name, share in look.shares().items()}, look.layers)


def map_size(look: Look, picture: int) -> tuple[int, int]:
    """Width and height of a picture's maps: one cell for each patch where they cover it exactly, else finer cells."""
    shown = [view for view in look.views if view.picture == picture]
    (wide, high), finest = shown[0].size, 0.0
    for view in shown:
        (left, top, right, bottom), (rows, columns) = view.box, view.grid
        if len(shown) == 1 and np.allclose(view.box, (0, 0, wide, high), atol=0.01 * max(wide, high)):
            return columns, rows
        finest = max(finest, max(wide, high) / min((right - left) / columns, (bottom - top) / rows))
    longer = min(max(2 * round(finest), FINEST // 2), FINEST)
    scale = longer / max(wide, high)
    return max(round(wide * scale), 1), max(round(high * scale), 1)


def read_of(reading: Reading, start: int) -> Read:
    """A reading as the viewer shows it."""
    shares = {name: float(share.mean()) for name, share in reading.shares().items()}
    vectors = reading.weights.mean(0).numpy()
    return Read(start, reading.mean().numpy(), vectors, shares, len(reading.weights))


def later_of(seen: SlotAttention, index: int, inputs: Mapping[str, Tensor], image_token: int) -> Later:
    """What an invocation's slots get from all tokens after it."""
    after, start = seen.after(index).mean(0), seen.positions[index] + 1  # [later, N]
    shares = {name: float(share[:, start:].mean()) for name, share in seen.shares.items()}
    mine = float(after.sum(-1).mean())
    groups = {"this memory": mine, "other memories": max(shares["memory"] - mine, 0.0)}
    groups |= {"picture": shares["visual"], "prompt": shares["prompt"], "answer": shares["answer"]}
    pictures = int((inputs["input_ids"] == image_token).sum())
    lengths = [slots.shape[-1] for slots in seen.slots]
    places = {"this memory": lengths[index], "other memories": sum(lengths) - lengths[index], "picture": pictures}
    places |= {"prompt": int(inputs["attention_mask"].sum()) - pictures, "answer": seen.shares["answer"].shape[1]}
    return Later(start, after.sum(-1).tolist(), after.mean(0).tolist(), groups, places)


def next_of(pair: Pair, rollout: Rollout, model: VisMem) -> NextWord:
    """The likeliest tokens right after an invocation, with its memory and without."""
    given, without = pair.log_probs
    first = rollout.invocations[pair.index].position + 2
    follows = first < len(rollout.tokens) and bool(rollout.sampled[first])
    written = int(rollout.tokens[first]) if follows else -1
    best = torch.maximum(given, without).topk(min(LIKELIEST, len(given))).indices.tolist()
    if follows and written not in best:
        best[-1] = written
    chances = pair.log_probs.exp()
    marks = {*model.tokens.kind_of, *model.tokens.end_ids.values()}
    before = [int(token) for token in rollout.tokens[: first - 2] if int(token) not in marks][-1:]
    found = [
        Candidate(
            word_after(before, token, model), float(chances[0, token]), float(chances[1, token]), token == written
        )
        for token in best
        if chances[:, token].max() > 0
    ]
    found.sort(key=lambda each: -max(each.given, each.without))
    divergence = (chances[0] * (given - without)).masked_fill(chances[0] == 0, 0).sum()
    return NextWord(found, float(divergence), not follows)


def word_after(before: list[int], token: int, model: VisMem) -> str:
    """A token's text as it would be after a word, with its space; of an invocation or a special token its name."""
    tokenizer = model.processor.tokenizer
    if token in model.tokens.kind_of:
        return f"{model.tokens.kind_of[token]}-term memory"
    if token >= len(tokenizer):
        return f"token {token}"
    if token in tokenizer.all_special_ids:
        return str(tokenizer.convert_ids_to_tokens(token))
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) if before else 0 :]
