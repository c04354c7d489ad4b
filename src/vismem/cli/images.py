"""Images from the command line: paths or standard input, checked before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vismem.cli.parsing import Failure, Misuse

if TYPE_CHECKING:
    from PIL.Image import Image


def read_images(names: list[str]) -> list[Image]:
    """The images at those paths, as `vismem.data.images.open_image` gives them; `-` is standard input, once.

    Raises:
        Misuse: if a path names no regular file, or standard input is named twice or has nothing piped into it.
        Failure: if an image cannot be read, is no whole image, or is beyond the limits of `vismem.data.images`.
    """
    from vismem.data.images import BadImageError, NoImageFileError, open_image

    if names.count("-") > 1:
        raise Misuse("standard input (-) can be read once only")
    try:
        return [open_image(_standard_input() if name == "-" else Path(name)) for name in names]
    except NoImageFileError as error:
        raise Misuse(str(error)) from error
    except BadImageError as error:
        raise Failure(str(error)) from error


def _standard_input() -> dict[str, str | bytes]:
    from vismem.data.images import MOST_BYTES

    if sys.stdin is None or sys.stdin.isatty():
        raise Misuse("no image on standard input: pipe one in, as in `vismem ask - QUESTION < image.png`")
    try:
        content = sys.stdin.buffer.read(MOST_BYTES + 1)
    except OSError as error:
        raise Failure(f"cannot read standard input: {error.strerror or error}") from error
    if len(content) > MOST_BYTES:
        raise Failure(f"the image on standard input is larger than {MOST_BYTES // 2**20} MiB, the limit")
    return {"bytes": content, "path": "on standard input"}
