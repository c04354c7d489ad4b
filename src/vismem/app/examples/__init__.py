"""Example questions that the pocket model answers well, most of them about a picture of its world.

`examples.json` gives for each the kinds of memory it invokes, follow-up questions, and the seed of the picture's scene
(`pocket.world.sample_scene(Random(scene), "test")`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files

from PIL import Image

from vismem.config import Kind
from vismem.data.images import open_image


@dataclass(frozen=True)
class Example:
    """One example.

    Args:
        title, note: text of its card.
        kinds: of memory that the answer to `question` invokes.
        picture: a file in this folder, or None.
        alt: the picture in words.
        question: the first question.
        next: follow-up questions.
        scene: seed of the picture's scene.
    """

    title: str
    kinds: tuple[Kind, ...]
    note: str
    picture: str | None
    alt: str
    question: str
    next: tuple[str, ...]
    scene: str | None

    def open(self) -> list[Image.Image]:
        """Its picture in a list, which is empty if it has none."""
        if self.picture is None:
            return []
        return [open_image((files(__package__) / self.picture).read_bytes())]


@lru_cache(maxsize=1)
def examples() -> list[Example]:
    """All examples, in display order."""
    rows = json.loads((files(__package__) / "examples.json").read_text(encoding="utf-8"))
    return [Example(**{**each, "kinds": tuple(each["kinds"]), "next": tuple(each["next"])}) for each in rows]
