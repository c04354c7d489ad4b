"""Where short-term memory looked: attention of the short former's memory positions over the patches of the pictures.

Looks are recomputed from finished answers with recorded states; the former runs as ever and the weights are computed
beside it. Where a patch lies in a picture is in `views.py`, how a look is drawn in `drawing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pictures
from torch import Tensor

from vismem.analysis.image_geometry import Box, View, views
from vismem.backbones import Image
from vismem.decoding.trace import Invocation
from vismem.memory import ShortTermFormer
from vismem.memory.short_term import coarse_grid, share
from vismem.model import VisMem

Size = tuple[int, int]


@dataclass(frozen=True)
class Look:
    """One short-term invocation's look at its prompt's pictures. Weights are means over the tower's heads.

    A memory of N vectors has P = N * m * m positions in the tower, which the projector merges m x m into one vector.

    Args:
        row: index of the answer.
        index: of the invocation in that answer.
        views: the images that the tower saw: pictures, tiles, crops.
        weights: for each view float32 [layers, P, rows, columns].
        rest: for each other place that attention went to, float32 [layers, P]: `"class token"`, `"query"`, `"memory"`.
            With all of `weights` it adds up to 1.
        starts: for each vector the view whose region it started from, and the region's box in the picture's pixels;
            empty where memory starts from learned constants.
        merge: m.
        memory: the vectors that the look formed [N, d].
    """

    row: int
    index: int
    views: list[View]
    weights: list[Tensor]
    rest: dict[str, Tensor]
    starts: list[tuple[int, Box]]
    merge: int
    memory: Tensor

    @property
    def layers(self) -> int:
        """Blocks of the tower that memory runs through."""
        return len(self.weights[0])

    def vectors(self, view: int) -> Tensor:
        """[layers, N, rows, columns]: the weights of one view by memory vector, mean over its m x m positions."""
        return self.weights[view].unflatten(1, (-1, self.merge**2)).mean(2)

    def mean(self, view: int, layer: int | None = None, vector: int | None = None) -> Tensor:
        """[rows, columns]: one view's weights, mean over layers and vectors but for those that are named."""
        weights = self.vectors(view)
        weights = weights.mean(0) if layer is None else weights[layer]
        return weights.mean(0) if vector is None else weights[vector]

    def shares(self) -> dict[str, Tensor]:
        """Where attention went, float32 [layers, P] each, 1 in all: `"picture"` (patches that show it), `"padding"`
        (patches that do not), `"class token"`, `"query"`, `"memory"`."""
        shown = [torch.from_numpy(view.shown).to(w) for view, w in zip(self.views, self.weights, strict=True)]
        picture: Any = sum((w * s).sum((-2, -1)) for w, s in zip(self.weights, shown, strict=True))
        patches: Any = sum(w.sum((-2, -1)) for w in self.weights)
        return {"picture": picture, "padding": patches - picture, **self.rest}

    def on(
        self, picture: int, size: Size | None = None, layer: int | None = None, vector: int | None = None
    ) -> NDArray[np.float32]:
        """The look laid over one picture: how many times the even share each place of it got.

        Every view's weights are spread evenly over what its patches show; views of the same place add up. The mean
        over the area of all the prompt's pictures is 1, which is a look that went everywhere alike.

        Args:
            picture: index among the prompt's pictures.
            size: width and height of the result; by default the picture's.
            layer, vector: one of them, or None for the mean over all.

        Returns:
            [height, width].
        """
        spreads = [
            Spread(view, self.mean(index, layer, vector).numpy() * view.shown) for index, view in enumerate(self.views)
        ]
        return laid_over(spreads, picture, size)

    def read(self, weights: Tensor, picture: int, size: Size | None = None) -> NDArray[np.float32]:
        """What later tokens read of this memory, laid over one picture by where each vector started.

        A vector holds its region, as far as it is still what it started as, and what it has seen elsewhere since.

        Args:
            weights: [N], attention to this memory's slots (`SlotAttention.slots`), of one token or a mean.
            picture, size: as for `on`, whose scale this has.

        Returns:
            [height, width].

        Raises:
            ValueError: if memory starts from learned constants, so that no vector has a region.
        """
        if not self.starts:
            raise ValueError("with memory_init='learned' no vector starts from a region of the picture")
        spreads = []
        for (view, box), weight in zip(self.starts, weights.tolist(), strict=True):
            region = replace(self.views[view], grid=(1, 1), box=box)
            spreads.append(Spread(region, np.full((1, 1), weight)))
        return laid_over(spreads, picture, size)


@dataclass(frozen=True)
class Spread:
    """Weights [rows, columns] of the patches of a view, or of one region of it, to be spread over what they show."""

    view: View
    weights: NDArray[np.floating]


def laid_over(spreads: list[Spread], picture: int, size: Size | None = None) -> NDArray[np.float32]:
    """Weights laid over one picture, [height, width], so that the mean over the area of all pictures is 1."""
    sizes = {spread.view.picture: spread.view.size for spread in spreads if spread.view.picture >= 0}
    if picture not in sizes:
        raise ValueError(f"this look saw no picture {picture}; there are {', '.join(map(str, sorted(sizes)))}")
    wide, high = sizes[picture]
    size = size or (wide, high)
    found, total = np.zeros((size[1], size[0])), sum(float(spread.weights.sum()) for spread in spreads)
    for view, weights in ((spread.view, spread.weights) for spread in spreads if spread.view.picture == picture):
        (left, top, right, bottom), (rows, columns) = view.box, view.grid
        patch = (right - left) / columns * (bottom - top) / rows
        row = ((np.arange(size[1]) + 0.5) * high / size[1] - top) / (bottom - top) * rows
        column = ((np.arange(size[0]) + 0.5) * wide / size[0] - left) / (right - left) * columns
        inside = ((row >= 0) & (row < rows))[:, None] & ((column >= 0) & (column < columns))[None]
        spread = weights[np.clip(row, 0, rows - 1).astype(int)][:, np.clip(column, 0, columns - 1).astype(int)]
        found += np.where(inside, spread, 0) / patch
    return (found * sum(w * h for w, h in sizes.values()) / max(total, 1e-12)).astype(np.float32)


