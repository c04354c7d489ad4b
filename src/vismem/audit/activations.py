"""The bank: intact answers with everything that the audit asks of them, kept on disk row by row.

A reference pass fills it. What another row saw or recalled always comes from here, never from a neighbour in the
batch, so that a replaced memory depends on the seed and the row alone.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from vismem import files
from vismem.backbones import Patches
from vismem.config import Kind
from vismem.data import Row, prompt_inputs
from vismem.decoding.trace import Invocation, Rollout
from vismem.memory import Observation
from vismem.model import VisMem
from vismem.training.rollout import seed_of

VISUAL_KEPT = 32  # vectors that a row's visual tokens are averaged into for probes; no memory is longer


@dataclass
class Sight:
    """What a row shows: visual states [y, d], and its images as the short former encodes them."""

    visual: Tensor
    patches: list[Patches]


@dataclass
class Entry:
    """One row's intact answer.

    Args:
        rollout: the answer, its invocations with memories [N, d] and observed states [z, d]; on the CPU.
        queries: Q [K, d] of each invocation.
        visual: the row's visual tokens, averaged into at most `VISUAL_KEPT` vectors [y, d]; empty where it has none.
    """

    rollout: Rollout
    queries: list[Tensor]
    visual: Tensor

    def of_kind(self, kind: Kind) -> list[int]:
        """Indices of the invocations of that kind that formed a memory."""
        return [index for index, one in enumerate(self.rollout.invocations) if one.kind == kind and one.length]


class Bank:
    """Rows, and their entries as far as there are any.

    Args:
        model: the model; memories that are formed anew are formed by `model.memory.form` as it is then.
        rows: all rows of the reference pass.
        folder: where entries lie; made if it is not there.
        seed: which other row stands in for a row.
        sights: sights that are held at a time.
    """

    def __init__(self, model: VisMem, rows: Sequence[Row], folder: Path, seed: int = 0, sights: int = 32) -> None:
        self.model, self.rows, self.folder, self.seed, self.held = model, list(rows), Path(folder), seed, sights
        self.folder.mkdir(parents=True, exist_ok=True)
        self.number = {row.id: index for index, row in enumerate(self.rows)}
        self.image = {row.id: image_digest(row) for row in self.rows}
        self.question = {row.id: last_question(row) for row in self.rows}
        self.entries: dict[str, Entry] = {}
        self._sights: OrderedDict[str, Sight] = OrderedDict()
        self._sums: dict[Kind, tuple[Tensor, int, dict[str, tuple[Tensor, int]]]] = {}

    def row(self, row_id: Any) -> Row:
        """The row of that id. Raises ValueError where the bank has none."""
        if row_id not in self.number:
            raise ValueError(f"the audit's bank has no row {row_id!r}; give every request its row's id as its tag")
        return self.rows[self.number[row_id]]

    # Entries.

    def path(self, row_id: str) -> Path:
        """The file of a row's entry."""
        return self.folder / f"{self.number[row_id]:06d}.safetensors"

    def add(self, row_id: str, rollout: Rollout, queries: Sequence[Tensor], visual: Tensor) -> None:
        """Keeps a row's intact answer, in memory and on disk.

        Args:
            queries: Q [K, d] of each invocation that formed a memory, None for the others.
            visual: the row's visual states [y, d].
        """
        invocations = [
            Invocation(one.kind, one.position, one.length, one.forced, _kept(one.memory), _kept(one.states))
            for one in rollout.invocations
        ]
        rollout = Rollout(rollout.tokens, rollout.sampled, rollout.allowed, rollout.log_probs, invocations)
        entry = Entry(rollout, [_kept(query) for query in queries], pooled(visual, VISUAL_KEPT).cpu())
        self.entries[row_id] = entry
        self._sums.clear()
        tensors = {name: getattr(rollout, name) for name in ("tokens", "sampled", "allowed", "log_probs")}
        tensors["visual"] = entry.visual
        for index, (one, query) in enumerate(zip(invocations, entry.queries, strict=True)):
            parts = {"memory": one.memory, "states": one.states, "query": query}
            tensors |= {f"{name}.{index}": part for name, part in parts.items() if part is not None}
        said = {"id": row_id, "invocations": json.dumps([one.to_dict() for one in invocations])}
        files.write_bytes(self.path(row_id), serialize({n: t.contiguous() for n, t in tensors.items()}, said))

    def load(self, row_id: str) -> bool:
        """Reads a row's entry from disk; False where there is no readable one for this row."""
        path = self.path(row_id)
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                if said.get("id") != row_id:
                    return False
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError:  # cut or damaged
            return False
        invocations = [
            Invocation(**one, memory=held.get(f"memory.{index}"), states=held.get(f"states.{index}"))
            for index, one in enumerate(json.loads(said["invocations"]))
        ]
        rollout = Rollout(held["tokens"], held["sampled"], held["allowed"], held["log_probs"], invocations)
        queries = [held.get(f"query.{index}") for index in range(len(invocations))]
        self.entries[row_id] = Entry(rollout, queries, held["visual"])
        self._sums.clear()
        return True

    # What was seen.

    @torch.no_grad()
    def sight(self, row_id: str) -> Sight:
        """What a row shows, encoded by itself and held for a while."""
        if row_id not in self._sights:
            self._sights[row_id] = self._look(self.row(row_id))
            while len(self._sights) > self.held:
                self._sights.popitem(last=False)
        self._sights.move_to_end(row_id)
        return self._sights[row_id]

    def _look(self, row: Row) -> Sight:
        backbone = self.model.backbone
        inputs = self.inputs([row])
        (visual,) = backbone.prompt_visual_states(inputs["input_ids"], inputs)
        (images,) = backbone.prompt_images(inputs["input_ids"], inputs)
        return Sight(visual, self.model.memory.short.encode(images) if images else [])

    def inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The rows' prompts as the model takes them, on its device."""
        found = prompt_inputs(self.model.processor, rows)
        dtype = self.model.dtype
        return {name: t.to(self.model.device, dtype if t.is_floating_point() else None) for name, t in found.items()}

    def batches(self, ids: Sequence[str], size: int) -> Iterator[list[str]]:
        """Ids of rows in batches, those with and without images apart, as not every processor takes both at once."""
        for part in ([i for i in ids if self.image[i]], [i for i in ids if not self.image[i]]):
            yield from (part[start : start + size] for start in range(0, len(part), size))

    def recalled(self, row_id: str, index: int) -> tuple[Tensor, Tensor]:
        """Observed states [z, d] and segment embeddings [z, d] of an invocation of a row's intact answer."""
        rollout, device = self.entries[row_id].rollout, self.model.device
        invocation = rollout.invocations[index]
        start = rollout.invocations[index - 1].position + 2 if index else 0
        segment = self.model.tokens.embed(rollout.tokens[start : invocation.position + 1].to(device))
        return invocation.states.to(device), segment

    @torch.no_grad()
    def observation(self, row_id: str, index: int) -> Observation:
        """What the row had in mind at an invocation of its intact answer."""
        sight, (states, segment) = self.sight(row_id), self.recalled(row_id, index)
        return Observation(sight.visual, states, segment, sight.patches, (row_id, index))

    # Who stands in for whom.

    def other_image(self, row_id: str) -> str | None:
        """A row with another image, always the same for a row and seed; None where there is none."""
        own = self.image[self.row(row_id).id]
        found = [row.id for row in self.rows if self.image[row.id] not in ("", own)]
        return self._pick(found, "image", row_id) if own else None

    def other_question(self, row_id: str, kind: Kind) -> tuple[str, int] | None:
        """A row whose question differs, and an invocation of that kind in its answer; None where there is none.

        Rows about the same image come first: their question is then all that differs.
        """
        own = self.row(row_id).id
        found = [r.id for r in self.rows if self.question[r.id] != self.question[own] and self._invoked(r.id, kind)]
        found = [other for other in found if self.image[other] == self.image[own]] or found
        other = self._pick(found, f"question-{kind}", row_id)
        return None if other is None else (other, self.entries[other].of_kind(kind)[0])

    def mean(self, kind: Kind, row_id: str) -> Tensor | None:
        """The mean memory [N, d] of that kind over all answers about other images; None where there is none."""
        if kind not in self._sums:
            self._sums[kind] = self._sum(kind)
        total, count, by_image = self._sums[kind]
        own, mine = by_image.get(self._scene(row_id), (0, 0))
        return (total - own) / (count - mine) if count > mine else None

    def _sum(self, kind: Kind) -> tuple[Tensor, int, dict[str, tuple[Tensor, int]]]:
        by_image: dict[str, tuple[Tensor, int]] = {}
        for row_id, entry in sorted(self.entries.items(), key=lambda item: self.number[item[0]]):
            for index in entry.of_kind(kind):
                total, count = by_image.get(self._scene(row_id), (0, 0))
                memory = entry.rollout.invocations[index].memory.double()
                by_image[self._scene(row_id)] = (total + memory, count + 1)
        return sum(t for t, _ in by_image.values()), sum(c for _, c in by_image.values()), by_image

    def _scene(self, row_id: str) -> str:
        return self.image[row_id] or row_id  # rows without an image are each their own

    def _invoked(self, row_id: str, kind: Kind) -> bool:
        return row_id in self.entries and bool(self.entries[row_id].of_kind(kind))

    def _pick(self, found: list[str], what: str, row_id: str) -> str | None:
        return sorted(found)[seed_of(self.seed, what, row_id) % len(found)] if found else None


def image_digest(row: Row) -> str:
    """Tells a row's images from those of other rows; empty where it has none."""
    digest = hashlib.sha256()
    for image in row.images:
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16] if row.images else ""


def last_question(row: Row) -> str:
    """The text of the last user message, which is what a row asks."""
    asked = [message for message in row.prompt if message["role"] == "user"] or row.prompt
    return " ".join(part["text"] for part in asked[-1]["content"] if part["type"] == "text").strip()


def pooled(vectors: Tensor, most: int) -> Tensor:
    """Vectors [y, d] averaged over consecutive ones into at most `most`."""
    if len(vectors) <= most:
        return vectors.detach()
    return F.adaptive_avg_pool1d(vectors.detach().float().T[None], most)[0].T.to(vectors.dtype)


def _kept(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().cpu().clone()
