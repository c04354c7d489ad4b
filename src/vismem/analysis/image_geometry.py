"""Where the patches that a vision tower sees lie in the pictures that a user gave.

Processors resize, squeeze, crop, pad and tile, each family in its own way. None of that is said again here: ramps of
the pictures' sizes go through the same processor, and what comes out tells which part of which picture each view shows.
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

DARK, LIGHT = 16, 240  # ends of the ramps: a processor may take black for padding, and bicubic resizing overshoots
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """What the tower sees as one image: a whole picture, a tile, a crop or a thumbnail of it.

    Args:
        picture: index of the picture among the prompt's, or -1 for a view of padding alone.
        grid: patches high and wide.
        box: left, top, right and bottom of the whole grid in the picture's pixels. Where the view is padded, the grid
            goes beyond the picture.
        size: the picture's width and height.
    """

    picture: int
    grid: tuple[int, int]
    box: Box
    size: tuple[int, int]

    def patch(self, row: float, column: float) -> Box:
        """Left, top, right and bottom of one patch in the picture's pixels; a fraction moves it on."""
        (left, top, right, bottom), (rows, columns) = self.box, self.grid
        across, down = (right - left) / columns, (bottom - top) / rows
        return left + column * across, top + row * down, left + (column + 1) * across, top + (row + 1) * down

    @property
    def shown(self) -> NDArray[np.bool_]:
        """[rows, columns], True for patches whose middle is in the picture; the others see padding."""
        if self.picture < 0:
            return np.zeros(self.grid, dtype=bool)
        rows, columns = self.cells(self.grid, self.box)
        wide, high = self.size
        return ((rows >= 0) & (rows < high))[:, None] & ((columns >= 0) & (columns < wide))[None]

    @staticmethod
    def cells(grid: tuple[int, int], box: Box) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The middles of a grid's rows and of its columns, in pixels."""
        (left, top, right, bottom), (rows, columns) = box, grid
        down = top + (np.arange(rows) + 0.5) * (bottom - top) / rows
        return down, left + (np.arange(columns) + 0.5) * (right - left) / columns

    @property
    def whole(self) -> bool:
        """Whether all of the picture is in the view."""
        (left, top, right, bottom), (wide, high) = self.box, self.size
        slack = 0.02 * max(wide, high) + 0.5
        return self.picture >= 0 and left <= slack and top <= slack and right >= wide - slack and bottom >= high - slack


@torch.no_grad()
def views(model: VisMem, pictures: Sequence[Pictures.Image | tuple[int, int]], **processor_kwargs: Any) -> list[View]:
    """The views of one prompt's pictures, in the order in which the tower gets them.

    Args:
        model: the model.
        pictures: the prompt's pictures, in order, or their sizes (width, height).
        **processor_kwargs: as the prompt's processor was called with (`do_image_splitting=False`, ...).

    Raises:
        ValueError: if the processor makes no views of pictures of these sizes.

    Example:
        >>> views(model, [(640, 480)])[0].patch(0, 0)
    """
    sizes = [picture if isinstance(picture, tuple) else picture.size for picture in pictures]
    if not sizes:
        return []

    def through(probes: list[NDArray[np.float64]]) -> list[Any]:
        """Those values in 0..1 as grey pictures: the images that the processor makes of them."""
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
        widest = span.max(axis=(1, 2), keepdims=True)  # channels are scaled apart
        real = ((span > 0.98 * widest) & (widest > 0)).all(0)  # [height, width]: where the picture is
        if not real.any():
            found.append(View(-1, image.grid, (0.0, 0.0, 0.0, 0.0), (0, 0)))
            continue

        def share(probe: NDArray[np.float64]) -> NDArray[np.float64]:
            return ((probe - low) / np.where(span == 0, 1, span)).mean(0)  # noqa: B023 - used within this turn

        picture = round(float(share(number)[real].mean()) * len(sizes)) - 1
        (left, right), (top, bottom) = edges(share(x), real, 0), edges(share(y), real, 1)
        wide, tall = sizes[picture]
        found.append(View(picture, image.grid, (left * wide, top * tall, right * wide, bottom * tall), sizes[picture]))
    return found


def pixels(model: VisMem, image: Any) -> NDArray[np.float64]:
    """An image's values [values, height, width], as far as its patches reach."""
    laid = model.backbone.laid_out(image).double().cpu().numpy()
    rows, columns = image.grid
    side = laid.shape[1] // rows, laid.shape[2] // columns
    return laid[:, : rows * side[0], : columns * side[1]]


def edges(ramp: NDArray[np.float64], real: NDArray[np.bool_], axis: int) -> tuple[float, float]:
    """Where the first and the last edge of an axis lie on a ramp from 0 to 1, by the straight line through it.

    Args:
        ramp: [height, width], the ramp as the view shows it.
        real: where the view shows the picture.
        axis: along which the ramp is averaged: 0 for a ramp from left to right, 1 from top to bottom.
    """
    count = real.sum(axis)
    places = np.flatnonzero(count)
    if len(places) < 2:  # a picture that is a mere line
        return 0.0, 1.0
    values = np.where(real, ramp, 0).sum(axis)[places] / count[places]
    slope, start = np.polyfit(places + 0.5, values, 1)
    return float(start), float(start + slope * real.shape[1 - axis])
