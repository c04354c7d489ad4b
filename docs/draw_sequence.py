"""Draws `docs/images/sequence.svg`: one invocation in the sequence, step by step. `make figures` after a change."""

from __future__ import annotations

from drawing import MONO, Picture

WIDTH, HEIGHT = 860, 556
TOP, TALL = 292, 40  # of the sequence
LABELS = 186  # where the sequence starts; the rows' names stand before it


def cell(picture: Picture, x, width, words, fill="paper", line="base", ink="ink", weight=400) -> float:
    """One position of the sequence; returns where the next one starts."""
    picture.box(x, TOP, width, TALL, fill, line, 6)
    picture.text(x + width / 2, TOP + 25.5, words, 15, ink, weight, family=MONO)
    return x + width + 5


def numbered(picture: Picture, x, y, number, words, anchor="start") -> None:
    """A step: its number on a disc, its words beside it."""
    picture.disc(x, y - 5, 11, "ink")
    picture.text(x, y, str(number), 14, "paper", 700)
    picture.text(x + (18 if anchor == "start" else -18), y, words, 15, "ink", 600, anchor)


def bracket(picture: Picture, left, right, y, colour) -> None:
    """Over a part of the sequence."""
    picture.line(f"M{left} {y} v-8 H{right} v8", colour, 1.8, arrow=False)


def sequence(picture: Picture) -> dict[str, tuple[float, float]]:
    """The row of positions; returns the horizontal spans of its parts."""
    spans, x = {}, float(LABELS)
    start = x
    for _ in range(3):
        picture.box(x, TOP, 17, TALL, "visual-fill", "visual", 4, 1.4)
        x += 20
    x += 2
    x = cell(picture, x, 78, "question")
    spans["prompt"] = (start, x - 5)
    x += 12
    start = x
    for word, width in (("Row", 42), ("2", 24), ("col", 42), ("3", 24)):
        x = cell(picture, x, width, word)
    spans["words"] = (start, x - 5)
    x = cell(picture, x, 62, "<ms_I>", "short", "short", "on", 700)
    spans["invocation"] = (x - 67, x - 5)
    start = x
    for _ in range(8):
        picture.box(x, TOP, 10, TALL, "short-fill", "short", 2, 1.3)
        x += 13
    spans["slots"] = (start, x - 3)
    x += 2
    spans["end"] = (x, x + 62)
    x = cell(picture, x, 62, "<ms_E>", "short", "short", "on", 700)
    spans["after"] = (x, x + 42)
    x = cell(picture, x, 42, "red")
    picture.text(x + 10, TOP + 24, "…", 20, "muted")
    return spans


def forming(picture: Picture, spans: dict[str, tuple[float, float]]) -> None:
    """Above the sequence: from the segment to the vectors, in five steps."""
    left, right = spans["words"][0], spans["invocation"][1]
    bracket(picture, left, right, TOP - 10, "ink")
    numbered(picture, left + 12, TOP - 28, 1, "the segment")

    builder, former = (LABELS, 130, 262, 62), (548, 130, 250, 62)
    picture.box(*builder, "builder-fill", "builder", 12)
    numbered(picture, builder[0] + 22, 156, 2, "query builder")
    picture.text(builder[0] + 40, 178, "K vectors become the query Q", 14, "muted", anchor="start")
    picture.box(*former, "short-fill", "short", 12)
    numbered(picture, former[0] + 22, 156, 3, "short-term former")
    picture.text(former[0] + 40, 178, "Q looks at the patches again", 14, "muted", anchor="start")
    picture.diamond(former[0] + former[2] - 22, 151, 7, "short")

    middle = (spans["prompt"][0] + spans["prompt"][0] + 57) / 2
    picture.line(f"M{middle} {TOP - 4} V198", "visual")
    picture.text(middle + 10, 232, "v: visual states", 14, "visual", 600, "start")
    states = left + 60
    picture.line(f"M{states} {TOP - 46} V198", "ink")
    picture.text(states + 10, 216, "h: hidden states", 14, "ink", 600, "start")
    picture.line(f"M{builder[0] + builder[2]} 161 H{former[0] - 6}", "builder")
    picture.text((builder[0] + builder[2] + former[0]) / 2 - 4, 150, "Q", 16, "builder", 700)

    picture.box(former[0], 46, former[2], 46, "paper", "short", 12, dash="5 4")
    picture.text(former[0] + former[2] / 2, 66, "patches, their keys and values", 14, "ink", 600)
    picture.text(former[0] + former[2] / 2, 84, "encoded once per image", 13, "muted")
    picture.line(f"M{former[0] + former[2] / 2} 92 V124", "short")

    slots = sum(spans["slots"]) / 2
    picture.line(f"M{slots} 192 V{TOP - 6}", "short")
    numbered(picture, slots + 24, 213, 4, "N memory vectors")
    picture.text(slots + 42, 231, "embeddings, not words", 14, "muted", anchor="start")
    picture.line(f"M{sum(spans['end']) / 2} {TOP - 22} V{TOP - 6}", "short", 1.8)
    numbered(picture, sum(spans["end"]) / 2, TOP - 28, 5, "end token")


def properties(picture: Picture, spans: dict[str, tuple[float, float]]) -> None:
    """Below the sequence: who writes each position, and what counts."""
    rows = {
        "written by": ("you", "model", "model", "decoder", "decoder", "model"),
        "in out.sequences": ("yes", "yes", "yes", "no", "yes", "yes"),
        "counts as new": ("no", "yes", "yes", "no", "no", "yes"),
        "can be sampled": ("", "yes", "yes", "no", "no", "yes"),
    }
    parts = ("prompt", "words", "invocation", "slots", "end", "after")
    y = TOP + TALL + 38
    for name, cells in rows.items():
        picture.text(LABELS - 12, y, name, 14, "muted", 600, "end")
        for part, words in zip(parts, cells, strict=True):
            strong = words in ("decoder", "no")
            picture.text(sum(spans[part]) / 2, y, words, 14, "short" if strong else "ink", 600 if strong else 400)
        y += 34
        if name != "can be sampled":
            picture.line(f"M28 {y - 22} H{WIDTH - 28}", "edge", 1, arrow=False)
    y = HEIGHT - 48
    picture.disc(36, y - 5, 6, "long")
    words = "Long-term memory: the same with <ml_I> and <ml_E>.", "Its former reads the segment, not the patches."
    for line, text in enumerate(words):
        picture.text(52, y + 22 * line, text, 14, "muted", anchor="start")


def draw() -> Picture:
    """Returns the whole picture."""
    picture = Picture(
        "sequence",
        "One invocation: the builder makes a query of the segment's states and the visual states, the former turns it "
        "into vectors, they follow the invocation token, and the end token closes them",
        WIDTH,
        HEIGHT,
    )
    spans = sequence(picture)
    forming(picture, spans)
    properties(picture, spans)
    return picture


if __name__ == "__main__":
    draw().write()
