"""How much later tokens attend to a memory's slots and to everything else, layer by layer.

`vismem.analysis.slot_attention` gives the weights; here they are summed by kind and compared with uniform attention
over all visible positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vismem.analysis.slot_attention import SlotAttention, attention_to_slots
from vismem.audit.activations import ActivationStore
from vismem.audit.statistics import average
from vismem.config import KINDS, Kind
from vismem.decoding.trace import Rollout
from vismem.evaluation.records import ResultFile
from vismem.model import VisMem

SLOTS, OTHER = "slots", "other memory"
PARTS = (SLOTS, OTHER, "visual", "prompt", "answer")


def measure_attention(
    activations: ActivationStore, ids: Sequence[str], results: ResultFile, batch_size: int, label: str
) -> None:
    """Measures the attention of each row's later tokens by kind; skips rows that `results` already has.

    `results` receives for each row `kinds`: by kind the shares [layers] for each of `PARTS`, and `alike` [layers], what
    its slots would get from uniform attention.

    Raises:
        ValueError: if a layer of the base returns no attention weights.
    """
    for part in activations.pending(ids, results, batch_size, label):
        inputs = activations.inputs([activations.row(row_id) for row_id in part])
        prompts = inputs["attention_mask"].sum(1).tolist()
        seen = attention_to_slots(activations.model, inputs, [activations.entries[row_id].rollout for row_id in part])
        for row_id, one, prompt in zip(part, seen, prompts, strict=True):
            entry = activations.entries[row_id]
            kinds = {
                kind: later_attention(activations.model, one, entry.rollout, kind, prompt)
                for kind in KINDS
                if entry.of_kind(kind)
            }
            results.append([{"id": row_id, "kinds": kinds}])


def later_attention(
    model: VisMem, seen: SlotAttention, rollout: Rollout, kind: Kind, prompt: int
) -> dict[str, list[float]]:
    """One answer's shares [layers] after its first memory of a kind, averaged over later tokens."""
    own = [index for index, one in enumerate(rollout.invocations) if one.kind == kind and one.length]
    first = rollout.invocations[own[0]].position + 1  # the end token, from which the next word is sampled
    slots = torch.stack([seen.slots[index].sum(-1) for index in own]).sum(0)[:, first:]
    shares = {name: weights[:, first:] for name, weights in seen.shares.items()}
    uniform = uniform_attention(rollout, own, prompt, first, windows(model, len(slots)))
    found = {SLOTS: slots, OTHER: shares.pop("memory") - slots, **shares, "alike": uniform}
    return {name: [round(float(layer), 6) for layer in values.mean(1)] for name, values in found.items()}


def uniform_attention(
    rollout: Rollout, own: Sequence[int], prompt: int, first: int, reach: Sequence[int | None]
) -> Tensor:
    """Attention [layers, later tokens] that the slots of invocations `own` get if all visible positions get the same.

    The prompt has `prompt` tokens, and the first later token has the index `first`. `reach` has for each layer the
    number of positions that a token sees, including itself; None for all.
    """
    places: list[int] = []  # positions of the slots in the whole sequence
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
        visible = at[:, 0] + 1 if most is None else (at[:, 0] + 1).clamp(max=most)
        rows.append(near.sum(1) / visible)
    return torch.stack(rows)


def windows(model: VisMem, layers: int) -> list[int | None]:
    """Window of each layer of the language model; None for full attention."""
    config = model.backbone.language_model.config
    width = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        width = None
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    return [width if kind == "sliding_attention" else None for kind in types[:layers]]


def summarize_attention(
    rows: Mapping[str, Mapping[str, Any]], activations: ActivationStore
) -> dict[Kind, dict[str, Any]]:
    """Estimates for each invoked kind.

    By kind `n`; `layers`; estimates `by_layer` and part; `share`, their means over layers; `ratio` of the slots' share
    to uniform attention; and `layer` and `most`, the layer with the largest share and that share.
    """
    found: dict[Kind, dict[str, Any]] = {}
    for kind in KINDS:
        kept = [(activations.group(i), row["kinds"][kind]) for i, row in rows.items() if kind in row["kinds"]]
        if not kept:
            continue
        groups, layers = [group for group, _ in kept], len(kept[0][1][SLOTS])
        by_layer = {
            part: [average([row[part][depth] for _, row in kept], groups) for depth in range(layers)] for part in PARTS
        }
        ratios = [sum(row[SLOTS]) / sum(row["alike"]) for _, row in kept if sum(row["alike"])]
        most = max(range(layers), key=lambda depth: by_layer[SLOTS][depth]["value"])
        found[kind] = {
            "n": len(kept),
            "layers": layers,
            "by_layer": by_layer,
            "share": {part: average([sum(row[part]) / layers for _, row in kept], groups) for part in PARTS},
            "ratio": average(ratios, groups),
            "layer": most + 1,
            "most": by_layer[SLOTS][most],
        }
    return found
