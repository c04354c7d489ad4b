"""LLaVA-NeXT: LLaVA's tower on the whole picture and on tiles of a larger, padded copy."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from vismem.backbones.base import Image
from vismem.backbones.llava import LlavaBackbone


class LlavaNextBackbone(LlavaBackbone):
    """`LlavaNextForConditionalGeneration`.

    A picture is seen whole, squeezed into a square, and again in tiles, row by row, padded to fill their grid: each
    view is an `Image` of its own. The base drops the tiles' padding and ends every row of patches with a learned
    newline. So the tokens of all tiles, newlines included, are shared out in proportion to each tile's patches that
    show the picture; its share decides how many memory vectors start from it. Memory starts from those patches alone,
    but looks at the padding too, as the patches do. A tile without a token is left out.
    """

    model_types: tuple[str, ...] = ("llava_next",)
    image_inputs: tuple[str, ...] = ("pixel_values", "image_sizes")

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        if self.class_tokens and base.config.vision_feature_select_strategy != "default":
            raise ValueError(
                f"the {self.model_type} base lays tiles side by side, and a class token has no place there: "
                "vision_feature_select_strategy must be 'default' in the base's config"
            )

    def images(self, pixel_values: Tensor | None = None, image_sizes: Tensor | None = None, **_: Tensor) -> list[Image]:
        """The views of each picture in `pixel_values`, [pictures, most views, 3, H, W] or all views [.., 3, H, W].

        `image_sizes` [pictures, 2] are the pictures' own heights and widths.
        """
        if pixel_values is None or image_sizes is None:
            return []
        sizes = [tuple(size) for size in image_sizes.tolist()]
        return self.pictures(pixel_values, sizes, [self.tiles(size) for size in sizes])

    def pictures(
        self, pixel_values: Tensor, sizes: list[tuple[int, int]], shapes: list[tuple[int, int]]
    ) -> list[Image]:
        """The views of all pictures, given their `sizes` and the `shapes` of their grids of tiles."""
        counts = [1 + rows * columns for rows, columns in shapes]
        if pixel_values.dim() == 4:
            pixels = pixel_values.split(counts)
        else:  # padded to the most views
            pixels = [views[:count] for views, count in zip(pixel_values, counts, strict=True)]
        pictures = zip(pixels, sizes, shapes, strict=True)
        return [image for picture in pictures for image in self.views(*picture)]

    @property
    def side(self) -> int:
        """Patches on each side of a view."""
        vision = self.base.config.vision_config
        return vision.image_size // vision.patch_size

    def tiles(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tiles of a picture of `size` (height, width)."""
        from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape  # slow to import

        config = self.base.config
        return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)

    def views(self, pixels: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> list[Image]:
        """The views in `pixels` [views, ...] of a picture of `size`: the whole, then `shape` (rows, columns) tiles."""
        side = self.side
        down, across = inside((shape[0] * side, shape[1] * side), size)
        parts = [
            (overlap(down, row * side, side), overlap(across, column * side, side))
            for row in range(shape[0])
            for column in range(shape[1])
        ]
        patches = [(rows.stop - rows.start) * (columns.stop - columns.start) for rows, columns in parts]
        shown = (down.stop - down.start, across.stop - across.start)
        high, wide = self.tile_grid(*shown)
        total = high * (wide + 1)  # a newline ends each row
        if not any(patches):  # newlines alone, if anything
            return [Image(pixels[0], (side, side), side * side + total)]
        found, first = [Image(pixels[0], (side, side), side * side)], 0
        for index, count in enumerate(deal(total, patches)):
            # The places of the tile's patches among the tokens of all tiles; a row of tokens spans several tiles.
            top, left = (
                cells * side - gap.start for cells, gap in zip(divmod(index, shape[1]), (down, across), strict=True)
            )
            rows, columns = (range(side)[cells] for cells in parts[index])
            row = (torch.tensor(rows) + top) * high // max(shown[0], 1)
            column = (torch.tensor(columns) + left) * wide // max(shown[1], 1)
            blocks = row[:, None] * (wide + 1) + column - first
            if count:
                found.append(Image(pixels[1 + index], (side, side), count, parts[index], blocks))
            first += count
        return found

    def tile_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the tokens of all tiles of a picture, newlines not counted.

        Args:
            height, width: of the picture in the tiles, in patches.
        """
        return height, width


def inside(grid: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a padded `grid` of patches that show a picture of `size` (height, width)."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image  # slow to import

    cells = torch.arange(grid[0] * grid[1]).view(1, *grid)
    kept = unpad_image(cells, size)[0]  # the base's own rule; nothing may be left of a very thin picture
    top, left = divmod(int(kept[0, 0]) if kept.numel() else 0, grid[1])
    return slice(top, top + kept.shape[0]), slice(left, left + kept.shape[1])


def overlap(part: slice, start: int, length: int) -> slice:
    """The overlap of `part` with the `length` cells from `start` on, counted from `start`; may be empty."""
    first = min(max(part.start - start, 0), length)
    return slice(first, max(min(part.stop - start, length), first))


def deal(total: int, weights: list[int]) -> list[int]:
    """Cuts `total` into whole parts in proportion to `weights`.

    Example:
        >>> deal(10, [2, 2, 1])
        [4, 4, 2]
    """
    edges = [round(total * before / sum(weights)) for before in accumulate(weights, initial=0)]
    return [after - before for before, after in pairwise(edges)]
