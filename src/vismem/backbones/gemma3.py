"""Gemma 3: a SigLIP tower, a projector that averages squares of patches, and scaled token embeddings.

The language model reads an image's tokens in both directions, by `token_type_ids`, and text in one; most of its
layers attend within a window only. Pan-and-scan adds crops of a picture, each an `Image` of its own after the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vismem.backbones.base import Image
from vismem.backbones.clip import ClipTowerBackbone


class Gemma3Backbone(ClipTowerBackbone):
    """`Gemma3ForConditionalGeneration`."""

    model_types: tuple[str, ...] = ("gemma3",)
    image_inputs: tuple[str, ...] = ("pixel_values",)
    token_inputs: tuple[str, ...] = ("token_type_ids",)

    @property
    def embedding_scale(self) -> float:
        table = self.embeddings  # rounds its scale as here; also works without weights
        return float(torch.tensor(table.scalar_embed_scale, dtype=table.weight.dtype, device="cpu"))

    @property
    def tower(self) -> Any:
        return self.base.model.vision_tower

    @property
    def language_model(self) -> Any:
        return self.base.model.language_model

    @property
    def merge(self) -> int:
        return self.base.model.multi_modal_projector.kernel_size

    def images(self, pixel_values: Tensor | None = None, **_: Tensor) -> list[Image]:
        """One `Image` for each picture and each crop in `pixel_values` [images, 3, H, W], all of one size."""
        if pixel_values is None:
            return []
        projector = self.base.model.multi_modal_projector
        grid, tokens = (projector.patches_per_image,) * 2, projector.tokens_per_side**2
        return [Image(pixels, grid, tokens) for pixels in pixel_values]

    def embed_patches(self, images: list[Image]) -> Tensor:
        return self.tower.embeddings(torch.stack([image.pixels for image in images]))

    def project(self, hidden: Tensor) -> Tensor:
        # A square of patches is averaged into one token, in whatever order its patches come.
        projector = self.base.model.multi_modal_projector
        squares = self.tower.post_layernorm(hidden).unflatten(1, (-1, self.merge**2)).mean(2)
        return projector.mm_soft_emb_norm(squares) @ projector.mm_input_projection_weight
