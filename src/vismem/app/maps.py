"""Heat maps as a page draws them: a pale grey picture once, and each map as a tiny see-through image to lie on it.

Laid on by `mix-blend-mode: multiply` they look as `evaluation.drawing.overlaid` draws them, at a fraction of the bytes.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from vismem.analysis.findings import FloatArray, HeatMap
from vismem.analysis.heatmaps import HOT, PALE, enlarged, scale_end, strength

SIDE = 560  # pixels at most of a picture under a map: twice what it is shown at


def look(found: HeatMap, picture: Image.Image) -> dict[str, Any]:
    """A short memory's maps over one picture, as the panel's template takes them."""
    grey = picture if SIDE // 2 <= max(picture.size) <= SIDE else enlarged(picture, SIDE)
    pale = (255 * (1 - PALE * (1 - np.asarray(grey.convert("L"), dtype=np.float64) / 255))).round().astype(np.uint8)
    most = scale_end([found.mean, *([] if found.read is None else [found.read])])
    each = scale_end(list(found.vectors))
    return {
        "ground": data_url(Image.fromarray(pale)),
        "ratio": picture.height / picture.width,
        "number": found.picture + 1,
        "share": found.share,
        "views": [layer("mean of all vectors", "mean", found.mean, most)]
        + [layer(f"vector {i + 1}", str(i + 1), heat, each) for i, heat in enumerate(found.vectors)],
        "read": None if found.read is None else layer("what the answer read", "read", found.read, most),
    }


def layer(title: str, name: str, heat: FloatArray, end: float) -> dict[str, Any]:
    """One map: its image, its scale, and in words where it is highest."""
    row, column = np.argwhere(heat >= heat.max() * (1 - 1e-4)).mean(0)  # the middle of a highest region
    return {
        "title": title,
        "name": name,
        "url": data_url(painted(heat, end)),
        "end": end,
        "peak": float(heat.max()),
        "place": place((row + 0.5) / heat.shape[0], (column + 0.5) / heat.shape[1]),
    }


def painted(heat: FloatArray, end: float) -> Image.Image:
    """A map as a small image of one colour, to lie on a pale picture; opaque where far above the even share."""
    colour = np.broadcast_to(HOT, (*heat.shape, 3))
    return Image.fromarray(
        (255 * np.concatenate([colour, strength(heat, end)[..., None]], -1)).round().astype(np.uint8), "RGBA"
    )


def place(down: float, across: float) -> str:
    """Where a point lies in a picture, in words; from 0 to 1 each."""
    rows, columns = ("at the top", "", "at the bottom"), ("left", "middle", "right")
    row, column = rows[min(int(3 * down), 2)], columns[min(int(3 * across), 2)]
    if not row:
        return "in the middle" if column == "middle" else f"in the middle, {column}"
    return row if column == "middle" else f"{row} {column}"


def data_url(image: Image.Image) -> str:
    """An image as an address, in the smaller of two formats; maps, which are see-through, always as PNG."""
    kinds = ["png"] if image.mode == "RGBA" else ["png", "jpeg"]
    found = []
    for kind in kinds:
        held = io.BytesIO()
        image.save(held, format=kind, quality=85)
        found.append(f"data:image/{kind};base64,{base64.b64encode(held.getvalue()).decode()}")
    return min(found, key=len)
