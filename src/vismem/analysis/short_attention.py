"""What short-term memory attends to: the short former's memory positions over the patches of the pictures.

Recomputed from finished answers with recorded states: the former runs again and its weights are computed beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pictures
from torch import Tensor

from vismem.analysis.image_geometry import Box, View, views
from vismem.analysis.rollouts import recorded_invocations
from vismem.backbones import Image
from vismem.decoding.trace import Invocation
from vismem.deprecation import renamed
from vismem.memory import Choice, ShortTermFormer
from vismem.memory.short_term import coarse_grid, share
from vismem.model import VisMem

Size = tuple[int, int]


@dataclass(frozen=True)
class ShortTermAttention:
    """What one short-term memory attended to while it was formed. Weights are means over the tower's heads.

    A memory of N vectors has P = N * m * m positions in the tower; the projector merges m x m of them into one vector.

    Args:
        row: index of the answer.
        index: of the invocation in that answer.
        views: the images that the tower saw: pictures, tiles, crops.
        weights: for each view float32 [layers, P, rows, columns].
        rest: the remaining attention, float32 [layers, P] each: `"class token"`, `"query"`, `"memory"`. Sums to 1 with
            `weights`.
        starts: for each vector the index of the view whose region it started from, and the region's box in the
            picture's pixels; empty if memory starts from learned constants.
        certainty: for each vector the probability of its region, [N], if the memory chooses where it starts
            (`memory_init="attended"`); else None.
        merge: m.
        memory: the memory [N, d].
    """

    row: int
    index: int
    views: list[View]
    weights: list[Tensor]
    rest: dict[str, Tensor]
    starts: list[tuple[int, Box]]
    merge: int
    memory: Tensor
    certainty: Tensor | None = None

    @property
    def layers(self) -> int:
        """Number of the tower's blocks that form memory."""
        return len(self.weights[0])

    def vectors(self, view: int) -> Tensor:
        """[layers, N, rows, columns]: one view's weights for each memory vector, averaged over its m x m positions."""
        return self.weights[view].unflatten(1, (-1, self.merge**2)).mean(2)

    def mean(self, view: int, layer: int | None = None, vector: int | None = None) -> Tensor:
        """[rows, columns]: one view's weights, of one layer and vector or averaged over all."""
        weights = self.vectors(view)
        weights = weights.mean(0) if layer is None else weights[layer]
        return weights.mean(0) if vector is None else weights[vector]

    def shares(self) -> dict[str, Tensor]:
        """Fractions of attention, float32 [layers, P] each, summing to 1.

        `"picture"` counts patches that show a picture, `"padding"` all other patches; then `"class token"`, `"query"`
        and `"memory"`.
        """
        shown = [torch.from_numpy(view.shown).to(w) for view, w in zip(self.views, self.weights, strict=True)]
        picture: Any = sum((w * s).sum((-2, -1)) for w, s in zip(self.weights, shown, strict=True))
        patches: Any = sum(w.sum((-2, -1)) for w in self.weights)
        return {"picture": picture, "padding": patches - picture, **self.rest}

    def on(
        self, picture: int, size: Size | None = None, layer: int | None = None, vector: int | None = None
    ) -> NDArray[np.float32]:
        """Attention over one picture, relative to uniform attention.

        Each patch's weight is spread evenly over the area that it shows; overlapping views add up. The mean over the
        area of all the prompt's pictures is 1.

        Args:
            picture: index of the picture in the prompt.
            size: width and height of the result; by default the picture's.
            layer, vector: an index, or None for the mean over all.

        Returns:
            [height, width].
        """
        patches = [(view, self.mean(i, layer, vector).numpy() * view.shown) for i, view in enumerate(self.views)]
        return laid_over(patches, picture, size)

    def read(self, weights: Tensor, picture: int, size: Size | None = None) -> NDArray[np.float32]:
        """Later tokens' attention to this memory's slots, laid over one picture by the region each vector started from.

        A vector stands for its region only as far as it still holds what it started from.

        Args:
            weights: [N], attention to this memory's slots (`SlotAttention.slots`), of one token or a mean.
            picture, size: see `on`, whose scale this uses.

        Returns:
            [height, width].

        Raises:
            ValueError: if memory starts from learned constants, so vectors have no region.
        """
        if not self.starts:
            raise ValueError("with memory_init='learned' vectors do not start from a region of the picture")
        regions = [(replace(view, grid=(1, 1)), np.zeros((1, 1))) for view in self.views]  # all are seen
        regions += [
            (replace(self.views[view], grid=(1, 1), box=box), np.full((1, 1), weight))
            for (view, box), weight in zip(self.starts, weights.tolist(), strict=True)
        ]
        return laid_over(regions, picture, size)


