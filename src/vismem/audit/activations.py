"""Intact answers with everything that the audit needs of them, on disk row by row.

The reference pass fills the store. What another row contributes to a replacement comes from here, never from a
neighbour in the batch, so a replaced memory depends only on the seed and the row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor
from tqdm.auto import tqdm

from vismem import files
from vismem.analysis.rollouts import segment_of
from vismem.backbones import Patches
from vismem.config import Kind
from vismem.data import Row, prompt_inputs
from vismem.decoding.trace import Invocation, Rollout
from vismem.deprecation import renamed
from vismem.evaluation.records import ResultFile
from vismem.memory import Choice, Observation
from vismem.model import VisMem
from vismem.training.rollout import seed_of

ALL, NOTHING = "", (torch.zeros(()), 0)  # the group of all rows; a sum and a number of memories
VISUAL_KEPT = 32  # vectors that a row's visual tokens are pooled into for probes; no memory is longer


@dataclass
class EncodedImages:
    """A row's visual states [y, d], and its images as the short former encodes them."""

    visual: Tensor
    patches: list[Patches]


@dataclass
class Entry:
    """One row's intact answer, on the CPU.

    Args:
        rollout: the answer; its invocations have memories [N, d] and observed states [z, d].
        queries: Q [K, d] of each invocation that formed a memory, None for the others.
        visual: [y, d], the row's visual tokens pooled into at most `VISUAL_KEPT` vectors; empty if it has none.
    """

    rollout: Rollout
    queries: list[Tensor | None]
    visual: Tensor

    def of_kind(self, kind: Kind) -> list[int]:
        """Indices of the invocations of this kind that formed a memory."""
        return [index for index, one in enumerate(self.rollout.invocations) if one.kind == kind and one.length]

    def memory(self, index: int) -> Tensor:
        """The memory [N, d] of an invocation that formed one."""
        return present(self.rollout.invocations[index].memory)


