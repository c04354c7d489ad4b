"""The training forward: finished answers read with their memories in place, all in one pass (Eq. 14).

Four steps: `locate` the answers, images and invocations of a batch; `observe` the states each query is built from;
`form` the memories; `read` the batch with the memories in their slots. `heads.py` turns the states into losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vismem.backbones import Image, Patches
from vismem.config import Kind
from vismem.memory import Choice, Observation
from vismem.reading.splice import InvocationSite, Reader, Splice, batches_of_similar_length, find_invocations

if TYPE_CHECKING:
    from vismem.model import VisMem

Memories = list[list[Tensor | None]]  # for each row and invocation [N, d], or None where nothing is inserted
Choices = list[list[Choice | None]]  # for each row and invocation the choice of its blocks
Blocks = list[list[Tensor | None]]  # for each row and invocation recorded blocks [N_s]
States = list[list[Tensor]]  # for each row and invocation the observed states [z, d]


@dataclass
class Located:
    """A batch of finished answers, and where its parts are.

    Args:
        sites: for each row its invocations.
        embeds: [B, L, d], input embeddings; image placeholders not yet filled.
        visual: for each prompt its visual states [y, d].
        images: for each prompt its images.
        shown: bool [B, L], the places of visual tokens.
        copies: consecutive rows that share a prompt.
        patches: for each prompt with a short-term invocation, its images as the short former encoded them.
    """

    sites: list[list[InvocationSite]]
    embeds: Tensor
    visual: list[Tensor]
    images: list[list[Image]]
    shown: Tensor
    copies: int
    patches: dict[int, list[Patches]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """L."""
        return self.embeds.shape[1]

    def observation(self, row: int, index: int, states: Tensor, blocks: Tensor | None = None) -> Observation:
        """What a row's invocation number `index` forms memory from, given its states [z, d] and its blocks, if any."""
        site, prompt = self.sites[row][index], row // self.copies
        segment, patches = self.embeds[row, site.segment_start : site.index + 1], self.patches.get(prompt, [])
        return Observation(self.visual[prompt], states.detach(), segment.detach(), patches, blocks=blocks)


def locate(
    model: VisMem,
    input_ids: Tensor,
    attention_mask: Tensor,
    starts: list[int],
    copies: int,
    inputs: dict[str, Any],
) -> tuple[Located, Reader]:
    """Finds images and invocations, and makes the reader of the batch.

    Args:
        model: the model.
        input_ids: [B, L].
        attention_mask: [B, L].
        starts: where each row's answer starts.
        copies: consecutive rows that share a prompt.
        inputs: the processor's other tensors, those of images once per prompt.

    Raises:
        ValueError: if the images do not fill the prompts' image placeholders.
    """
    backbone, vision = model.backbone, model.backbone.vision_inputs(inputs)
    images = backbone.images(**vision)
    shown = input_ids == backbone.image_token_id
    in_answer = torch.arange(input_ids.shape[1]) >= torch.tensor(starts)[:, None]
    written = shown & in_answer.to(shown.device)  # image tokens written in an answer are plain text
    if copies == 1 and shown.sum() == sum(image.tokens for image in images):
        written = torch.zeros_like(shown)  # later turns show images too
    prompt_places = (shown & ~written)[::copies]
    with torch.no_grad():
        features = backbone.image_features(**vision) if vision else None
    embeds = model.tokens.embed(input_ids)
    if written.any():  # the base finds image placeholders by their embedding
        embeds = torch.where(written[..., None], embeds * (1 + 2 * torch.finfo(embeds.dtype).eps), embeds)
    located = Located(
        sites=find_invocations(input_ids, starts, model.tokens.invocation_ids, model.tokens.end_ids),
        embeds=embeds,
        visual=backbone.visual_states(prompt_places, features),
        images=backbone.rows_of_images(prompt_places, images),
        shown=shown & ~written,
        copies=copies,
    )
    reader = Reader(
        backbone,
        embeds.to(model.dtype),
        attention_mask,
        position_ids(model, input_ids, attention_mask, inputs, copies, starts[0]),
        features,
        copies,
        {name: inputs[name] for name in backbone.token_inputs if inputs.get(name) is not None},
        checkpointing=model.checkpointing,
    )
    # What precedes the first invocation of any row depends on nothing that is trained here.
    first = starts[0] if copies > 1 else min((site.index for row in located.sites for site in row), default=0)
    if copies > 1 or not (shown & ~written)[:, first:].any():
        reader.read_prefix(first)
    return located, reader