def laid_over(
    patches: Sequence[tuple[View, NDArray[np.floating]]], picture: int, size: Size | None
) -> NDArray[np.float32]:
    """Views' weights [rows, columns] laid over one picture, [height, width]; their mean over all pictures is 1."""
    sizes = {view.picture: view.size for view, _ in patches if view.picture >= 0}
    if picture not in sizes:
        raise ValueError(f"no picture {picture} was seen; there are {', '.join(map(str, sorted(sizes)))}")
    wide, high = sizes[picture]
    size = size or (wide, high)
    found, total = np.zeros((size[1], size[0])), sum(float(weights.sum()) for _, weights in patches)
    for view, weights in patches:
        if view.picture != picture:
            continue
        (left, top, right, bottom), (rows, columns) = view.box, view.grid
        patch = (right - left) / columns * (bottom - top) / rows
        row = ((np.arange(size[1]) + 0.5) * high / size[1] - top) / (bottom - top) * rows
        column = ((np.arange(size[0]) + 0.5) * wide / size[0] - left) / (right - left) * columns
        inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None]
        spread = weights[np.clip(row, 0, rows - 1).astype(int)][:, np.clip(column, 0, columns - 1).astype(int)]
        found += np.where(inside, spread, 0) / patch
    return (found * sum(w * h for w, h in sizes.values()) / max(total, 1e-12)).astype(np.float32)


@contextmanager
def block_weights(former: ShortTermFormer) -> Iterator[list[Tensor]]:
    """Collects the attention weights of a former's own positions, block by block, while the context lasts.

    They are computed a second time in float32; the former's own attention is unchanged.

    Yields:
        A list that each block appends its weights to, [n, K + P, patches + K + P], averaged over heads.
    """
    found: list[Tensor] = []

    def watch(query: Tensor, key: Tensor, mask: Tensor | None) -> None:
        scores = query.float() @ key.float().mT * query.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        found.append(scores.softmax(-1).mean(1))

    before, former.watch = former.watch, watch
    try:
        yield found
    finally:
        former.watch = before


