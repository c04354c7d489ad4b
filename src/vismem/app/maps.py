"""Heat maps for HTML: one pale grey picture, and each map as a small transparent image over it.

Blended with `mix-blend-mode: multiply` they look like `analysis.heatmaps.overlaid`, at a fraction of the bytes.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

from vismem.analysis.findings import FloatArray, HeatMap
from vismem.analysis.heatmaps import HOT, PALE, enlarged, scale_end, strength

SIDE = 560  # pixels, longer side of the picture under a map: twice its size on the page


def map_context(found: HeatMap, picture: Image.Image) -> dict[str, Any]:
    """A short-term memory's maps over one picture, for the panel's template."""
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
    """One map: its image, its scale, and where its maximum is, in words."""
    row, column = np.argwhere(heat >= heat.max() * (1 - 1e-4)).mean(0)  # centre of the maximum
    return {
        "title": title,
        "name": name,
        "url": data_url(painted(heat, end)),
        "end": end,
        "peak": float(heat.max()),
        "place": position_in_words((row + 0.5) / heat.shape[0], (column + 0.5) / heat.shape[1]),
    }


def painted(heat: FloatArray, end: float) -> Image.Image:
    """A map as a small image of one colour, opaque where attention is far above the even share."""
    colour = np.broadcast_to(HOT, (*heat.shape, 3))
    return Image.fromarray(
        (255 * np.concatenate([colour, strength(heat, end)[..., None]], -1)).round().astype(np.uint8), "RGBA"
    )


def position_in_words(down: float, across: float) -> str:
    """A point of a picture in words; both coordinates are in [0, 1]."""
    rows, columns = ("at the top", "", "at the bottom"), ("left", "middle", "right")
    row, column = rows[min(int(3 * down), 2)], columns[min(int(3 * across), 2)]
    if not row:
        return "in the middle" if column == "middle" else f"in the middle, {column}"
    return row if column == "middle" else f"{row} {column}"


def data_url(image: Image.Image) -> str:
    """An image as a data URL, as PNG or JPEG, whichever is smaller; transparent ones as PNG."""
    kinds = ["png"] if image.mode == "RGBA" else ["png", "jpeg"]
    found = []
    for kind in kinds:
        buffer = io.BytesIO()
        image.save(buffer, format=kind, quality=85)
        found.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(found, key=len)
