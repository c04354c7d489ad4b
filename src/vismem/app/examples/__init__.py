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
    """One example."""

    title: str  # of its card
    kinds: tuple[Kind, ...]  # of memory that the answer to `question` invokes
    note: str  # on its card
    picture: str | None  # a file in this folder
    alt: str  # the picture in words
    question: str
    next: tuple[str, ...]  # follow-up questions
    scene: str | None  # seed of the picture's scene

    def open(self) -> list[Image.Image]:
        """Its picture in a list, which is empty if it has none."""
        return [open_image((files(__package__) / self.picture).read_bytes())] if self.picture else []


@lru_cache(maxsize=1)
def examples() -> list[Example]:
    """All examples, in display order."""
    rows = json.loads((files(__package__) / "examples.json").read_text(encoding="utf-8"))
    return [Example(**{**each, "kinds": tuple(each["kinds"]), "next": tuple(each["next"])}) for each in rows]
