"""Qwen2-VL: a rotary tower with a fused query-key-value projection, and M-RoPE; the basis of later Qwen-VL towers.

The processor writes patches merge block by merge block, and the tower reads them in that order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

from vismem.backbones.base import Backbone, Image, Rotary, Rotation, join_heads


class Qwen2VLBackbone(Backbone):
    """`Qwen2VLForConditionalGeneration`. The base reads videos as usual; memory looks at images only."""

    model_types: tuple[str, ...] = ("qwen2_vl",)
    image_inputs: tuple[str, ...] = ("pixel_values", "image_grid_thw")
    tower_targets: tuple[str, ...] = ("qkv",)
    fused_qkv = True

    @property
    def tower(self) -> Any:
        return self.base.model.visual

    @property
    def blocks(self) -> Any:
        return self.tower.blocks

    @property
    def language_model(self) -> Any:
        return self.base.model.language_model

    @property
    def vision_size(self) -> int:
        return self.tower.patch_embed.proj.out_channels  # the config names it differently in every generation

    @property
    def merge(self) -> int:
        return self.tower.spatial_merge_size

    def images(
        self, pixel_values: Tensor | None = None, image_grid_thw: Tensor | None = None, **_: Tensor
    ) -> list[Image]:
        """The images in packed `pixel_values` [all patches, values per patch] and `image_grid_thw` [images, 3]."""
        if pixel_values is None or image_grid_thw is None:
            return []
        grids = [(height, width) for _time, height, width in image_grid_thw.tolist()]
        pieces = pixel_values.split([height * width for height, width in grids])
        return [Image(p, g, g[0] * g[1] // self.merge**2) for p, g in zip(pieces, grids, strict=True)]

    def embed_patches(self, images: list[Image]) -> Tensor:
        # The convolution's stride is its kernel, so it is a plain product.
        convolution = self.tower.patch_embed.proj
        pixels = torch.stack([image.pixels for image in images]).to(convolution.weight)
        return F.linear(pixels, convolution.weight.flatten(1), convolution.bias)

    def to_raster(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        height, width, side = grid[0] // self.merge, grid[1] // self.merge, self.merge
        blocks = patches.reshape(-1, height, width, side, side, patches.shape[-1])
        return blocks.transpose(2, 3).flatten(1, 2).flatten(2, 3)

    def laid_out(self, image: Image) -> Tensor:
        side = self.tower.patch_embed.proj.kernel_size[-1]
        patches = Qwen2VLBackbone.to_raster(self, image.pixels[None], image.grid)[0]  # as the processor wrote them
        return patches.unflatten(-1, (-1, side, side)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)

    def patch_rotary(self, grid: tuple[int, int]) -> Rotation:
        coordinates = get_vision_position_ids(torch.tensor([[1, *grid]]), self.merge).float()  # [patches, 2]
        return self.rotary_at(coordinates.to(self.tower.rotary_pos_emb.inv_freq.device))

    def rotary_at(self, coordinates: Tensor) -> Rotation:
        cos, sin = self.tower.rotary_pos_emb(coordinates, coordinates.flatten(0, -2))
        return cos.unflatten(0, coordinates.shape[:-1]), sin.unflatten(0, coordinates.shape[:-1])

    def qkv(self, block: Any, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision  # slow to import

        assert rotary is not None  # Qwen's towers rotate
        heads = block.attn.num_heads
        fused = block.attn.qkv(block.norm1(hidden)).unflatten(-1, (3, heads, -1))  # [n, t, 3, heads, head_dim]
        query, key, value = fused.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, *rotary)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)

    def finish(self, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + block.attn.proj(join_heads(attended))
        return hidden + block.mlp(block.norm2(hidden))

    def project(self, hidden: Tensor) -> Tensor:
        merged = self.tower.merger(hidden.flatten(0, 1))
        return merged.unflatten(0, (hidden.shape[0], -1))
