"""Draws `docs/images/stages.svg`: what each stage of training changes. `make figures` after a change."""

from __future__ import annotations

from drawing import Picture

WIDTH, HEIGHT = 820, 500
LEFT, COLUMN, GAP = 168, 196, 18
PARTS = (  # name, colour, and whether it learns in the warm-up, stage I, stage II
    ("the base", "base", (False, False, False)),
    ("query builder", "builder", (True, True, False)),
    ("short-term former", "short", (True, True, False)),
    ("long-term former", "long", (True, True, False)),
    ("four tokens' rows", "ink", (False, False, True)),
)
STAGES = (
    ("warm-up", "optional, ours", ("reference replies", "or chance"), ("cross-entropy", "of the reply's words")),
    (
        "stage I",
        "what memory holds",
        ("chance,", "both kinds evenly"),
        ("GRPO: score with memory", "less score without"),
    ),
    ("stage II", "when to invoke it", ("the model", "itself"), ("the same, less penalties", "for wrong kind and harm")),
)


def draw() -> Picture:
    """The whole picture."""
    picture = Picture(
        "stages",
        "Warm-up and stage I train query builder and formers, stage II trains the four tokens' rows; the base is "
        "frozen in all of them",
        WIDTH,
        HEIGHT,
    )
    for index, (name, _, _) in enumerate(PARTS):
        picture.text(LEFT - 14, 123 + index * 46, name, 14, "ink", 600, "end")
    picture.text(LEFT - 14, 372, "who invokes", 14, "muted", 600, "end")
    picture.text(LEFT - 14, 440, "learned from", 14, "muted", 600, "end")
    for column, (name, about, invokes, learns) in enumerate(STAGES):
        x = LEFT + column * (COLUMN + GAP)
        middle = x + COLUMN / 2
        picture.box(x, 20, COLUMN, HEIGHT - 40, "base-zone", radius=14, weight=0)
        picture.text(middle, 50, name, 19, "ink", 700)
        picture.text(middle, 72, about, 14, "muted")
        for row, (_, colour, trained) in enumerate(PARTS):
            y = 98 + row * 46
            fill = {"ink": "builder-fill"}.get(colour, f"{colour}-fill")
            if trained[column]:
                picture.box(x + 14, y, COLUMN - 28, 38, fill, colour, 9, 2.2)
                picture.text(middle, y + 25, "learns", 15, colour, 700)
            else:
                picture.box(x + 14, y, COLUMN - 28, 38, "paper", "edge", 9, 1.2, dash="5 4")
                picture.text(middle, y + 25, "frozen", 14, "muted")
        for top, words in ((362, invokes), (430, learns)):
            picture.text(middle, top, words[0], 14, "ink")
            picture.text(middle, top + 20, words[1], 14, "ink")
        picture.line(f"M{x + 14} 338 H{x + COLUMN - 14}", "edge", 1, arrow=False)
        picture.line(f"M{x + 14} 404 H{x + COLUMN - 14}", "edge", 1, arrow=False)
        if column:
            picture.line(f"M{x - GAP - 6} 46 H{x + 4}", "ink", 2.4)
    return picture


if __name__ == "__main__":
    draw().write()
