"""The `Row` dataclass, and reading one from the dictionary in a file or dataset.

`layouts.py` knows where each layout keeps its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from vismem.data.images import BadImageError, check_image_file, open_image
from vismem.data.layouts import (
    OWN_COLUMNS,
    BadRowError,
    check_placeholders,
    check_unicode,
    place_images,
    read_conversation,
    read_images,
    read_references,
    rename_columns,
)
from vismem.deprecation import renamed

__all__ = ["BadDataError", "BadRowError", "Row", "check_files", "open_row", "read_row"]


class BadDataError(ValueError):
    """The source cannot be read, or has too many bad rows.

    A DataLoader re-raises a worker's error with the whole traceback as its message; only the last part is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.rpartition(f"{__name__}.{type(self).__name__}: ")[2].strip())


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        id: its origin: "file.jsonl:12" (file and line) or "name[12]" (dataset and index).
        prompt: chat messages; every content is a list of parts, with {"type": "image"} for each image.
        images: RGB images, one for each image part of `prompt`, in the same order.
        answer: the reference answer; the most frequent one if there are several.
        completion: the reference reply for supervised training; equals `answer` if the source has none.
        columns: all other columns, unchanged, for the rewards.
        references: all reference answers if there are several, else empty.
    """

    id: str
    prompt: list[dict[str, Any]]
    images: list[Image.Image]
    answer: str
    completion: str
    columns: dict[str, Any]
    references: list[str] = field(default_factory=list)


def read_row(raw: Any, columns: Mapping[str, str] | None = None) -> tuple[Row, list[Any]]:
    """Reads a row from a dictionary in any layout of `docs/data.md`.

    Args:
        raw: the dictionary.
        columns: maps our column names to the dictionary's.

    Returns:
        The row, without id and images; and its images as the dictionary has them: paths, bytes, ...

    Raises:
        BadRowError: if the prompt or the answer is missing or malformed, the images do not match their placeholders,
            or a text contains a model's image token.
    """
    if isinstance(raw, BadRowError):
        raise raw
    if not isinstance(raw, Mapping):
        raise BadRowError(f"a row must be an object with `prompt` and `answer`, not {type(raw).__name__}")
    for name in raw:
        if not isinstance(name, str):
            raise BadRowError(f"a column's name must be a string, not {type(name).__name__}")
    try:
        check_unicode(raw)
        row = rename_columns(raw, columns)
        messages, reply = read_conversation(row)
        sources = place_images(messages, read_images(row))
        answer, references = read_references(row, reply)
    except RecursionError as error:
        raise BadRowError("nested too deeply to be read") from error
    completion = answer if reply is None else reply
    check_placeholders(completion, "reply")
    others = {name: value for name, value in row.items() if name not in OWN_COLUMNS}
    return Row("", messages, [], answer, completion, others, references if len(references) > 1 else []), sources


def check_files(sources: list[Any], folder: Path) -> None:
    """Checks that image files exist, without opening them. Raises BadRowError."""
    with _bad_images():
        for source in sources:
            check_image_file(source, folder)


def open_row(raw: Any, row_id: str, folder: Path, columns: Mapping[str, str] | None = None) -> Row:
    """Reads a row and opens its images; relative paths start at `folder`. Raises BadRowError."""
    row, sources = read_row(raw, columns)
    with _bad_images():
        return replace(row, id=row_id, images=[open_image(source, folder) for source in sources])


@contextmanager
def _bad_images() -> Iterator[None]:
    try:
        yield
    except BadImageError as error:
        raise BadRowError(str(error)) from error


__getattr__ = renamed(__name__, {"BadRow": "BadRowError"})
