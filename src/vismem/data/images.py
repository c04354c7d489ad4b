"""One image of a row, from a path, bytes, a data URI or a picture, as an upright RGB picture that is fully decoded."""

from __future__ import annotations

import base64
import binascii
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageFile, ImageOps

MOST_PIXELS = 89_478_485  # Pillow's own line between a large photograph and a decompression bomb
MOST_BYTES = 512 * 2**20  # of a file; no picture of MOST_PIXELS that people keep comes near
KINDS_OF_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class BadImage(ValueError):
    """An image that cannot be used; the message says which and why."""


class TooManyPixels(BadImage):
    """An image that is larger than images may be."""


class NoImageFileError(BadImage):
    """A path that names nothing, or something other than a regular file."""


@contextmanager
def whole_images() -> Iterator[None]:
    """Lets Pillow refuse files that are cut off; other libraries (lmms-eval) tell it for good to fill them up."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_image(
    value: Any, folder: Path = Path(), most_pixels: int = MOST_PIXELS, formats: Sequence[str] | None = None
) -> Image.Image:
    """The picture behind one entry of `images`.

    Args:
        value: a path (relative to `folder`, or absolute), a `data:image/...;base64,` URI, bytes, a PIL image, or a
            dictionary with "bytes" or "path", as `datasets.Image` gives.
        folder: what relative paths start from.
        most_pixels: the most that an image may have, checked before it is decoded.
        formats: of files, by Pillow's names; None for all it knows.

    Raises:
        NoImageFileError: if there is no such file, or it is a folder, a device, a pipe or a socket.
        TooManyPixels: if it has more than `most_pixels` pixels.
        BadImage: if it is no whole image, of another format, or larger than `MOST_BYTES`.
    """
    if isinstance(value, Image.Image):
        return _upright(value, "image", most_pixels)
    if isinstance(value, dict):
        content, value = value.get("bytes"), value.get("path")
        if content is not None:
            if not isinstance(content, (bytes, bytearray, memoryview)):
                raise BadImage(f"the `bytes` of an image must be bytes, not {_short(content)}")
            return _decode(bytes(content), f"image {value or 'in bytes'}", most_pixels, formats)
    if isinstance(value, (bytes, bytearray)):
        return _decode(bytes(value), "image in bytes", most_pixels, formats)
    if isinstance(value, str) and value.startswith("data:"):
        return _decode(read_data_uri(value), "image in a data URI", most_pixels, formats)
    if isinstance(value, (str, Path)) and str(value):
        name = str(value)
        if name.startswith(("http://", "https://")):
            raise BadImage(f"image {name} is a web address, which is not fetched; download it and give its path")
        path = folder / name.removeprefix("file://")
        return _decode(read_file(path), f"image {_named(path)}", most_pixels, formats)
    raise BadImage(
        f"an image must be a path, bytes, a data URI, a picture or a dictionary of these, not {_short(value)}"
    )


def read_data_uri(uri: str) -> bytes:
    """What a `data:...;base64,` URI holds; blanks in it do not matter.

    Raises:
        BadImage: if it is not base64.
    """
    head, mark, body = uri.partition(";base64,")
    if not mark:
        raise BadImage(f"the data URI {_short(head)} is not base64")
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadImage(f"the data URI is not valid base64: {error}") from error


def read_file(path: Path) -> bytes:
    """The content of a regular file of at most `MOST_BYTES`.

    A path comes from a user's data: a device has no end, and a pipe keeps its reader waiting. Neither is opened.

    Raises:
        NoImageFileError: if nothing is there, or something other than a regular file, also by a link.
        BadImage: if it cannot be read, or is larger than that.
    """
    try:
        _check_file(os.stat(path), path)
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            _check_file(status, path)
            return file.read(status.st_size)  # no more: files of /proc say that they are empty, and some have no end
    except BadImage:
        raise
    except FileNotFoundError as error:
        raise NoImageFileError(f"no such image: {_named(path)}") from error
    except (OSError, ValueError) as error:
        raise BadImage(f"cannot read image {_named(path)}: {getattr(error, 'strerror', None) or error}") from error


def _check_file(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS_OF_FILES.get(stat.S_IFMT(status.st_mode), "something else")
        raise NoImageFileError(f"image {_named(path)} is {kind}, not a regular file")
    if status.st_size > MOST_BYTES:
        raise BadImage(f"image {_named(path)} is larger than {MOST_BYTES // 2**20} MiB, the limit")


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # should it have become a pipe since it was checked


def _decode(content: bytes, name: str, most_pixels: int, formats: Sequence[str] | None) -> Image.Image:
    if not content:
        raise BadImage(f"{name} is empty")
    try:
        with warnings.catch_warnings(), whole_images():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_upright` draws the line
            with Image.open(BytesIO(content), formats=None if formats is None else tuple(formats)) as image:
                return _upright(image, name, most_pixels)
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        known = f"other than {', '.join(formats)}" if formats else "that Pillow does not know"
        raise BadImage(f"{name} is not an image, or of a format {known}") from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(name, most_pixels) from error
    except Exception as error:  # Pillow's decoders raise many kinds, from OSError to struct.error
        raise BadImage(f"{name} is broken: {error or type(error).__name__}") from error


def _upright(image: Image.Image, name: str, most_pixels: int) -> Image.Image:
    if image.width * image.height > most_pixels:
        raise _too_many_pixels(name, most_pixels)
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:
        raise BadImage(f"{name} is broken: {error or type(error).__name__}") from error


def _too_many_pixels(name: str, most: int) -> TooManyPixels:
    return TooManyPixels(f"{name} has more than {most:,} pixels, the limit; make it smaller first")


def _named(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:97]}...{text[-100:]}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
