"""Draws `docs/images/mechanism.svg`, the picture of the mechanism: `make figures` after a change.

Top: the frozen base reads a picture and writes tokens. Bottom: at an invocation token the query builder reads the
states and one former writes memory vectors into the sequence.
"""

from __future__ import annotations

from drawing import MONO, Picture

WIDTH, HEIGHT = 1200, 690
STRIP = (270, 42)  # top and height of the token strip
FORMERS = (404, 88)
BUILDER_BOX = (572, 74)


def shelf(picture: Picture, x: float, y: float, cell: float) -> None:
    """The picture that the model looks at: a 4 x 4 shelf of priced items with coloured tags."""
    red, orange, green, blue, purple = "#d62d2a", "#f5961e", "#2da03c", "#285ad7", "#913caf"
    tags = [red, blue, green, red, orange, purple, red, blue, green, green, orange, purple, blue, red, purple, orange]
    prices = "2719480356128374"
    picture.box(x - 5, y - 5, 4 * cell + 10, 4 * cell + 10, "paper", "muted", 6)
    for index, (tag, price) in enumerate(zip(tags, prices, strict=True)):
        left, top = x + index % 4 * cell, y + index // 4 * cell
        picture.box(left + 0.5, top + 0.5, cell - 1, cell - 5, "#f4f1ea", radius=2, weight=0)
        picture.text(left + cell * 0.36, top + cell * 0.67, price, cell * 0.62, "#1d2733", 600)
        picture.box(left + cell * 0.64, top + cell * 0.2, cell * 0.27, cell * 0.27, tag, radius=1.5, weight=0)
        picture.box(left + 0.5, top + cell - 4.5, cell - 1, 3, "#b98d5a", radius=0, weight=0)


def token(picture: Picture, x: float, width: float, words: str, kind: str = "word") -> float:
    """One cell of the strip; returns where the next one starts."""
    top, height = STRIP
    fill, line, ink, weight = {
        "word": ("paper", "base", "ink", 400),
        "short": ("short", "short", "on", 600),
        "long": ("long", "long", "on", 600),
    }[kind]
    picture.box(x, top, width, height, fill, line, 6)
    picture.text(x + width / 2, top + 26.5, words, 15, ink, weight, family=MONO)
    return x + width + 4


def slots(picture: Picture, x: float, count: int, width: float, fill: str, line: str) -> float:
    """Memory vectors in the strip; returns where the next cell starts."""
    top, height = STRIP
    for index in range(count):
        picture.box(x + index * width, top, width - 2, height, fill, line, 2, 1.2)
    return x + count * width + 2


def upward_ticks(picture: Picture, centres: list[float], bottom: float) -> None:
    """Every position of the strip is read by the language model."""
    for centre in centres:
        picture.line(f"M{centre} {STRIP[0] - 3} V{bottom}", "base", 1.3, arrow=False)


def base(picture: Picture) -> dict[str, tuple[float, float]]:
    """The frozen half; returns the horizontal spans of the strip's parts."""
    top, height = STRIP
    picture.box(14, 14, WIDTH - 28, 340, "base-zone", radius=14, weight=0)
    picture.text(1162, 43, "the base: frozen, not a weight changes", 15, "base", 600, "end")

    shelf(picture, 78, 44, 25)
    picture.line("M128 152 V178", "base")
    picture.box(58, 182, 140, 40, "base-fill", "base")
    picture.text(128, 207, "vision encoder", 15, "ink", 600)
    picture.line(f"M128 222 V{top - 6}", "base")
    picture.box(58, top, 140, height, "base-fill", "base")
    picture.text(128, top + 26, "projector", 15, "ink", 600)
    picture.line(f"M198 {top + height / 2} H226", "visual")

    picture.box(232, 62, 936, 154, "base-fill", "base", 12)
    picture.text(700, 132, "language model", 22, "ink", 600)
    picture.text(700, 161, "reads every vector of the sequence, writes one token after another", 15, "muted")

    spans: dict[str, tuple[float, float]] = {}
    x = 232.0
    for index in range(4):
        picture.box(x + index * 22, top, 20, height, "visual-fill", "visual", 4, 1.4)
    spans["visual"] = (x, x + 86)
    x = token(picture, x + 94, 84, "question")
    for name, words, count, width, fill in (
        ("short", ("Row", "one"), 8, 12.5, "short-fill"),
        ("long", ("2", "+", "7"), 16, 7.75, "long-fill"),
    ):
        x += 6 if name == "short" else 0
        start = x
        for word in words:
            x = token(picture, x, 46 if len(word) > 1 else 28, word)
        letter = name[0]
        x = token(picture, x, 66, f"<m{letter}_I>", name)
        spans[f"{name} segment"] = (start, x - 4)
        spans[f"{name} slots"] = (x, x + count * width)
        x = slots(picture, x, count, width, fill, "short" if name == "short" else "long")
        x = token(picture, x, 66, f"<m{letter}_E>", name)
    x = token(picture, x, 28, "=")
    picture.text(x + 12, top + 26, "…", 20, "muted")

    centres = [242, 264, 286, 308, 368]
    for left, right in (spans["short slots"], spans["long slots"]):
        centres += [left - 37, right + 37, *(left + (right - left) * share for share in (0.1, 0.3, 0.5, 0.7, 0.9))]
    left = spans["short segment"][0]
    centres += [left + 23, left + 73]
    left = spans["long segment"][0]
    centres += [left + 14, left + 46, left + 78, x - 18]
    upward_ticks(picture, centres, 220)
    return spans


