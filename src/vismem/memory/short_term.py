"""The short-term former (Eq. 6): the base's vision encoder, with its own adapter, looks at the image again.

Patches go through the adapted tower once per image (`encode`). Later invocations reuse their keys and values, and run
only the query and the memory positions. Patches never attend to those, so caching is exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vismem.backbones import Backbone, Image, Patches
from vismem.config import VisMemConfig
from vismem.memory.adapter import Adapter
from vismem.memory.choice import BlockChoice


class ShortTermFormer(nn.Module):
    """`M = P(F([X, Q, M_init])[-N_s*m*m:])`, X the patches of all the row's images, P the base's projector.

    With `memory_init="pooled"` the memory positions start as a coarse grid of pooled patches, plus a learned offset
    and a learned mixture of the queries, both initially zero: untrained, it is a coarse second look at the image. With
    `"attended"` they start as whole blocks of patches that the query chose (`choice.py`), plus the same two.
    """

    def __init__(self, backbone: Backbone, config: VisMemConfig) -> None:
        super().__init__()
        self.backbone, self.constant = backbone, config.memory_init == "learned"
        attended, hidden_size = config.memory_init == "attended", backbone.hidden_size
        self.choice = BlockChoice(hidden_size, config.short_length, config.query_length) if attended else None
        positions = config.short_length * backbone.merge**2  # the projector merges m x m of them into one vector
        self.checkpointing = False
        # Called in every block with queries, keys and mask, for analysis.
        self.watch: Callable[[Tensor, Tensor, Tensor | None], None] | None = None
        self.query_in = nn.Linear(backbone.hidden_size, backbone.vision_size)
        start = torch.zeros(positions, backbone.vision_size)
        self.memory_init = nn.Parameter(0.02 * torch.randn_like(start) if self.constant else start)
        if not self.constant:
            self.query_mix = nn.Parameter(torch.zeros(positions, config.query_length))
        self.adapter = Adapter(
            backbone.tower,
            backbone.tower_targets,
            config.lora_r,
            config.lora_alpha,
            config.lora_dropout,
            fused_qkv=backbone.fused_qkv,
        )

    def encode(self, images: list[Image]) -> list[Patches]:
        """Patch keys and values of each image, through the adapted tower."""
        with self.adapter.on():
            if not (self.checkpointing and torch.is_grad_enabled()):
                return self.backbone.encode(images)
            # The backward pass recomputes a block long after this context has ended, so it needs the adapter on again.
            again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), self.adapter.on()))
            return self.backbone.encode(images, again)

    def start(self, patches: list[Patches], blocks: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """M_init of one row without the query's share: vectors [N_s*m*m, d_vision] and coordinates [N_s*m*m, 2].

        Args:
            patches: the row's images.
            blocks: the chosen blocks [N_s], if there is a choice.
        """
        side = self.backbone.merge
        if self.constant:
            return self.memory_init, self.memory_init.new_zeros(len(self.memory_init), 2)
        if self.choice is not None:
            assert blocks is not None
            vectors, coordinates = block_patches(patches, blocks, side)
            return vectors + self.memory_init.to(vectors), coordinates
        shares = share(len(self.memory_init) // side**2, [image.tokens for image in patches])
        pools = [pool(image.embedded, n, side) for image, n in zip(patches, shares, strict=True) if n]
        vectors, coordinates = (torch.cat(part) for part in zip(*pools, strict=True))
        return vectors + self.memory_init.to(vectors), coordinates

    def forward(self, query: Tensor, patches: list[list[Patches]], blocks: list[Tensor] | None = None) -> Tensor:
        """Short-term memory for n invocations.

        Args:
            query: Q [n, K, d].
            patches: for each invocation the encoded images of its row, in order; at least one.
            blocks: for each invocation the blocks [N_s] that were chosen, with `memory_init="attended"`.

        Returns:
            [n, N_s, d], at the scale of the base's visual tokens.
        """
        backbone = self.backbone
        place = patches[0][0].keys_values[0].device  # the tower's: a device map may have placed it elsewhere
        seen = self.query_in(query.to(self.query_in.weight)).to(place)  # [n, K, d_vision]
        begun = [self.start(row, None if blocks is None else blocks[index]) for index, row in enumerate(patches)]
        starts, coordinates = (torch.stack(part) for part in zip(*begun, strict=True))
        if not self.constant:
            starts = starts + self.query_mix.to(place) @ seen
        # Trained weights may have a wider dtype than the frozen tower.
        dtype = patches[0][0].embedded.dtype
        hidden = torch.cat([seen.to(dtype), starts.to(dtype)], dim=1)  # [n, K + N_s*m*m, d_vision]
        # The query has no position in the image: coordinates (0, 0) leave it unrotated.
        rotary = backbone.rotary_at(F.pad(coordinates, (0, 0, seen.shape[1], 0)))

        lengths = [sum(image.keys_values[0].shape[2] for image in row) for row in patches]
        longest, mask = max(lengths), None
        if min(lengths) < longest:
            position = torch.arange(longest + hidden.shape[1], device=hidden.device)
            real = torch.tensor(lengths, device=hidden.device)[:, None]
            mask = ((position < real) | (position >= longest))[:, None, None]  # [n, 1, 1, patches + t]
        with self.adapter.on():
            for depth, block in enumerate(backbone.blocks):
                q, k, v = backbone.qkv(block, hidden, rotary)
                own = torch.stack([k, v], dim=1)  # [n, 2, heads, t, head_dim]
                layers = []
                for row, length, mine in zip(patches, lengths, own, strict=True):  # copies each patch once
                    parts = [image.keys_values[depth].to(mine) for image in row]
                    if length < longest:
                        parts.append(mine.new_zeros(*mine.shape[:2], longest - length, mine.shape[3]))
                    layers.append(torch.cat([*parts, mine], dim=2))
                keys, values = (torch.stack(layers) if layers[1:] else layers[0][None]).unbind(1)
                if self.watch is not None:
                    self.watch(q, keys, mask)
                attended = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
                hidden = backbone.finish(block, hidden, attended)
            return backbone.project(hidden[:, seen.shape[1] :]).to(query)


def block_patches(patches: list[Patches], blocks: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The patches of some blocks of a row's images.

    Args:
        patches: the row's images.
        blocks: [N], numbered through the images in order, each row by row.
        side: m of the projector.

    Returns:
        Vectors [N * m * m, d_vision] in block order, and their coordinates [N * m * m, 2] in patches.
    """
    members, coordinates, first = [], [], 0
    for image in patches:
        height, width, _ = image.embedded.shape
        rows, columns = image.blocks.shape
        numbers = torch.arange(first, first + height * width).view(height, width)[: rows * side, : columns * side]
        members.append(numbers.unflatten(0, (rows, side)).unflatten(2, (columns, side)).transpose(1, 2).flatten(0, 1))
        axes = torch.arange(height).float(), torch.arange(width).float()
        coordinates.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1))
        first += height * width
    device = patches[0].embedded.device
    index = torch.cat([cells.flatten(1) for cells in members]).to(device)[blocks.to(device)].flatten()
    embedded = [image.embedded.flatten(0, 1) for image in patches]
    flat = torch.cat(embedded) if embedded[1:] else embedded[0]
    return flat[index], torch.cat(coordinates).to(device)[index]