@torch.no_grad()
def short_term_attention(
    model: VisMem,
    inputs: dict[str, Tensor],
    invocations: Sequence[Sequence[Invocation]],
    pictures: Sequence[Sequence[Pictures.Image | Size]],
    **processor_kwargs: Any,
) -> list[ShortTermAttention]:
    """What the short-term memories of finished answers attended to.

    Args:
        model: the model that wrote them.
        inputs: the processor's output for B prompts.
        invocations: of n answers to each prompt, prompt by prompt, with their states, from `generate(...,
            record=True, return_dict_in_generate=True)`.
        pictures: for each prompt its pictures in order, or their sizes (width, height).
        **processor_kwargs: the arguments of the prompts' processor call, except padding.

    Returns:
        One entry for each short-term invocation that formed a memory, by row and index; tensors are on the CPU.

    Raises:
        ValueError: if states are missing, pictures or answers do not match the prompts, or memory is not formed.

    Example:
        >>> out = model.generate(**inputs, record=True, return_dict_in_generate=True)
        >>> (attention,) = short_term_attention(model, inputs, out.invocations, [[picture]])
        >>> attention.on(0).shape
    """
    backbone, prompts = model.backbone, len(inputs["input_ids"])
    former: Any = model.memory.short
    if len(pictures) != prompts or not invocations or len(invocations) % prompts:
        raise ValueError(
            f"{prompts} prompts, {len(pictures)} lists of pictures and {len(invocations)} answers do not match: pass "
            "each prompt's pictures, and the same number of answers for each prompt, in order"
        )
    recorded = recorded_invocations(model, invocations, "short")
    images = backbone.prompt_images(inputs["input_ids"], inputs)
    visual = backbone.prompt_visual_states(inputs["input_ids"], inputs)
    copies, found = len(invocations) // prompts, []
    for prompt, group in groupby(recorded, lambda each: each[0] // copies):
        wanted = list(group)
        seen = views(model, pictures[prompt], **processor_kwargs)
        if [view.grid for view in seen] != [image.grid for image in images[prompt]]:
            raise ValueError(
                f"pictures of these sizes have patch grids {[view.grid for view in seen]}, but prompt {prompt} has "
                f"{[image.grid for image in images[prompt]]}: pass its pictures in order and its processor arguments"
            )
        patches = former.encode(images[prompt])
        query = model.memory.builder([visual[prompt]] * len(wanted), [i.states for _, _, i in wanted])
        with block_weights(former) as layers:
            blocks = None if former.choice is None else [i.choice.blocks for _, _, i in wanted if i.choice is not None]
            memories = former(query, [patches] * len(wanted), blocks)
        stacked = torch.stack(layers, dim=1)[:, :, query.shape[1] :]  # [n, layers, P, patches + K + P]
        lengths = [image.keys_values[0].shape[2] for image in patches]
        for (row, index, invocation), weights, memory in zip(wanted, stacked, memories, strict=True):
            starts = regions(former, images[prompt], seen, invocation.choice)
            sure = None if invocation.choice is None else invocation.choice.log_probs.exp()
            *parts, queries, own = weights.split([*lengths, query.shape[1], weights.shape[1]], dim=-1)
            laid = [raster(model, part, view.grid) for part, view in zip(parts, seen, strict=True)]
            rest = {"class token": torch.zeros_like(queries[..., 0]), "query": queries.sum(-1), "memory": own.sum(-1)}
            for part, patch in zip(parts, laid, strict=True):
                if part.shape[-1] > patch[0, 0].numel():
                    rest["class token"] += part.sum(-1) - patch.sum((-2, -1))
            laid, rest = [patch.cpu() for patch in laid], {name: share.cpu() for name, share in rest.items()}
            found.append(
                ShortTermAttention(row, index, seen, laid, rest, starts, backbone.merge, memory.cpu(), certainty=sure)
            )
    return found


def regions(
    former: ShortTermFormer, images: list[Image], seen: list[View], choice: Choice | None = None
) -> list[tuple[int, Box]]:
    """For each vector the view and the box, in the picture's pixels, of the patches it starts from."""
    if former.constant:
        return []
    side, found = former.backbone.merge, []
    if choice is not None:
        for index, row, column in choice.places:
            rows, columns = (range(n)[part] for n, part in zip(images[index].grid, images[index].part, strict=True))
            first = seen[index].patch(rows[row * side], columns[column * side])
            last = seen[index].patch(rows[row * side] + side - 1, columns[column * side] + side - 1)
            found.append((index, (*first[:2], *last[2:])))
        return found
    total = len(former.memory_init) // side**2
    for index, count in enumerate(share(total, [image.tokens for image in images])):
        rows, columns = (
            range(length)[part] for length, part in zip(images[index].grid, images[index].part, strict=True)
        )
        if not count:
            continue
        down, across = coarse_grid(count, (len(rows), len(columns)))
        for place in range(count):
            row, column = divmod(place, across)
            left, top = columns[0] + column * len(columns) / across, rows[0] + row * len(rows) / down
            wide, high = len(columns) / across, len(rows) / down
            ends = seen[index].patch(top, left), seen[index].patch(top + high - 1, left + wide - 1)
            found.append((index, (*ends[0][:2], *ends[1][2:])))
    return found


def raster(model: VisMem, weights: Tensor, grid: tuple[int, int]) -> Tensor:
    """[layers, P, patches] in the tower's order to [layers, P, rows, columns]; drops a class token."""
    flat = weights.flatten(0, 1).T[None]  # [1, patches, layers * P], the layout of the tower's states
    return model.backbone.to_raster(flat, grid)[0].permute(2, 0, 1).unflatten(0, weights.shape[:2])


__getattr__ = renamed(__name__, {"Look": "ShortTermAttention", "looks": "short_term_attention"})
