"""Examples to begin with: questions that the pocket model answers well, some about a picture of its world.

`examples.json` says for each which kinds of memory its answers invoke, what to ask next, and the scene that the picture
shows (`pocket.world.sample_scene(Random(scene), "test")`).
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
        title, note: what a card says of it.
        kinds: of memory that the answer to `question` invokes.
        picture: a file in this folder, or None.
        alt: the picture in words.
        question: to begin with.
        next: questions to go on with.
        scene: the seed of the picture's scene.
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
        """Its pictures: one or none."""
        if self.picture is None:
            return []
        return [open_image((files(__package__) / self.picture).read_bytes())]


@lru_cache(maxsize=1)
def examples() -> list[Example]:
    """All of them, in the order in which they are shown."""
    read = json.loads((files(__package__) / "examples.json").read_text(encoding="utf-8"))
    return [Example(**{**each, "kinds": tuple(each["kinds"]), "next": tuple(each["next"])}) for each in read]