def share(total: int, weights: list[int]) -> list[int]:
    """Distributes `total` vectors over images in proportion to `weights`, at least one each.

    With fewer vectors than images, evenly spaced images get one each.

    Example:
        >>> share(8, [16, 48])
        [2, 6]
    """
    count = len(weights)
    if count >= total:
        chosen = {round(i * (count - 1) / max(total - 1, 1)) for i in range(total)}
        return [int(i in chosen) for i in range(count)]
    shares = [1] * count
    for _ in range(total - count):  # each next vector to the image with the most visual tokens per vector
        shares[max(range(count), key=lambda i: weights[i] / (shares[i] + 1))] += 1
    return shares


def coarse_grid(total: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns with rows * columns = total, in the shape closest to that of `grid`."""
    wanted = math.log(grid[0] / grid[1])
    shapes = [(rows, total // rows) for rows in range(1, total + 1) if total % rows == 0]
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - wanted))


def averaging(source: int, target: int, device: torch.device) -> Tensor:
    """[target, source] weights that average a line of `source` cells into `target` equal parts, or repeat cells."""
    edges = torch.arange(target + 1, device=device) * source / target
    cells = torch.arange(source, device=device)
    if target <= source:
        inside = (cells >= edges[:-1, None].floor()) & (cells < edges[1:, None].ceil())
    else:
        inside = cells == ((edges[:-1] + edges[1:]) / 2).floor()[:, None]
    return inside / inside.sum(1, keepdim=True)


def pool(embedded: Tensor, total: int, side: int) -> tuple[Tensor, Tensor]:
    """A coarse view of an image: `total` blocks of side x side cells, in block order.

    Args:
        embedded: [height, width, d_vision] patch embeddings.
        total: memory vectors for this image.
        side: m of the projector.

    Returns:
        Vectors [total * m * m, d_vision] and the centres [total * m * m, 2] of their regions, in patches.
    """
    height, width, _ = embedded.shape
    rows, columns = coarse_grid(total, (height, width))
    down = averaging(height, rows * side, embedded.device)
    across = averaging(width, columns * side, embedded.device)
    cells = torch.einsum("ah,bw,hwd->abd", down.to(embedded), across.to(embedded), embedded)
    middle = [weights @ torch.arange(weights.shape[1], device=weights.device).float() for weights in (down, across)]
    centres = torch.stack(torch.meshgrid(*middle, indexing="ij"), dim=-1)

    def blocks(grid: Tensor) -> Tensor:
        return grid.reshape(rows, side, columns, side, -1).transpose(1, 2).reshape(total * side**2, -1)

    return blocks(cells), blocks(centres)
