"""Images from the command line: paths or standard input, checked before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

from vismem.commands.parsing import Failure, Misuse

MOST_BYTES = 512 * 2**20


def read_images(names: list[str]) -> list:
    """The images of those paths, as RGB pictures, upright; `-` is standard input, once.

    Raises:
        Misuse: if a path is not there or is a folder, or if standard input is named twice.
        Failure: if a file cannot be read, is no whole image, or has more pixels than `vismem.data.images` allows.
    """
    if names.count("-") > 1:
        raise Misuse("standard input (-) can be read once only")
    return [decode(read_bytes(name), "standard input" if name == "-" else name) for name in names]


def read_bytes(name: str) -> bytes:
    """The content of a file or of standard input, up to a limit that no image within ours comes near."""
    try:
        if name == "-":
            if sys.stdin is None or sys.stdin.isatty():
                raise Misuse("no image on standard input: pipe one in, as in `vismem ask - QUESTION < image.png`")
            content = sys.stdin.buffer.read(MOST_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                content = file.read(MOST_BYTES + 1)
    except FileNotFoundError as error:
        raise Misuse(f"no such image: {name}") from error
    except IsADirectoryError as error:
        raise Misuse(f"{name} is a folder, not an image") from error
    except (OSError, ValueError) as error:
        raise Failure(f"cannot read image {name}: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > MOST_BYTES:
        raise Failure(f"image {name} is larger than {MOST_BYTES // 2**20} MiB, the limit")
    return content


def decode(content: bytes, name: str):
    """Bytes as an RGB picture, turned as its EXIF data says."""
    from vismem.data.images import BadImage, open_image

    try:
        return open_image({"bytes": content, "path": name}, Path())
    except BadImage as error:
        raise Failure(str(error)) from error