def bracket(picture: Picture, span: tuple[float, float], colour: str) -> None:
    """A bracket under a part of the strip."""
    bottom = STRIP[0] + STRIP[1] + 5
    picture.line(f"M{span[0]} {bottom} v7 H{span[1]} v-7", colour, 1.8, arrow=False)


def memory(picture: Picture, spans: dict[str, tuple[float, float]]) -> None:
    """The trained half."""
    picture.box(14, 366, WIDTH - 28, HEIGHT - 380, "memory-zone", radius=14, weight=0)
    picture.text(36, HEIGHT - 26, "the memory: trained, lives beside the base", 15, "builder", 600, "start")
    bracket_bottom = STRIP[0] + STRIP[1] + 12
    former_top, former_height = FORMERS
    builder_top, builder_height = BUILDER_BOX
    former_bottom = former_top + former_height

    # Visual states and the segments' states go down into the builder.
    middle = sum(spans["visual"]) / 2
    bracket(picture, spans["visual"], "visual")
    picture.line(f"M{middle} {bracket_bottom} V{builder_top - 6}", "visual")
    columns = {"short": spans["short segment"][0] + 26, "long": spans["long segment"][0] + 30}
    for name, column in columns.items():
        bracket(picture, spans[f"{name} segment"], "ink")
        picture.line(f"M{column} {bracket_bottom} V{builder_top - 6}", "ink")

    # The builder.
    picture.box(232, builder_top, 936, builder_height, "builder-fill", "builder", 12)
    picture.text(700, builder_top + 32, "query builder", 18, "ink", 600)
    picture.text(
        700, builder_top + 56, "K learnable vectors read the states and become the memory query Q", 15, "muted"
    )

    # The formers, under their slots.
    lines = {
        "short": ("short-term former", "vision encoder", "looks at the patches again"),
        "long": ("long-term former", "language model", "recalls what training left"),
    }
    for name, colour, fill in (("short", "short", "short-fill"), ("long", "long", "long-fill")):
        middle = sum(spans[f"{name} slots"]) / 2
        left = middle - 112
        title, module, what = lines[name]
        picture.box(left, former_top, 224, former_height, fill, colour, 12)
        picture.text(middle, former_top + 27, title, 17, "ink", 600)
        picture.adapted(middle, former_top + 51, module, colour)
        picture.text(middle, former_top + 75, what, 14, "muted")
        picture.line(f"M{middle} {builder_top} V{former_bottom + 6}", "builder")
        picture.text(middle + 12, (builder_top + former_bottom) / 2 + 5, "Q", 16, "builder", 700, "start")
        picture.line(f"M{middle} {former_top} V{STRIP[0] + STRIP[1] + 8}", colour)
        picture.text(middle + 12, former_top - 16, f"N {name} vectors", 14, colour, 600, "start")

    # The image, once through the adapted encoder, for every short-term look.
    left = sum(spans["short slots"]) / 2 - 112
    level = former_top + former_height / 2
    picture.line(f"M73 94 H42 V{former_top - 6}", "short")
    picture.line(f"M198 {level} H{left - 6}", "short", halo="memory-zone")
    picture.box(30, former_top, 168, former_height, "paper", "short", 12, dash="5 4")
    picture.text(114, former_top + 27, "patches", 17, "ink", 600)
    picture.adapted(114, former_top + 51, "encoder", "short")
    picture.text(114, former_top + 75, "once per image", 14, "muted")
    picture.text(sum(spans["visual"]) / 2 + 12, level - 9, "X, keys and values", 14, "short", 600, "start")

    # The words of the segment, for the long-term former.
    column = spans["long segment"][1] - 28
    picture.line(f"M{column} {bracket_bottom} V{former_top - 6}", "long")
    picture.text(column + 10, former_top - 16, "X, words", 14, "long", 600, "start")

    # Names of what runs down; written last, over nothing.
    picture.text(sum(spans["visual"]) / 2 + 12, 546, "v, visual states", 14, "visual", 600, "start")
    picture.text(columns["short"] + 12, 546, "h, states", 14, "ink", 600, "start")
    picture.text(columns["long"] + 12, 546, "h, states", 14, "ink", 600, "start")


def draw() -> Picture:
    """The whole picture."""
    picture = Picture(
        "mechanism",
        "A frozen model writes tokens; an invocation token calls a query builder and a memory former, whose vectors "
        "join the sequence",
        WIDTH,
        HEIGHT,
    )
    memory(picture, base(picture))
    return picture


if __name__ == "__main__":
    draw().write()
