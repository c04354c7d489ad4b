"""Attention of what is written after a memory: how much goes to its slots, layer by layer, and how much elsewhere.

The weights come from `evaluation.attention`; here they are summed up by kind, and held against what the slots would get
if a token looked at all positions that it can see alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vismem.analysis.slot_attention import SlotAttention, attention_to_slots
from vismem.audit.activations import Bank
from vismem.audit.replay import Lines
from vismem.audit.statistics import average
from vismem.config import KINDS, Kind
from vismem.decoding.trace import Rollout
from vismem.model import VisMem

SLOTS, OTHER = "slots", "other memory"
PARTS = (SLOTS, OTHER, "visual", "prompt", "answer")


def watch(bank: Bank, ids: Sequence[str], lines: Lines, batch_size: int, label: str) -> None:
    """Notes for each row and kind the attention of its later tokens; what an earlier run has is left out.

    Args:
        bank: the rows' intact answers.
        ids: of the rows.
        lines: where the numbers go: for each row `kinds`, from a kind to its shares [layers] by `PARTS`, and `alike`
            [layers], what its slots would get.
        batch_size: answers read together.
        label: for the progress bar.

    Raises:
        ValueError: if the base has layers without attention weights.
    """
    invoked = [i for i in ids if any(one.length for one in bank.entries[i].rollout.invocations)]
    todo = [row_id for row_id in invoked if row_id not in lines.rows]
    with tqdm(total=len(invoked), initial=len(invoked) - len(todo), desc=label, delay=2, mininterval=1) as bar:
        for part in bank.batches(todo, batch_size):
            inputs = bank.inputs([bank.row(row_id) for row_id in part])
            prompts = inputs["attention_mask"].sum(1).tolist()
            seen = attention_to_slots(bank.model, inputs, [bank.entries[row_id].rollout for row_id in part])
            for row_id, one, prompt in zip(part, seen, prompts, strict=True):
                rollout = bank.entries[row_id].rollout
                kinds = {
                    k: of_kind(bank.model, one, rollout, k, prompt) for k in KINDS if bank.entries[row_id].of_kind(k)
                }
                lines.add([{"id": row_id, "kinds": kinds}])
            bar.update(len(part))


def of_kind(model: VisMem, seen: SlotAttention, rollout: Rollout, kind: Kind, prompt: int) -> dict[str, list[float]]:
    """One answer's shares [layers] after its first memory of a kind, means over later tokens; see `watch`."""
    own = [index for index, one in enumerate(rollout.invocations) if one.kind == kind and one.length]
    first = rollout.invocations[own[0]].position + 1  # the end token, which the next word is drawn from, and all after
    slots = sum(seen.slots[index].sum(-1) for index in own)[:, first:]
    shares = {name: weights[:, first:] for name, weights in seen.shares.items()}
    alike = evenly(rollout, own, prompt, first, windows(model, len(slots)))
    found = {SLOTS: slots, OTHER: shares.pop("memory") - slots, **shares, "alike": alike}
    return {name: [round(float(layer), 6) for layer in values.mean(1)] for name, values in found.items()}


def evenly(rollout: Rollout, own: Sequence[int], prompt: int, first: int, reach: Sequence[int | None]) -> Tensor:
    """What the slots of some invocations get [layers, later tokens] from tokens that look at all they see alike.

    Args:
        rollout: the answer.
        own: indices of the invocations.
        prompt: tokens of the prompt.
        first: the first later token.
        reach: for each layer how many positions a token sees, itself included; None for all.
    """
    places: list[int] = []  # of the own slots in the whole sequence
    added = 0
    tokens = torch.arange(len(rollout.tokens)) + prompt
    for index, one in enumerate(rollout.invocations):
        start = prompt + one.position + 1 + added
        places += range(start, start + one.length) if index in own else ()
        tokens[one.position + 1 :] += one.length
        added += one.length
    at, slots = tokens[first:, None], torch.tensor(places)[None]
    rows = []
    for most in reach:
        near = slots <= at if most is None else (slots <= at) & (slots > at - most)
        held = at[:, 0] + 1 if most is None else (at[:, 0] + 1).clamp(max=most)
        rows.append(near.sum(1) / held)
    return torch.stack(rows)


def windows(model: VisMem, layers: int) -> list[int | None]:
    """How far back each layer of the language model sees; None where there is no window."""
    config = model.backbone.language_model.config
    width = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        width = None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [width if kind == "sliding_attention" else None for kind in types[:layers]]


def gazes(lines: Mapping[str, Mapping[str, Any]], bank: Bank) -> dict[Kind, dict[str, Any]]:
    """By kind that was invoked: `n`, `layers`, estimates `by_layer` and part, their means over layers (`share`), the
    `ratio` of the slots' share to what they would get alike, and the `layer` that looks at them `most`."""
    found: dict[Kind, dict[str, Any]] = {}
    for kind in KINDS:
        kept = [(bank.image[i] or i, line["kinds"][kind]) for i, line in lines.items() if kind in line["kinds"]]
        if not kept:
            continue
        groups, layers = [group for group, _ in kept], len(kept[0][1][SLOTS])
        by_layer = {
            part: [average([row[part][depth] for _, row in kept], groups).to_dict() for depth in range(layers)]
            for part in PARTS
        }
        ratios = [sum(row[SLOTS]) / sum(row["alike"]) for _, row in kept if sum(row["alike"])]
        most = max(range(layers), key=lambda depth: by_layer[SLOTS][depth]["value"])
        found[kind] = {
            "n": len(kept),
            "layers": layers,
            "by_layer": by_layer,
            "share": {part: average([sum(row[part]) / layers for _, row in kept], groups).to_dict() for part in PARTS},
            "ratio": average(ratios, groups).to_dict(),
            "layer": most + 1,
            "most": by_layer[SLOTS][most],
        }
    return found