@contextmanager
def watched(former: ShortTermFormer) -> Iterator[list[Tensor]]:
    """Collects attention weights of a former's own positions while the context lasts, block by block.

    The former attends as ever; the weights are computed a second time, in float32 and without gradient.

    Yields:
        A list that each block adds [n, K + P, patches + K + P] to, mean over heads.
    """
    found: list[Tensor] = []

    @torch.no_grad()
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
def looks(
    model: VisMem,
    inputs: dict[str, Tensor],
    invocations: Sequence[Sequence[Invocation]],
    pictures: Sequence[Sequence[Pictures.Image | Size]],
    **processor_kwargs: Any,
) -> list[Look]:
    """Where the short-term invocations of finished answers looked.

    Args:
        model: the model that wrote them.
        inputs: the processor's output for B prompts.
        invocations: of n answers to each prompt, one after another, with their states, as `generate(..., record=True,
            return_dict_in_generate=True)` gives them.
        pictures: for each prompt its pictures in order, or their sizes (width, height).
        **processor_kwargs: as the prompts' processor was called with, besides padding.

    Returns:
        A `Look` for each short-term invocation that formed a memory, by row and index; tensors are on the CPU.

    Raises:
        ValueError: if states are missing, pictures or answers do not fit the prompts, or memory is not formed.

    Example:
        >>> out = model.generate(**inputs, record=True, return_dict_in_generate=True)
        >>> (look,) = looks(model, inputs, out.invocations, [[picture]])
        >>> look.on(0).shape
    """
    if model.memory_config.content != "formed":
        raise ValueError(f"memory with content={model.memory_config.content!r} looks at nothing: it is not formed")
    backbone, prompts = model.backbone, len(inputs["input_ids"])
    former: Any = model.memory.short
    if len(pictures) != prompts or not invocations or len(invocations) % prompts:
        raise ValueError(
            f"{prompts} prompts, {len(pictures)} lists of pictures and {len(invocations)} answers do not fit: give "
            "each prompt's pictures, and as many answers for each prompt, in order"
        )
    images = backbone.prompt_images(inputs["input_ids"], inputs)
    visual = backbone.prompt_visual_states(inputs["input_ids"], inputs)
    copies, found = len(invocations) // prompts, []
    for prompt in range(prompts):
        wanted = [
            (row, index, invocation)
            for row in range(prompt * copies, (prompt + 1) * copies)
            for index, invocation in enumerate(invocations[row])
            if invocation.kind == "short" and invocation.length
        ]
        if not wanted:
            continue
        for row, index, invocation in wanted:
            if invocation.states is None:
                raise ValueError(
                    f"invocation {index} of answer {row} has no states; call generate with record=True and "
                    "return_dict_in_generate=True"
                )
        seen = views(model, pictures[prompt], **processor_kwargs)
        if [view.grid for view in seen] != [image.grid for image in images[prompt]]:
            raise ValueError(
                f"pictures of these sizes give patches of {[view.grid for view in seen]}, but prompt {prompt} has "
                f"{[image.grid for image in images[prompt]]}: give its pictures in order, and its processor's settings"
            )
        patches = former.encode(images[prompt])
        query = model.memory.builder([visual[prompt]] * len(wanted), [i.states for _, _, i in wanted])
        with watched(former) as layers:
            memories = former(query, [patches] * len(wanted))
        stacked = torch.stack(layers, dim=1)[:, :, query.shape[1] :]  # [n, layers, P, patches + K + P]
        starts = regions(former, images[prompt], seen)
        lengths = [image.keys_values[0].shape[2] for image in patches]
        for (row, index, _), weights, memory in zip(wanted, stacked, memories, strict=True):
            *parts, queries, own = weights.split([*lengths, query.shape[1], weights.shape[1]], dim=-1)
            laid = [raster(model, part, view.grid) for part, view in zip(parts, seen, strict=True)]
            rest = {"class token": torch.zeros_like(queries[..., 0]), "query": queries.sum(-1), "memory": own.sum(-1)}
            for part, patch in zip(parts, laid, strict=True):
                if part.shape[-1] > patch[0, 0].numel():
                    rest["class token"] += part.sum(-1) - patch.sum((-2, -1))
            laid, rest = [patch.cpu() for patch in laid], {name: share.cpu() for name, share in rest.items()}
            found.append(Look(row, index, seen, laid, rest, starts, backbone.merge, memory.cpu()))
    return found


def regions(former: ShortTermFormer, images: list[Image], seen: list[View]) -> list[tuple[int, Box]]:
    """For each vector the view and the box, in the picture's pixels, of the patches that it starts as a mean of."""
    if not former.pooled:
        return []
    total, found = len(former.memory_init) // former.backbone.merge**2, []
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
    """[layers, P, patches] in the tower's order to [layers, P, rows, columns]; a class token is left out."""
    flat = weights.flatten(0, 1).T[None]  # [1, patches, layers * P]: as the tower's states lie
    return model.backbone.to_raster(flat, grid)[0].permute(2, 0, 1).unflatten(0, weights.shape[:2])
