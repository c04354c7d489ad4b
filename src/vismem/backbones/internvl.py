"""InternVL 3 and 3.5: a tower with a class token and layer scale, images in tiles, and a pixel shuffle.

A picture becomes up to twelve square tiles and a thumbnail of the whole; each is an `Image` of its own. The class
token stands before the patches: memory looks at it as patches do, but it has no place in the image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vismem.backbones.base import Backbone, Image, Rotary, join_heads, split_heads


class InternVLBackbone(Backbone):
    """`InternVLForConditionalGeneration`. A video's frames are images too, in order, as they are for the base."""

    model_types: tuple[str, ...] = ("internvl",)
    image_inputs: tuple[str, ...] = ("pixel_values",)

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        layer, strategy = base.config.vision_feature_layer, base.config.vision_feature_select_strategy
        if layer != -1 or strategy != "default":
            raise ValueError(
                "the internvl backbone reads the tower's last layer without its class token; this base's config has "
                f"vision_feature_layer={layer!r} and vision_feature_select_strategy={strategy!r}: write a backbone "
                "for it (docs/extend.md)"
            )

    @property
    def tower(self) -> Any:
        return self.base.model.vision_tower

    @property
    def blocks(self) -> Any:
        return self.tower.encoder.layer

    @property
    def language_model(self) -> Any:
        return self.base.model.language_model

    @property
    def vision_size(self) -> int:
        return self.base.config.vision_config.hidden_size

    @property
    def merge(self) -> int:
        return round(1 / self.base.config.downsample_ratio)

    def images(self, pixel_values: Tensor | None = None, **_: Tensor) -> list[Image]:
        """One `Image` for each tile of `pixel_values` [tiles, 3, H, W]."""
        if pixel_values is None:
            return []
        high, wide = self.tower.embeddings.patch_size
        grid = (pixel_values.shape[-2] // high, pixel_values.shape[-1] // wide)
        return [Image(tile, grid, grid[0] * grid[1] // self.merge**2) for tile in pixel_values]

    def embed_patches(self, images: list[Image]) -> Tensor:
        # [n, 1 + patches, d_vision]: the class token is one more key for every patch and every memory.
        return self.tower.embeddings(torch.stack([image.pixels for image in images]))

    def to_raster(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches[:, 1:].unflatten(1, grid)

    def qkv(self, block: Any, hidden: Tensor, _rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        attention, states = block.attention, block.layernorm_before(hidden)
        query = attention.q_norm(attention.q_proj(states))  # over the full width, before the heads are split
        key = attention.k_norm(attention.k_proj(states))
        value = attention.v_proj(states)
        query, key, value = (split_heads(part, attention.head_dim) for part in (query, key, value))
        return query, key, value

    def finish(self, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + block.lambda_1 * block.attention.projection_layer(join_heads(attended))
        return hidden + block.lambda_2 * block.mlp(block.layernorm_after(hidden))

    def project(self, hidden: Tensor) -> Tensor:
        # The shuffle lays a block's vectors side by side, row by row; ours come in that order.
        blocks = self.tower.layernorm(hidden).unflatten(1, (-1, self.merge**2)).flatten(2)
        return self.base.model.multi_modal_projector(blocks)
