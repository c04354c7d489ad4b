"""LLaVA-OneVision: a SigLIP tower on the whole picture and on up to 36 tiles, whose tokens may be interpolated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vismem.backbones.base import Image
from vismem.backbones.llava_next import LlavaNextBackbone, inside


class LlavaOnevisionBackbone(LlavaNextBackbone):
    """`LlavaOnevisionForConditionalGeneration`. Short memory does not look at videos.

    A picture alone in its prompt comes in tiles, as LLaVA-NeXT's do; where they have more tokens than about nine
    tiles (`vision_aspect_ratio`), the base interpolates the projected patches. Memory still looks at all patches of
    the tower, and each tile keeps its share of the fewer tokens. With several pictures in a prompt, each is one view
    padded to a square: memory starts from the patches that show the picture.
    """

    model_types: tuple[str, ...] = ("llava_onevision",)
    image_inputs: tuple[str, ...] = ("pixel_values", "image_sizes", "batch_num_images")

    def images(
        self,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        batch_num_images: Tensor | None = None,
        **_: Tensor,
    ) -> list[Image]:
        """As LLaVA-NeXT's; `batch_num_images` [rows] counts the pictures of each prompt that has any."""
        if pixel_values is None or image_sizes is None:
            return []
        sizes = [tuple(size) for size in image_sizes.tolist()]
        alone = [True] * len(sizes)
        if batch_num_images is not None:
            alone = [count == 1 for count in batch_num_images.tolist() for _ in range(count)]
        shapes = [self.tiles(size) if tiled else (0, 0) for size, tiled in zip(sizes, alone, strict=True)]
        return self.pictures(pixel_values, sizes, shapes)

    def views(self, pixels: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> list[Image]:
        if len(pixels) > 1:
            return super().views(pixels, size, shape)
        grid = (self.side, self.side)
        part = inside(grid, size)
        if any(cells.start == cells.stop for cells in part):  # so thin that only padding is left
            part = slice(None), slice(None)
        blocks = torch.arange(self.side**2).view(grid)[part]
        return [Image(pixels[0], grid, self.side**2 + 1, part, blocks)]  # a newline ends it

    def tile_grid(self, height: int, width: int) -> tuple[int, int]:
        most = int(self.base.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(height * width / (most * self.side**2))
        if ratio > 1.1:  # the base's own rule
            height, width = int(height // ratio), int(width // ratio)
        return height, width
