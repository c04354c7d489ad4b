"""Inspects one finished answer: what its memories attended to, what attends to them, how they change the next token.

Combines the other modules of `vismem.analysis` into the plain data of `findings.py`. Parts that a model cannot provide
are None, with the reason in one line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vismem.analysis.findings import (
    AnswerToken,
    Candidate,
    HeatMap,
    ImageAttention,
    InspectedInvocation,
    Inspection,
    LaterAttention,
    NextTokens,
    SegmentAttention,
)
from vismem.analysis.long_attention import LongTermAttention, long_term_attention
from vismem.analysis.replacement import NextTokenPair, distributions
from vismem.analysis.rollouts import segment_start
from vismem.analysis.short_attention import ShortTermAttention, short_term_attention
from vismem.analysis.slot_attention import SlotAttention, attention_to_slots
from vismem.config import KINDS, Kind
from vismem.data.images import to_rgb
from vismem.decoding.detokenizer import Detokenizer, special_ids
from vismem.decoding.markers import pieces
from vismem.decoding.trace import Rollout
from vismem.deprecation import renamed
from vismem.model import VisMem

CANDIDATES = 8  # most probable tokens listed after an invocation
LARGEST = 640  # pixels of the longer side of the pictures that are kept
FINEST = 128  # cells of the longer side of a heat map, if the patches do not form one regular grid over the picture
PARTS: dict[Kind, tuple[str, ...]] = {"short": ("looked", "later", "next"), "long": ("read", "later", "next")}
T = TypeVar("T")


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
    formed = {invocation.kind for invocation in invocations if invocation.length}

    def short_term() -> dict[int, ShortTermAttention]:
        found = short_term_attention(model, inputs, [invocations], [pictures], **processor_kwargs)
        return {each.index: each for each in found}

    found: dict[str, tuple[Any, str]] = {}  # for each part its data by invocation, or None and the reason
    if "short" in formed:
        found["looked"] = attempt(short_term)
    if "long" in formed:
        found["read"] = attempt(lambda: {each.index: each for each in long_term_attention(model, inputs, [rollout])})
    if formed:
        found["later"] = attempt(lambda: attention_to_slots(model, inputs, [rollout])[0])
        found["next"] = attempt(lambda: {p.index: p for p in distributions(model, inputs, [rollout], lambda *_: None)})
    seen: SlotAttention | None = found["later"][0] if formed else None
    make: dict[str, Callable[[Any, int], Any]] = {
        "looked": lambda every, index: image_attention(every[index], seen),
        "read": lambda every, index: segment_attention(every[index], segment_start(rollout, index)),
        "later": lambda slots, index: later_attention(slots, index, inputs, model.backbone.image_token_id),
        "next": lambda every, index: next_tokens(every[index], rollout, model),
    }
    moments = []
    for index, invocation in enumerate(invocations):
        shown, missing = {}, {}
        for part in PARTS[invocation.kind]:
            source, reason = found[part] if invocation.length else (None, "this invocation formed no memory")
            if source is None:
                missing[part] = reason
            else:
                shown[part] = make[part](source, index)
        moments.append(
            InspectedInvocation(
                index,
                invocation.kind,
                invocation.position,
                invocation.forced,
                invocation.length,
                **shown,
                missing=missing,
            )
        )
    return Inspection(
        answer_tokens(ids, tokenizer, model.tokens),
        pieces(ids, tokenizer, model.tokens),
        moments,
        {} if seen is None else attention_by_kind(seen),
        [thumbnail(picture) for picture in pictures],
    )


def attempt(find: Callable[[], T]) -> tuple[T | None, str]:
    """The result and "", or None and the reason in one line."""
    try:
        return find(), ""
    except ValueError as error:  # the model does not provide this part
        return None, " ".join(str(error).split())
    except torch.OutOfMemoryError:
        return None, "the device is out of memory; this answer is too long to analyse here"


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


def answer_tokens(ids: Sequence[int], tokenizer: Any, tokens: Any) -> list[AnswerToken]:
    """An answer's tokens with their text; `tokens` is `model.tokens`."""
    words, found, count = Detokenizer(tokenizer), [], 0
    ends, special = {index: kind for kind, index in tokens.end_ids.items()}, special_ids(tokenizer)
    for each in ids:
        if each in tokens.kind_of:
            found.append(AnswerToken("", "mark", tokens.kind_of[each], count))
            count += 1
        elif each in ends:
            found.append(AnswerToken("", "end", ends[each], count - 1))
        elif each in special:
            found.append(AnswerToken(str(tokenizer.convert_ids_to_tokens(each)), "special"))
        else:
            found.append(AnswerToken(words.put(each)))
    if found and found[-1].part == "special":
        found[-1] = AnswerToken(found[-1].text, "stop")
    return found


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
        maps.append(HeatMap(picture, share, mean, vectors, read))
    shares = {name: float(share.mean()) for name, share in attention.shares().items()}
    return ImageAttention(maps, shares, attention.layers)


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


def segment_attention(attention: LongTermAttention, start: int) -> SegmentAttention:
    """A long-term memory's attention to its segment, averaged over layers."""
    shares = {name: float(share.mean()) for name, share in attention.shares().items()}
    vectors = attention.weights.mean(0).numpy()
    return SegmentAttention(start, attention.mean().numpy(), vectors, shares, len(attention.weights))


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


__getattr__ = renamed(__name__, {"Moment": "InspectedInvocation", "Token": "AnswerToken", "spelled": "answer_tokens"})
__all__ = ["AnswerToken", "InspectedInvocation", "Inspection", "answer_tokens", "inspect_answer"]
