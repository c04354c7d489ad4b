"""Heat maps over pictures: where a look went, vector by vector and in the mean, as images for pages and as figures.

What the numbers are is said in `looks.py`. Maps are drawn patch by patch, without smoothing, in one colour over a grey
picture, which all eyes tell apart. Colour begins above 1, the even share, so a map without a preference is the picture.
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
from vismem.analysis.short_attention import Look
from vismem.data.images import to_rgb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HOT = np.array([1.0, 0.55, 0.0])  # what white becomes where a map is highest
PALE = 0.55  # contrast left to the picture
DOTS = 100  # per inch


@dataclass(frozen=True)
class Panel:
    """One picture of a figure.

    Args:
        title: above it.
        heat: [height, width] times the even share, or None for the picture alone.
    """

    title: str
    heat: NDArray[np.floating] | None = None


def enlarged(picture: Image.Image, side: int = 256) -> Image.Image:
    """A picture whose longer side has `side` pixels or little less; small ones keep their hard pixels."""
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
    """A heat map over a pale grey picture.

    Args:
        picture: the picture.
        heat: [height, width] of any size, times the even share (`Look.on`, `Look.read`).
        most: what the colour scale ends at; by default the map's maximum, but 2 at least.
        side: pixels of the longer side.
    """
    ground = enlarged(picture, side)
    grey = 1 - PALE * (1 - np.asarray(ground.convert("L"), dtype=np.float64)[..., None] / 255)
    above = Image.fromarray(strength(heat, scale_end([heat], most)))
    painted = grey * (1 - np.asarray(above.resize(ground.size, Image.Resampling.NEAREST))[..., None] * (1 - HOT))
    return Image.fromarray((255 * painted).round().astype(np.uint8))


def strength(heat: NDArray[np.floating], end: float) -> NDArray[np.float32]:
    """How deep a map's colour is, place by place: 0 up to the even share, 1 from `end` on."""
    return np.clip((heat - 1) / max(end - 1, 1e-6), 0, 1).astype(np.float32)


def scale_end(heats: Sequence[NDArray[np.floating]], most: float | None = None) -> float:
    """Where the colour scale of some maps ends: at their maximum, but at 2 at least, so that noise stays pale."""
    return most if most is not None else max([2.0, *(float(heat.max()) for heat in heats)])


def figure_of(
    picture: Image.Image, panels: Sequence[Panel | None], most: float | None = None, columns: int = 4
) -> Figure:
    """Panels side by side over one picture, with one colour scale for all.

    Args:
        picture: under all of them.
        panels: what to draw, row by row; None leaves a place empty.
        most: where the colour scale ends; see `overlaid`.
        columns: panels in a row.
    """
    try:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import LinearSegmentedColormap, Normalize
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("drawing needs matplotlib: pip install 'vismem[eval]'") from error
    heats = [panel.heat for panel in panels if panel is not None and panel.heat is not None]
    columns = min(columns, len(panels))
    rows, end = -(-len(panels) // columns), scale_end(heats, most)
    high = 1.9 * picture.height / picture.width
    figure = Figure(figsize=(1.9 * columns + 0.75 * bool(heats), (high + 0.32) * rows), dpi=DOTS, layout="constrained")
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
    figure.draw_without_rendering()  # laid out once, so that it is the same picture whenever it is saved
    figure.set_layout_engine("none")
    return figure


def vectors_of(look: Look, picture: Image.Image, index: int = 0, layer: int | None = None) -> Figure:
    """One look at one picture: the mean, then each memory vector on its own.

    Args:
        look: the look.
        picture: the picture with that index in the prompt.
        index: of the picture.
        layer: of the tower; the mean over all by default.
    """
    small = _fitting(picture)
    count = len(look.memory)
    panels = [Panel("all vectors", look.on(index, small, layer))]
    panels += [Panel(f"vector {number + 1}", look.on(index, small, layer, number)) for number in range(count)]
    return figure_of(picture, panels, columns=6)


def _fitting(picture: Image.Image, most: int = 512) -> tuple[int, int]:
    """A size for maps over a picture: its own, unless it is large."""
    scale = min(1.0, most / max(picture.size))
    return max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)


def png(drawn: Figure | Image.Image, path: str | Path | None = None) -> bytes:
    """A figure or a picture as a PNG; also written to `path` where one is given."""
    held = io.BytesIO()
    if isinstance(drawn, Image.Image):
        drawn.save(held, format="png", optimize=True)
    else:
        drawn.savefig(held, format="png", facecolor="white", pil_kwargs={"optimize": True}, metadata={"Software": None})
    if path is not None:
        files.write_bytes(path, held.getvalue())
    return held.getvalue()


def data_url(drawn: Figure | Image.Image) -> str:
    """The same as an address that a page can hold itself: `<img src="...">`."""
    return "data:image/png;base64," + base64.b64encode(png(drawn)).decode()
