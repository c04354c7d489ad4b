"""Maps the patches that a vision tower sees back to positions in the user's pictures.

Processors resize, crop, pad and tile, each family in its own way. Instead of repeating their arithmetic, `views` sends
gradient images of the same sizes through the processor and reads the positions from the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Pictures

from vismem.model import VisMem

DARK, LIGHT = 16, 240  # range of the gradients: black may be taken for padding, and bicubic resizing overshoots
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """One image as the tower sees it: a whole picture, a tile, a crop or a thumbnail of it.

    Args:
        picture: index of the picture in the prompt, or -1 if the view is all padding.
        grid: rows and columns of patches.
        box: left, top, right and bottom of the grid in the picture's pixels; extends beyond the picture where the view
            is padded.
        size: the picture's width and height.
    """

    picture: int
    grid: tuple[int, int]
    box: Box
    size: tuple[int, int]

    def patch(self, row: float, column: float) -> Box:
        """Left, top, right and bottom of a patch in the picture's pixels; fractional indices are allowed."""
        (left, top, right, bottom), (rows, columns) = self.box, self.grid
        across, down = (right - left) / columns, (bottom - top) / rows
        return left + column * across, top + row * down, left + (column + 1) * across, top + (row + 1) * down

    @property
    def shown(self) -> NDArray[np.bool_]:
        """[rows, columns], True for patches whose centre lies in the picture rather than in padding."""
        if self.picture < 0:
            return np.zeros(self.grid, dtype=bool)
        (left, top, right, bottom), (rows, columns), (wide, high) = self.box, self.grid, self.size
        y = top + (np.arange(rows) + 0.5) * (bottom - top) / rows
        x = left + (np.arange(columns) + 0.5) * (right - left) / columns
        return ((y >= 0) & (y < high))[:, None] & ((x >= 0) & (x < wide))[None]


@torch.no_grad()
def views(model: VisMem, pictures: Sequence[Pictures.Image | tuple[int, int]], **processor_kwargs: Any) -> list[View]:
    """The views of one prompt's pictures, in the tower's order.

    Args:
        model: the model.
        pictures: the prompt's pictures in order, or their sizes (width, height).
        **processor_kwargs: the arguments of the prompt's processor call (`do_image_splitting=False`, ...).

    Raises:
        ValueError: if the processor rejects pictures of these sizes.

    Example:
        >>> views(model, [(640, 480)])[0].patch(0, 0)
    """
    sizes = [picture if isinstance(picture, tuple) else picture.size for picture in pictures]
    if not sizes:
        return []

    def through(probes: list[NDArray[np.float64]]) -> list[Any]:
        """The processor's images for grey pictures with these values, 0 to 1."""
        grey = [(DARK + (LIGHT - DARK) * probe).round().astype(np.uint8) for probe in probes]
        parts = [{"type": "image", "image": Pictures.fromarray(np.stack([g] * 3, axis=-1))} for g in grey]
        found = model.processor.apply_chat_template(
            [[{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, **processor_kwargs},
        )
        return model.backbone.images(**model.backbone.vision_inputs(found))

    def flat(value: float) -> list[NDArray[np.float64]]:
        return [np.full((high, wide), value) for wide, high in sizes]

    def ramp(length: int) -> NDArray[np.float64]:
        return (np.arange(length) + 0.5) / length

    dark, light = through(flat(0.0)), through(flat(1.0))
    across = through([np.tile(ramp(wide), (high, 1)) for wide, high in sizes])
    down = through([np.tile(ramp(high)[:, None], (1, wide)) for wide, high in sizes])
    which = through([np.full((high, wide), (i + 1) / len(sizes)) for i, (wide, high) in enumerate(sizes)])
    found = []
    for image, *probes in zip(dark, light, across, down, which, strict=True):
        low, high, x, y, number = (pixels(model, each) for each in (image, *probes))
        span = high - low
        widest = span.max(axis=(1, 2), keepdims=True)  # channels are normalised separately
        real = ((span > 0.98 * widest) & (widest > 0)).all(0)  # [height, width]: picture, not padding
        if not real.any():
            found.append(View(-1, image.grid, (0.0, 0.0, 0.0, 0.0), (0, 0)))
            continue

        def share(probe: NDArray[np.float64]) -> NDArray[np.float64]:
            return ((probe - low) / np.where(span == 0, 1, span)).mean(0)  # noqa: B023 - called in this iteration only

        picture = round(float(share(number)[real].mean()) * len(sizes)) - 1
        (left, right), (top, bottom) = edges(share(x), real, 0), edges(share(y), real, 1)
        wide, tall = sizes[picture]
        found.append(View(picture, image.grid, (left * wide, top * tall, right * wide, bottom * tall), sizes[picture]))
    return found


def pixels(model: VisMem, image: Any) -> NDArray[np.float64]:
    """An image's values [channels, height, width], cropped to whole patches."""
    laid = model.backbone.laid_out(image).double().cpu().numpy()
    rows, columns = image.grid
    side = laid.shape[1] // rows, laid.shape[2] // columns
    return laid[:, : rows * side[0], : columns * side[1]]


def edges(ramp: NDArray[np.float64], real: NDArray[np.bool_], axis: int) -> tuple[float, float]:
    """Values of a gradient at the first and last edge of an axis, extrapolated by a line fit.

    Args:
        ramp: [height, width], a gradient from 0 to 1 as the view shows it.
        real: [height, width], where the view shows the picture.
        axis: axis to average over: 0 for a horizontal gradient, 1 for a vertical one.
    """
    count = real.sum(axis)
    places = np.flatnonzero(count)
    if len(places) < 2:  # the picture is a single line
        return 0.0, 1.0
    values = np.where(real, ramp, 0).sum(axis)[places] / count[places]
    slope, start = np.polyfit(places + 0.5, values, 1)
    return float(start), float(start + slope * real.shape[1 - axis])
