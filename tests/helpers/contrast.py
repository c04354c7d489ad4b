"""The contrast of two colours, as WCAG defines it."""

from __future__ import annotations

from PIL import ImageColor


def luminance(colour: str | tuple[int, ...]) -> float:
    """Relative luminance of a CSS colour or an RGB tuple of 0 to 255."""
    values = ImageColor.getrgb(colour) if isinstance(colour, str) else colour
    red, green, blue = (v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in values[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str | tuple[int, ...], other: str | tuple[int, ...]) -> float:
    """From 1 to 21."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
