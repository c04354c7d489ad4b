"""One image of a row, from a path, bytes, a data URI or a picture, as an upright RGB picture that is fully decoded."""

from __future__ import annotations

import base64
import binascii
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from PIL import Image, ImageFile, ImageOps

MOST_PIXELS = 89_478_485  # Pillow's own line between a large photograph and a decompression bomb
BASE64 = re.compile(rb"[A-Za-z0-9+/]+")
FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


class BadImage(ValueError):
    """An image that cannot be used; the message says which and why."""


class TooManyPixels(BadImage):
    """An image that is larger than images may be."""


@contextmanager
def whole_images() -> Iterator[None]:
    """Lets Pillow refuse files that are cut off; other libraries (lmms-eval) tell it for good to fill them up."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_image(
    value: Any, folder: Path, most_pixels: int = MOST_PIXELS, formats: Sequence[str] | None = None
) -> Image.Image:
    """The picture behind one entry of `images`.

    Args:
        value: a path (relative to `folder`, or absolute), a `data:image/...;base64,` URI, bytes, a PIL image, or a
            dictionary with "bytes" or "path", as `datasets.Image` gives.
        folder: what relative paths start from.
        most_pixels: that an image may have; looked at before it is decoded.
        formats: of files, by Pillow's names; None for all it knows.

    Raises:
        BadImage: if there is no such file, or it is no whole image, or of another format.
        TooManyPixels: if it has more than `most_pixels` pixels.
    """
    if isinstance(value, Image.Image):
        return _upright(value, "image", most_pixels)
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return _decode(value["bytes"], f"image {value.get('path') or 'in bytes'}", most_pixels, formats)
        value = value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return _decode(bytes(value), "image in bytes", most_pixels, formats)
    if isinstance(value, str) and value.startswith("data:"):
        return _decode(read_data_uri(value), "image in a data URI", most_pixels, formats)
    if isinstance(value, (str, Path)) and str(value):
        content, name = _from_path(str(value), folder)
        return _decode(content, name, most_pixels, formats)
    raise BadImage(
        f"an image must be a path, bytes, a data URI, a picture or a dictionary of these, not {_short(value)}"
    )


def read_data_uri(uri: str) -> bytes:
    """The bytes of a `data:` URI, whatever type it claims, or none.

    The data may be base64 by either alphabet, with or without padding, with blanks in it, and percent-encoded. Without
    `;base64` it is read as base64 if it looks like it, which no image file does.

    Raises:
        BadImage: if there is no comma, or the data are not base64 although they should be.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise BadImage(f"the data URI {_short(head)} has no comma; it must be data:[TYPE];base64,DATA")
    plain = unquote_to_bytes(body)
    coded = b"".join(plain.split()).translate(FROM_URL_SAFE).rstrip(b"=")
    named = any(part.strip().lower() == "base64" for part in head.split(";")[1:])
    if not named and not BASE64.fullmatch(coded):
        return plain
    try:
        return base64.b64decode(coded + b"=" * (-len(coded) % 4), validate=True)
    except binascii.Error as error:
        raise BadImage(f"the data URI is not valid base64: {error}") from error


def _from_path(name: str, folder: Path) -> tuple[bytes, str]:
    if name.startswith(("http://", "https://")):
        raise BadImage(f"image {name} is a web address, which is not fetched; download it and give its path")
    path = folder / name.removeprefix("file://")
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise BadImage(f"no such image: {path}") from error
    except (OSError, ValueError) as error:
        raise BadImage(f"cannot read image {path}: {getattr(error, 'strerror', None) or error}") from error
    return content, f"image {path}"


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


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
