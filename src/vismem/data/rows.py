"""What a row is, and how one is made from the dictionary that a file or a dataset holds.

Where the columns are is known to `layouts.py`. Images stay as given until `Draft.open`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vismem.data.images import BadImage, check_image_file, open_image
from vismem.data.layouts import (
    TAKEN,
    BadRow,
    check_marks,
    check_unicode,
    place_images,
    read_conversation,
    read_images,
    read_references,
    renamed,
)

__all__ = ["BadDataError", "BadRow", "Draft", "Row", "read_row"]


class BadDataError(ValueError):
    """A source that cannot be used, or one with too many bad rows.

    A DataLoader hands on its worker's whole traceback as the message; the error itself is what that ends with.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        id: where it came from: "file.jsonl:12" (file and line), or "name[12]" (dataset and index).
        prompt: chat messages; every content is a list of parts, and {"type": "image"} stands where an image goes.
        images: as many RGB pictures as `prompt` has image parts, in their order.
        answer: the reference answer; of several the most frequent one.
        completion: the reference reply, for supervised warm-up; the answer where the source has none.
        columns: all other columns, untouched, for the rewards.
        references: all reference answers, where there are several.
    """

    id: str
    prompt: list[dict[str, Any]]
    images: list[Image.Image]
    answer: str
    completion: str
    columns: dict[str, Any]
    references: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Draft:
    """A row whose images are not opened yet; `sources` are as the row gave them."""

    prompt: list[dict[str, Any]]
    sources: list[Any]
    answer: str
    completion: str
    columns: dict[str, Any]
    references: list[str]

    def find(self, folder: Path) -> None:
        """Looks whether the image files are there, without opening them. Raises BadRow."""
        try:
            for source in self.sources:
                check_image_file(source, folder)
        except BadImage as error:
            raise BadRow(str(error)) from error

    def open(self, row_id: str, folder: Path) -> Row:
        """The row with its images; relative paths start from `folder`. Raises BadRow."""
        try:
            images = [open_image(source, folder) for source in self.sources]
        except BadImage as error:
            raise BadRow(str(error)) from error
        return Row(row_id, self.prompt, images, self.answer, self.completion, self.columns, self.references)


def read_row(raw: Any, columns: Mapping[str, str] | None = None) -> Draft:
    """Checks a dictionary and brings it into shape.

    Args:
        raw: the dictionary, in one of the layouts of `docs/data.md`.
        columns: from our names of columns to the dictionary's.

    Raises:
        BadRow: if the prompt or the answer is missing or malformed, images and their places do not match, or a text
            holds what a model takes for an image.
    """
    if isinstance(raw, BadRow):
        raise raw
    if not isinstance(raw, Mapping):
        raise BadRow(f"a row must be an object with `prompt` and `answer`, not {type(raw).__name__}")
    try:
        return _read(raw, columns)
    except RecursionError as error:
        raise BadRow("nested too deeply to be read") from error


def _read(raw: Mapping[Any, Any], columns: Mapping[str, str] | None) -> Draft:
    for name in raw:
        if not isinstance(name, str):
            raise BadRow(f"a column's name must be a text, not {type(name).__name__}")
    check_unicode(raw)
    row = renamed(raw, columns)
    messages, reply = read_conversation(row)
    sources = read_images(row)
    inside = [part.pop("image") for message in messages for part in message["content"] if part.get("image") is not None]
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    if inside and sources:
        raise BadRow("images stand both in the prompt's parts and in `images`; give them in one place")
    if inside and len(inside) != places:
        raise BadRow(f"{places} image parts in the prompt, but only {len(inside)} of them hold an image")
    sources = inside or sources
    place_images(messages, len(sources))
    answer, references = read_references(row, reply)
    completion = answer if reply is None else reply
    check_marks(completion, "reply")
    others = {name: value for name, value in row.items() if name not in TAKEN}
    return Draft(messages, sources, answer, completion, others, references if len(references) > 1 else [])
