"""Heat maps: short-term memory's attention painted over the pictures, as images and as matplotlib figures.

Maps are painted patch by patch without smoothing, in one colour over a grey picture, so they also work for colour-blind
readers. Colour starts above 1, uniform attention; a map without a preference leaves the picture unpainted.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vismem import files
from vismem.data.images import to_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOT = np.array([1.0, 0.55, 0.0])  # the colour of white where a map is highest
PALE = 0.55  # contrast that the picture keeps
DPI = 100


@dataclass(frozen=True)
class Panel:
    """One cell of a figure.

    Args:
        title: text above it.
        heat: [height, width] relative to uniform attention, or None for the plain picture.
    """

    title: str
    heat: NDArray[np.floating] | None = None


def enlarged(picture: Image.Image, side: int = 256) -> Image.Image:
    """Scales a picture so that its longer side is about `side` pixels, small ones by an integer factor."""
    picture = to_rgb(picture)
    longer = max(picture.size)
    if longer * 2 <= side:
        factor = side // longer
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    scale = side / longer
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    return picture.resize(size, Image.Resampling.LANCZOS)


def overlaid(
    picture: Image.Image, heat: NDArray[np.floating], most: float | None = None, side: int = 256
) -> Image.Image:
    """Paints a heat map over a pale grey picture.

    Args:
        picture: the picture.
        heat: [height, width] of any size, relative to uniform attention (`ShortTermAttention.on`, `.read`).
        most: end of the colour scale; by default the map's maximum, at least 2.
        side: pixels of the longer side.
    """
    ground = enlarged(picture, side)
    grey = 1 - PALE * (1 - np.asarray(ground.convert("L"), dtype=np.float64)[..., None] / 255)
    above = Image.fromarray(strength(heat, scale_end([heat], most)))
    painted = grey * (1 - np.asarray(above.resize(ground.size, Image.Resampling.NEAREST))[..., None] * (1 - HOT))
    return Image.fromarray((255 * painted).round().astype(np.uint8))


def strength(heat: NDArray[np.floating], end: float) -> NDArray[np.float32]:
    """Colour intensity at each point: 0 up to uniform attention, rising to 1 at `end`."""
    return np.clip((heat - 1) / max(end - 1, 1e-6), 0, 1).astype(np.float32)


def scale_end(heats: Sequence[NDArray[np.floating]], most: float | None = None) -> float:
    """End of a colour scale shared by some maps: their maximum, but at least 2 so that noise stays pale."""
    return most if most is not None else max([2.0, *(float(heat.max()) for heat in heats)])


def figure_of(
    picture: Image.Image, panels: Sequence[Panel | None], most: float | None = None, columns: int = 4
) -> Figure:
    """Plots panels over one picture with a shared colour scale.

    Args:
        picture: the picture below every map.
        panels: the panels, row by row; None leaves a cell empty.
        most: end of the colour scale; see `overlaid`.
        columns: panels in a row.

    Raises:
        ValueError: if matplotlib is not installed.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("plotting needs matplotlib: pip install 'vismem[eval]'") from error
    heats = [panel.heat for panel in panels if panel is not None and panel.heat is not None]
    columns = min(columns, len(panels))
    rows, end = -(-len(panels) // columns), scale_end(heats, most)
    high = 1.9 * picture.height / picture.width
    figure = Figure(figsize=(1.9 * columns + 0.75 * bool(heats), (high + 0.32) * rows), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, panel in zip(axes.flat, panels, strict=False):
        if panel is None:
            continue
        shown = enlarged(picture) if panel.heat is None else overlaid(picture, panel.heat, end)
        axis.imshow(np.asarray(shown), interpolation="nearest")
        axis.set_title(panel.title, fontsize=9)
    if heats:
        scale = ScalarMappable(Normalize(1, end), LinearSegmentedColormap.from_list("heat", [np.ones(3), HOT]))
        bar = figure.colorbar(scale, ax=axes, shrink=0.9, aspect=18, pad=0.02, ticks=[1, end])
        bar.ax.set_yticklabels(["1: even", f"{end:.2g}"], fontsize=8)
        bar.outline.set_visible(False)
    figure.draw_without_rendering()  # lay out once, so that every save gives the same image
    figure.set_layout_engine("none")
    return figure


def png(drawn: Figure | Image.Image, path: str | Path | None = None) -> bytes:
    """Encodes a figure or picture as PNG, and writes it to `path` if given."""
    buffer = io.BytesIO()
    if isinstance(drawn, Image.Image):
        drawn.save(buffer, format="png", optimize=True)
    else:
        drawn.savefig(
            buffer, format="png", facecolor="white", pil_kwargs={"optimize": True}, metadata={"Software": None}
        )
    if path is not None:
        files.write_bytes(path, buffer.getvalue())
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """Encodes a picture as a `data:` URL for `<img src="...">`, as PNG or JPEG, whichever is smaller."""
    found = []
    for kind in ("png", "jpeg") if image.mode in ("L", "RGB") else ("png",):
        buffer = io.BytesIO()
        image.save(buffer, format=kind, quality=85)
        found.append(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}")
    return min(found, key=len)
