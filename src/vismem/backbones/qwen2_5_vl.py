"""Qwen2.5-VL: Qwen2-VL's tower with windowed attention in most blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from vismem.backbones.base import Image, Rotation
from vismem.backbones.qwen2_vl import Qwen2VLBackbone


class Qwen25VLBackbone(Qwen2VLBackbone):
    """`Qwen2_5_VLForConditionalGeneration`. Patches attend within their window; memory attends to all of them."""

    model_types: tuple[str, ...] = ("qwen2_5_vl",)

    def embed_patches(self, images: list[Image]) -> Tensor:
        return self._to_windows(super().embed_patches(images), images[0].grid)

    def to_raster(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        order, _ = self._windows(grid)
        blocks = patches.unflatten(1, (-1, self.merge**2))[:, order.argsort().to(patches.device)]
        return super().to_raster(blocks, grid)

    def patch_rotary(self, grid: tuple[int, int]) -> Rotation:
        cos, sin = super().patch_rotary(grid)
        return self._to_windows(cos[None], grid)[0], self._to_windows(sin[None], grid)[0]

    def attend_patches(self, depth: int, grid: tuple[int, int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if depth in self.tower.fullatt_block_indexes:
            return F.scaled_dot_product_attention(query, key, value)
        _, lengths = self._windows(grid)
        if len(set(lengths)) == 1:  # windows of one size go through together
            shape = (-1, lengths[0])
            apart = (states.unflatten(2, shape).transpose(1, 2).flatten(0, 1) for states in (query, key, value))
            attended = F.scaled_dot_product_attention(*apart)
            return attended.unflatten(0, (len(query), -1)).transpose(1, 2).flatten(2, 3)
        windows = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*window) for window in windows], dim=2)

    def _windows(self, grid: tuple[int, int]) -> tuple[Tensor, list[int]]:
        """Order of the merge blocks, window by window, and each window's number of patches."""
        order, ends = get_vision_window_index(
            torch.tensor([[1, *grid]]), self.merge, self.tower.window_size, self.tower.patch_size
        )
        return order, ends.diff().tolist()

    def _to_windows(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[n, patches, ...] from block order (what the processor writes) to window order (what the tower reads)."""
        order, _ = self._windows(grid)
        return patches.unflatten(1, (-1, self.merge**2))[:, order.to(patches.device)].flatten(1, 2)