def observe(
    model: VisMem, located: Located, reader: Reader, forms: tuple[Kind, ...], blocks: Blocks | None = None
) -> States:
    """Recomputes the observed states of every invocation, without gradient.

    As many passes as the row with the most has invocations, each with all earlier memories in place.
    """
    states: States = [[] for _ in located.sites]
    with torch.no_grad():
        for turn in range(max(map(len, located.sites), default=0)):
            memories, _ = form(model, located, states, forms, blocks)
            hidden = read(located, reader, memories)
            for row, sites in enumerate(located.sites):
                if turn < len(sites):  # the state at position t produced token t + 1
                    site = sites[turn]
                    states[row].append(hidden[row, site.segment_start - 1 : site.index])
    return states


def form(
    model: VisMem, located: Located, states: States, forms: tuple[Kind, ...], blocks: Blocks | None = None
) -> tuple[Memories, Choices]:
    """Forms the memories of as many invocations of each row as there are states, a batch or two for each kind.

    Args:
        model: the model.
        located: the batch.
        states: of the invocations.
        forms: kinds that form a memory.
        blocks: recorded blocks that short memories start from; None lets them choose.

    Returns:
        The memories, and the choices of those that chose.
    """
    memories: Memories = [[None] * len(row) for row in located.sites]
    choices: Choices = [[None] * len(row) for row in located.sites]
    for kind in forms:
        members = [
            (row, index)
            for row, found in enumerate(states)
            for index in range(len(found))
            if located.sites[row][index].kind == kind
        ]
        # A short-term memory does not read the segment, so only the long-term kind is padded.
        lengths = [len(states[row][index]) if kind == "long" else 0 for row, index in members]
        for batch in batches_of_similar_length(lengths):
            part = [members[at] for at in batch]
            observed = [
                located.observation(row, index, states[row][index], None if blocks is None else blocks[row][index])
                for row, index in part
            ]
            for (row, index), memory, choice in zip(part, *model.memory.form(kind, observed), strict=True):
                memories[row][index], choices[row][index] = memory, choice
    return memories, choices


def read(located: Located, reader: Reader, memories: Memories) -> Tensor:
    """Last-layer states [B, L, d] at the tokens, with the memories in their slots."""
    return reader(Splice(located.sites, memories, located.length))


def encode_patches(model: VisMem, located: Located) -> dict[int, list[Patches]]:
    """Images of the prompts whose rows invoke short-term memory, through the short former's adapter, in one batch.

    Raises:
        ValueError: if a row invokes short-term memory and its prompt has no image.
    """
    looking = [row for row, sites in enumerate(located.sites) if any(site.kind == "short" for site in sites)]
    for row in looking:
        if not located.images[row // located.copies]:
            raise ValueError(f"row {row} invokes short-term memory but has no image")
    prompts = sorted({row // located.copies for row in looking})
    encoded: Iterator[Patches] = iter(
        model.memory.short.encode([image for prompt in prompts for image in located.images[prompt]])
    )
    return {prompt: [next(encoded) for _ in located.images[prompt]] for prompt in prompts}


def answer_starts(
    model: VisMem, input_ids: Tensor, labels: Tensor | None, prompt_length: int | Tensor | None
) -> list[int]:
    """Where each row's answer starts: at `prompt_length`, else at its first label.

    Raises:
        ValueError: if neither is given and the rows have memory tokens.
    """
    if prompt_length is not None:
        return torch.as_tensor(prompt_length).expand(len(input_ids)).tolist()
    if labels is None:
        if model.tokens.present(input_ids):
            raise ValueError("forward needs labels or prompt_length to tell where the answers start")
        return [input_ids.shape[1]] * len(input_ids)
    return [int((row != -100).int().argmax()) if (row != -100).any() else len(row) for row in labels]


def position_ids(
    model: VisMem,
    input_ids: Tensor,
    attention_mask: Tensor,
    inputs: dict[str, Any],
    copies: int = 1,
    start: int = 0,
) -> Tensor:
    """Position ids as the base's own `generate` prepares them: [B, L], or [axes, B, L] with M-RoPE.

    With `copies`, answers that start at `start` are text, and count on from where their shared prompt ends.
    """
    if copies > 1:
        shared = position_ids(model, input_ids[::copies, :start], attention_mask[::copies, :start], inputs)
        steps = torch.arange(1, input_ids.shape[1] - start + 1, device=shared.device)
        return torch.cat([shared, shared[..., -1:] + steps], dim=-1).repeat_interleave(copies, -2)
    padded = {
        name: F.pad(values, (0, input_ids.shape[1] - values.shape[1]))  # an answer is text
        for name, values in inputs.items()
        if name.endswith("token_type_ids")
    }
    arguments = {**inputs, **padded, "input_ids": input_ids, "attention_mask": attention_mask}
    found: Tensor = model.base._prepare_position_ids_for_generation(input_ids, arguments)  # noqa: SLF001  # transformers 5.23
    return found
