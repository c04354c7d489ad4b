"""Questions about random pictures, and a reward for their answers, for the tests of the audit."""

from __future__ import annotations

import tiny

from vismem.data import Row

TEXTS = ("What is on the table?", "Describe the image.", "look again!", "two green pens?")


def question(number: int, image: int | None = None, text: str | None = None, **columns) -> Row:
    """A question about a random picture, or about none with `image=-1`."""
    image = number if image is None else image
    pictures = [] if image < 0 else [tiny.picture(image)]
    parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": text or TEXTS[number % len(TEXTS)]}]
    return Row(f"row{number}", [{"role": "user", "content": parts}], pictures, "x", "x", columns)


def even(completions, **_):
    """A reward that tells answers apart."""
    return [float(len(completion[0]["content"]) % 2 == 0) for completion in completions]
