"""One finished answer inspected: what its memories looked at, what they read, and what they did to the words.

The numbers are those of `evaluation/` (looks, readings, attention, replaying), brought together as `findings.py` has
them. What a model cannot show is left out, with the reason in one line. How it all is drawn is for `panels.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vismem.analysis.findings import Candidate, HeatMap, Inspection, Later, Looked, Moment, NextWord, Read, Token
from vismem.analysis.long_attention import Reading, readings, segment_start
from vismem.analysis.replacement import Pair, distributions
from vismem.analysis.short_attention import Look, looks
from vismem.analysis.slot_attention import SlotAttention, attention_to_slots
from vismem.config import KINDS, Kind
from vismem.data.images import to_rgb
from vismem.decoding.detokenizer import Detokenizer, special_ids
from vismem.decoding.markers import pieces
from vismem.decoding.trace import Rollout
from vismem.model import VisMem

LIKELIEST = 8  # tokens listed of the two distributions after an invocation
LARGEST = 640  # pixels of the longer side of the pictures that are kept
FINEST = 128  # cells of the longer side of a heat map, where a picture's patches do not lie on one plain grid
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
    """Inspects one answer; to be called where nothing else runs the model (`Worker.call`).

    Costs a formation of every memory, one forward with eager attention, and one more forward for each invocation and
    one for all. An answer without invocations costs nothing.

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
    tokenizer, ids, invocations = model.processor.tokenizer, rollout.tokens.tolist(), rollout.invocations
    formed = {invocation.kind for invocation in invocations if invocation.length}

    def all_looks() -> dict[int, Look]:
        return {look.index: look for look in looks(model, inputs, [invocations], [pictures], **processor_kwargs)}

    found: dict[str, tuple[Any, str]] = {}  # for each part what it is made of, or None and why
    if "short" in formed:
        found["looked"] = attempted(all_looks)
    if "long" in formed:
        found["read"] = attempted(lambda: {each.index: each for each in readings(model, inputs, [rollout])})
    if formed:
        found["later"] = attempted(lambda: attention_to_slots(model, inputs, [rollout])[0])
        found["next"] = attempted(
            lambda: {p.index: p for p in distributions(model, inputs, [rollout], lambda *_: None)}
        )
    seen: SlotAttention | None = found["later"][0] if formed else None
    make: dict[str, Callable[[Any, int], Any]] = {
        "looked": lambda every, index: looked_of(every[index], seen),
        "read": lambda every, index: read_of(every[index], segment_start(rollout, index)),
        "later": lambda slots, index: later_of(slots, index, inputs, model.backbone.image_token_id),
        "next": lambda every, index: next_of(every[index], rollout, model),
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
        moment = Moment(
            index, invocation.kind, invocation.position, invocation.forced, invocation.length, **shown, missing=missing
        )
        moments.append(moment)
    return Inspection(
        spelled(ids, tokenizer, model.tokens),
        pieces(ids, tokenizer, model.tokens),
        moments,
        {} if seen is None else by_kind(seen),
        [smaller(picture) for picture in pictures],
    )


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
    copy = to_rgb(picture)
    copy.thumbnail((LARGEST, LARGEST))
    return copy


def by_kind(seen: SlotAttention) -> dict[Kind, list[float]]:
    """For each kind that was invoked, the share of each token's attention that all its slots got."""
    found = {}
    for kind in KINDS:
        mine = [slots.sum(-1).mean(0) for slots, of in zip(seen.slots, seen.kinds, strict=True) if of == kind]
        if mine:
            found[kind] = torch.stack(mine).sum(0).tolist()
    return found


def spelled(ids: Sequence[int], tokenizer: Any, tokens: Any) -> list[Token]:
    """An answer's tokens with their texts, as its timeline shows them.

    Args:
        ids: its ids, invocation and end ids among them.
        tokenizer: of the processor.
        tokens: `model.tokens`.
    """
    words, found, count = Detokenizer(tokenizer), [], 0
    ends, special = {index: kind for kind, index in tokens.end_ids.items()}, special_ids(tokenizer)
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
    if found and found[-1].part == "special":
        found[-1] = Token(found[-1].text, "stop")
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
        if got is not None and any(look.views[view].picture == picture for view, _ in look.starts):
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
        patch = min((right - left) / columns, (bottom - top) / rows)
        if len(shown) == 1 and np.allclose(view.box, (0, 0, wide, high), atol=patch / 4):
            return columns, rows
        finest = max(finest, max(wide, high) / patch)
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
    if token in special_ids(tokenizer):
        return str(tokenizer.convert_ids_to_tokens(token))
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) if before else 0 :]


__all__ = ["Inspection", "Moment", "Token", "inspect_answer", "spelled"]
