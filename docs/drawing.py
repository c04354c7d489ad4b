"""Shapes and colours of the figures: SVG that fits a light page and a dark one. Standard library only.

A colour is a role (`"ink"`, `"short"`, ...), drawn in its light or its dark shade: by the reader's setting where the
file stands alone, by the page's where the site puts it into the page. A colour that starts with # stays as it is.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parent / "images"
SANS = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"

ROLES = {  # light, dark
    "ink": ("#1d2733", "#e6ebf2"),
    "muted": ("#5b6877", "#a3b0bf"),
    "paper": ("#ffffff", "#171c24"),
    "edge": ("#d5dbe3", "#343d4a"),
    "base": ("#44618a", "#8fb0dc"),
    "base-zone": ("#edf2f8", "#1e2632"),
    "base-fill": ("#dbe5f1", "#2a3648"),
    "visual": ("#3778c8", "#7db4f5"),
    "visual-fill": ("#cfe0f5", "#234063"),
    "short": ("#007d8c", "#4fc3d1"),
    "short-fill": ("#d3edf0", "#12424a"),
    "long": ("#a0267e", "#e58bc9"),
    "long-fill": ("#f3dbec", "#4d1f40"),
    "builder": ("#8f5d10", "#e0b265"),
    "builder-fill": ("#faeacb", "#463618"),
    "memory-zone": ("#fdf6ea", "#26221a"),
    "on": ("#ffffff", "#10151c"),  # words on a strong colour
}


def paint(role: str) -> tuple[str, str]:
    """Attribute and style of a colour: a renderer without variables has the light one."""
    return (role, "") if role.startswith("#") or role == "none" else (ROLES[role][0], f"var(--fig-{role})")


class Picture:
    """Collects SVG elements; every method adds one shape.

    Args:
        name: of the file, and of what is named inside it.
        title: its alternative text.
        width, height: in pixels at full size.
    """

    def __init__(self, name: str, title: str, width: int, height: int) -> None:
        self.name, self.title, self.width, self.height = name, title, width, height
        self.parts: list[str] = []
        self.heads: list[str] = []

    def box(self, x, y, width, height, fill, line="none", radius=9, weight=1.5, dash="") -> None:
        extra = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" {coloured(fill, line)} '
            f'stroke-width="{weight}"{extra}/>'
        )

    def text(self, x, y, words, size=15, fill="ink", weight=400, anchor="middle", family=SANS) -> None:
        self.parts.append(
            f'<text x="{x}" y="{y}" font-family="{family}" font-size="{size}" font-weight="{weight}" '
            f'{coloured(fill)} text-anchor="{anchor}">{escape(words)}</text>'
        )

    def line(self, path, colour, weight=2.2, arrow=True, halo="") -> None:
        if halo:
            self.parts.append(f'<path d="{path}" {coloured("none", halo)} stroke-width="9"/>')
        head = ""
        if arrow:
            head = f' marker-end="url(#{self.name}-{colour})"'
            self.heads += [] if colour in self.heads else [colour]
        self.parts.append(
            f'<path d="{path}" {coloured("none", colour)} stroke-width="{weight}" stroke-linejoin="round"{head}/>'
        )

    def adapted(self, x, y, module, colour) -> None:
        """`module + LoRA`, centred."""
        self.parts.append(
            f'<text x="{x}" y="{y}" font-family="{SANS}" font-size="15" {coloured("ink")} text-anchor="middle">'
            f'{escape(module)} <tspan font-weight="700" {coloured(colour)}>+ LoRA</tspan></text>'
        )

    def diamond(self, x, y, size, fill) -> None:
        """The marker of short-term memory."""
        self.parts.append(
            f'<path d="M{x} {y - size} l{size} {size} l-{size} {size} l-{size} -{size} Z" {coloured(fill)}/>'
        )

    def disc(self, x, y, radius, fill, line="none") -> None:
        """The marker of long-term memory, and the background of numbers."""
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="{radius}" {coloured(fill, line)} stroke-width="1.5"/>')

    def svg(self) -> str:
        """The whole picture, on a card."""
        heads = "".join(
            f'<marker id="{self.name}-{colour}" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="7" '
            f'markerHeight="7" markerUnits="userSpaceOnUse" orient="auto" overflow="visible">'
            f'<path d="M-3 -2 L9 5 L-3 12 Z" {coloured(colour)}/></marker>'
            for colour in self.heads
        )
        light, dark = ("".join(f"--fig-{role}:{pair[side]};" for role, pair in ROLES.items()) for side in (0, 1))
        style = (
            f"svg.figure{{{light}}}@media (prefers-color-scheme:dark){{svg.figure{{{dark}}}}}"
            f'[data-md-color-scheme="default"] svg.figure{{{light}}}[data-md-color-scheme="slate"] svg.figure{{{dark}}}'
        )
        card = Picture(self.name, "", self.width, self.height)
        card.box(1, 1, self.width - 2, self.height - 2, "paper", "edge", 18, 1.5)
        body = "\n".join([*card.parts, *self.parts])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="figure" viewBox="0 0 {self.width} {self.height}" '
            f'width="{self.width}" height="{self.height}" role="img" aria-labelledby="{self.name}-title">\n'
            f'<title id="{self.name}-title">{escape(self.title)}</title>\n<style>{style}</style>\n'
            f"<defs>{heads}</defs>\n{body}\n</svg>\n"
        )

    def write(self) -> None:
        """Into `docs/images/`."""
        IMAGES.mkdir(exist_ok=True)
        (IMAGES / f"{self.name}.svg").write_text(self.svg(), encoding="utf-8")
        print(f"wrote docs/images/{self.name}.svg", file=sys.stderr)


def coloured(fill: str, line: str = "") -> str:
    """Attributes and style of an element's colours."""
    named = {"fill": fill, **({"stroke": line} if line else {})}
    plain = " ".join(f'{name}="{paint(role)[0]}"' for name, role in named.items())
    style = ";".join(f"{name}:{paint(role)[1]}" for name, role in named.items() if paint(role)[1])
    return f'{plain} style="{style}"' if style else plain
