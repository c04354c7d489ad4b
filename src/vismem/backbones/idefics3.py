"""Idefics3 and SmolVLM: a SigLIP tower with learned positions and a pixel shuffle before a linear projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vismem.backbones.base import Image
from vismem.backbones.clip import ClipTowerBackbone


class Idefics3Backbone(ClipTowerBackbone):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration`."""

    model_types: tuple[str, ...] = ("idefics3", "smolvlm")
    image_inputs: tuple[str, ...] = ("pixel_values", "pixel_attention_mask")

    @property
    def tower(self) -> Any:
        return self.base.model.vision_model

    @property
    def language_model(self) -> Any:
        return self.base.model.text_model

    @property
    def merge(self) -> int:
        return self.base.config.scale_factor

    def images(
        self, pixel_values: Tensor | None = None, pixel_attention_mask: Tensor | None = None, **_: Tensor
    ) -> list[Image]:
        """The images in `pixel_values` [B, most, 3, H, W]; an all-zero one is the processor's padding."""
        if pixel_values is None:
            return []
        patch = self.tower.patch_size
        pixels = pixel_values.flatten(0, 1)
        masks = None if pixel_attention_mask is None else pixel_attention_mask.flatten(0, 1).bool()
        found = []
        for index in (pixels != 0).flatten(1).any(1).nonzero().flatten().tolist():
            height, width = pixels.shape[-2:]
            tokens = (height // patch) * (width // patch) // self.merge**2
            if masks is not None:
                height, width = int(masks[index].any(1).sum()), int(masks[index].any(0).sum())
            # A patch counts as soon as one of its pixels does, as in the base; a cut-off patch at the edge never.
            grid = tuple(
                min(-(-real // patch), full // patch)
                for real, full in zip((height, width), pixels.shape[-2:], strict=True)
            )
            full = tuple(side // patch // self.merge for side in pixels.shape[-2:])
            blocks = torch.arange(full[0] * full[1]).view(full)[: grid[0] // self.merge, : grid[1] // self.merge]
            image = pixels[index, :, : grid[0] * patch, : grid[1] * patch]
            found.append(Image(image, grid, tokens, blocks=blocks))
        return found

    def embed_patches(self, images: list[Image]) -> Tensor:
        pixels = torch.stack([image.pixels for image in images])
        embeddings = self.tower.embeddings
        weight = embeddings.patch_embedding.weight
        everywhere = torch.ones(len(images), *images[0].grid, dtype=torch.bool, device=weight.device)
        return embeddings(pixel_values=pixels.to(weight), patch_attention_mask=everywhere)

    def project(self, hidden: Tensor) -> Tensor:
        # The connector's shuffle lays the vectors of a block side by side; ours come in blocks already.
        blocks = self.tower.post_layernorm(hidden).unflatten(1, (-1, self.merge**2)).flatten(2)
        return self.base.model.connector.modality_projection(blocks)