class ActivationStore:
    """The rows of an audit and their intact answers.

    Args:
        model: the model; `model.memory.form` forms memories again.
        rows: all rows of the reference pass.
        folder: where entries are saved; created if missing.
        seed: of the choice of other rows.
        cached: number of rows whose encoded images are cached.
    """

    def __init__(self, model: VisMem, rows: Sequence[Row], folder: Path, seed: int = 0, cached: int = 32) -> None:
        self.model, self.rows, self.folder, self.seed = model, list(rows), Path(folder), seed
        self.folder.mkdir(parents=True, exist_ok=True)
        self.number = {row.id: index for index, row in enumerate(self.rows)}
        self.image = {row.id: image_digest(row) for row in self.rows}
        self.question = {row.id: last_question(row) for row in self.rows}
        self.entries: dict[str, Entry] = {}
        self.encoded_images = lru_cache(cached)(self._encode_images)
        self._sums: dict[Kind, dict[str, tuple[Tensor, int]]] = {}  # by group: the memories' sum and number

    def row(self, row_id: Any) -> Row:
        """The row with this id. Raises ValueError if there is none."""
        if row_id not in self.number:
            raise ValueError(f"the audit has no row {row_id!r}; give every request its row's id as its tag")
        return self.rows[self.number[row_id]]

    def group(self, row_id: str) -> str:
        """The row's bootstrap group: its image, as questions about one image are not independent."""
        return self.image[row_id] or row_id

    # Entries.

    def path(self, row_id: str) -> Path:
        """The file of a row's entry."""
        return self.folder / f"{self.number[row_id]:06d}.safetensors"

    def add(self, row_id: str, rollout: Rollout, queries: Sequence[Tensor | None], visual: Tensor) -> None:
        """Saves a row's intact answer and adds it to `entries`; the arguments are those of `Entry`."""
        tensors = {name: getattr(rollout, name) for name in ("tokens", "sampled", "allowed", "log_probs")}
        tensors["visual"] = visual
        for index, (one, query) in enumerate(zip(rollout.invocations, queries, strict=True)):
            parts = {"memory": one.memory, "states": one.states, "query": query}
            if one.choice is not None:
                grids = torch.tensor(one.choice.grids)
                parts |= {"scores": one.choice.scores, "blocks": one.choice.blocks, "grids": grids}
            tensors |= {f"{name}.{index}": part for name, part in parts.items() if part is not None}
        metadata = {"id": row_id, "invocations": json.dumps([one.to_dict() for one in rollout.invocations])}
        own = {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
        }
        files.write_bytes(self.path(row_id), serialize(own, metadata))
        self.load(row_id)

    def load(self, row_id: str) -> bool:
        """Reads a row's entry from disk; returns False if there is no readable one for this row."""
        path = self.path(row_id)
        if not path.is_file():
            return False
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("id") != row_id:
                    return False
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError:  # truncated or damaged
            return False
        invocations = []
        for index, one in enumerate(json.loads(metadata["invocations"])):
            one.pop("blocks", None)
            memory, states = held.get(f"memory.{index}"), held.get(f"states.{index}")
            choice = None
            if f"blocks.{index}" in held:
                grids = [(rows, columns) for rows, columns in held[f"grids.{index}"].tolist()]
                choice = Choice(held[f"scores.{index}"], held[f"blocks.{index}"], grids)
            invocations.append(Invocation(**one, memory=memory, states=states, choice=choice))
        rollout = Rollout(held["tokens"], held["sampled"], held["allowed"], held["log_probs"], invocations)
        queries = [held.get(f"query.{index}") for index in range(len(invocations))]
        self.entries[row_id] = Entry(rollout, queries, held["visual"])
        self._sums.clear()
        return True

    # Inputs.

    @torch.no_grad()
    def _encode_images(self, row_id: str) -> EncodedImages:
        """A row's images, encoded on their own."""
        backbone, inputs = self.model.backbone, self.inputs([self.row(row_id)])
        short: Any = self.model.memory.short
        (visual,) = backbone.prompt_visual_states(inputs["input_ids"], inputs)
        (images,) = backbone.prompt_images(inputs["input_ids"], inputs)
        return EncodedImages(visual, short.encode(images) if images else [])

    def inputs(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The rows' prompts as model inputs, on its device."""
        return self.model.move_inputs(prompt_inputs(self.model.processor, rows))

    def pending(self, ids: Sequence[str], results: ResultFile, size: int, label: str) -> Iterator[list[str]]:
        """Batches of the rows that invoked memory and are not in `results`, with a progress bar.

        Rows with and without images are in separate batches, because not every processor takes both at once.
        """
        invoked = [i for i in ids if any(one.length for one in self.entries[i].rollout.invocations)]
        todo = [i for i in invoked if i not in results.rows]
        with tqdm(total=len(invoked), initial=len(invoked) - len(todo), desc=label, delay=2, mininterval=1) as bar:
            for part in ([i for i in todo if self.image[i]], [i for i in todo if not self.image[i]]):
                for start in range(0, len(part), size):
                    yield part[start : start + size]
                    bar.update(len(part[start : start + size]))

    def states_and_segment(self, row_id: str, index: int) -> tuple[Tensor, Tensor]:
        """Observed states [z, d] and segment embeddings [z, d] of an invocation of a row's intact answer."""
        rollout, device = self.entries[row_id].rollout, self.model.device
        segment = self.model.tokens.embed(segment_of(rollout, index).to(device))
        return present(rollout.invocations[index].states).to(device), segment

    @torch.no_grad()
    def observation(self, row_id: str, index: int) -> Observation:
        """What memory was formed from at an invocation of a row's intact answer."""
        images, (states, segment) = self.encoded_images(row_id), self.states_and_segment(row_id, index)
        return Observation(images.visual, states, segment, images.patches, (row_id, index))

    # Other rows.

    def other_image(self, row_id: str) -> str | None:
        """A row with another image, fixed by the row and the seed; None if there is none."""
        own = self.image[row_id]
        found = [other for other, image in self.image.items() if image not in ("", own)]
        return self._pick(found, "image", row_id) if own else None

    def other_question(self, row_id: str, kind: Kind) -> tuple[str, int] | None:
        """A row with another question and an invocation of this kind in its answer; None if there is none.

        Rows about the same image come first, since only their question differs.
        """
        own = self.question[row_id]
        found = [i for i, entry in self.entries.items() if self.question[i] != own and entry.of_kind(kind)]
        found = [other for other in found if self.image[other] == self.image[row_id]] or found
        other = self._pick(found, f"question-{kind}", row_id)
        return None if other is None else (other, self.entries[other].of_kind(kind)[0])

    def mean(self, kind: Kind, row_id: str) -> Tensor | None:
        """The mean memory [N, d] of this kind over all answers about other images; None if there is none."""
        if kind not in self._sums:
            sums: dict[str, tuple[Tensor, int]] = {}
            for other in sorted(self.entries, key=self.number.__getitem__):
                for index in self.entries[other].of_kind(kind):
                    for group in (ALL, self.group(other)):
                        total, count = sums.get(group, NOTHING)
                        sums[group] = total + self.entries[other].memory(index).double(), count + 1
            self._sums[kind] = sums
        (total, count), (own, mine) = (self._sums[kind].get(group, NOTHING) for group in (ALL, self.group(row_id)))
        return (total - own) / (count - mine) if count > mine else None

    def _pick(self, found: list[str], purpose: str, row_id: str) -> str | None:
        return sorted(found)[seed_of(self.seed, purpose, row_id) % len(found)] if found else None


def image_digest(row: Row) -> str:
    """A hash of a row's images; empty if it has none."""
    digest = hashlib.sha256()
    for image in row.images:
        digest.update(f"{image.mode}{image.size}".encode() + image.tobytes())
    return digest.hexdigest()[:16] if row.images else ""


def last_question(row: Row) -> str:
    """The text of the last user message."""
    asked = [message for message in row.prompt if message["role"] == "user"] or row.prompt
    return " ".join(part["text"] for part in asked[-1]["content"] if part["type"] == "text").strip()


def pooled(vectors: Tensor, most: int) -> Tensor:
    """Pools vectors [y, d] into at most `most` by averaging consecutive ones."""
    if len(vectors) <= most:
        return vectors.detach()
    return F.adaptive_avg_pool1d(vectors.detach().float().T[None], most)[0].T.to(vectors.dtype)


def present(tensor: Tensor | None) -> Tensor:
    """A recorded tensor of an invocation that formed a memory, which has all of them."""
    assert tensor is not None
    return tensor


__getattr__ = renamed(__name__, {"Bank": "ActivationStore"})
