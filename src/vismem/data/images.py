"""The one way in for pictures: from a path, bytes, a data URI or a PIL image to an upright 8-bit RGB picture.

Every reader of VisMem opens pictures here, so that training, evaluation, `ask`, the server and the viewer see the same
pixels. Transparent pictures are laid on white, as transformers' `convert_to_rgb` does; pictures of more than 8 bits are
scaled to 8 bits, where Pillow's `convert` would clip them.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

MOST_PIXELS = 89_478_485  # Pillow's own line between a large photograph and a decompression bomb
BASE64 = re.compile(rb"[A-Za-z0-9+/]+")
FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
MOST_BYTES = 512 * 2**20  # of a file; no picture of MOST_PIXELS that people keep comes near
STRIP = 2**21  # pixels that are converted at once, so that a large picture is not in memory several times

ORIENTATION = 0x0112  # EXIF's tag
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # for modes whose colours are multiplied by their alpha
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
KEYED = ("1", "L", "P", "RGB", "I", *SIXTEEN_BITS)  # modes without alpha in which one value may mean "transparent"
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF's tags
HALF_LEVEL = 0.5 / 255
KINDS_OF_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
Levels = Callable[[NDArray[Any]], NDArray[Any]]


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
    """Opens one picture: bounded, upright, 8-bit RGB, transparency on white (`to_rgb`). The first frame of animations.

    Args:
        value: a path (relative to `folder`, or absolute), a `data:image/...;base64,` URI, bytes, a PIL image, or a
            dictionary with "bytes" or "path", as `datasets.Image` gives.
        folder: what relative paths start from.
        most_pixels: the most that an image may have, checked before it is decoded.
        formats: of files, by Pillow's names; None for all it knows.

    Raises:
        NoImageFileError: if there is no such file, or it is a folder, a device, a pipe or a socket.
        TooManyPixels: if it has more than `most_pixels` pixels.
        BadImage: if it is no whole image, of another format, larger than `MOST_BYTES`, or its values have no known
            range.

    Example:
        >>> ink = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        >>> ink.putpixel((0, 0), (0, 0, 0, 255))
        >>> list(open_image(ink).getdata())
        [(0, 0, 0), (255, 255, 255)]
    """
    if isinstance(value, Image.Image):
        with whole_images():
            return turned(*_converted(value, "image", most_pixels))
    if isinstance(value, dict):
        content, value = value.get("bytes"), value.get("path")
        if content is not None:
            if not isinstance(content, (bytes, bytearray, memoryview)):
                raise BadImage(f"the `bytes` of an image must be bytes, not {_short(content)}")
            return _decode(bytes(content), f"image {value or 'in bytes'}", most_pixels, formats)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _decode(bytes(value), "image in bytes", most_pixels, formats)
    if isinstance(value, str) and value.startswith("data:"):
        return _decode(read_data_uri(value), "image in a data URI", most_pixels, formats)
    path = _path(value, folder)
    return _decode(read_file(path), f"image {_named(path)}", most_pixels, formats)


def check_image_file(value: Any, folder: Path = Path()) -> None:
    """Checks what can be known of a picture without opening it: that its file is there, or that it may be an image.

    Args:
        value, folder: as of `open_image`.

    Raises:
        NoImageFileError: if nothing is there, or something other than a regular file, also by a link.
        BadImage: if it is a web address, cannot be reached, is larger than `MOST_BYTES`, or is no kind of image.
    """
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return
        value = value.get("path")
    if isinstance(value, (Image.Image, bytes, bytearray, memoryview)):
        return
    if not (isinstance(value, str) and value.startswith("data:")):
        path = _path(value, folder)
        with _file_errors(path):
            _check_file(os.stat(path), path)


def _path(value: Any, folder: Path) -> Path:
    """The path that a value names. Raises BadImage for a web address, and for what is neither path nor image."""
    if not isinstance(value, (str, Path)) or not str(value):
        known = "a path, bytes, a data URI, a picture or a dictionary of these"
        array = "; make a picture of an array: PIL.Image.fromarray" if hasattr(value, "shape") else ""
        raise BadImage(f"an image must be {known}, not {_short(value)}{array}")
    name = str(value)
    if name.startswith(("http://", "https://")):
        raise BadImage(f"image {_short(name)} is a web address, which is not fetched; download it and give its path")
    return folder / name.removeprefix("file://")


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


def read_file(path: Path) -> bytes:
    """The content of a regular file of at most `MOST_BYTES`.

    A path comes from a user's data: a device has no end, and a pipe keeps its reader waiting. Neither is opened.

    Raises:
        NoImageFileError: if nothing is there, or something other than a regular file, also by a link.
        BadImage: if it cannot be read, or is larger than that.
    """
    with _file_errors(path):
        _check_file(os.stat(path), path)
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            _check_file(status, path)
            return file.read(status.st_size)  # no more: files of /proc say that they are empty, and some have no end


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
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
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_converted` draws the line
            with Image.open(BytesIO(content), formats=None if formats is None else tuple(formats)) as image:
                picture, orientation = _converted(image, name, most_pixels)
    except BadImage:
        raise
    except Image.UnidentifiedImageError as error:
        known = f"other than {', '.join(formats)}" if formats else "that Pillow does not know"
        raise BadImage(f"{name} is not an image, or of a format {known}") from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(name, most_pixels) from error
    except Exception as error:  # Pillow's decoders raise many kinds, from OSError to struct.error
        raise BadImage(f"{name} is broken: {error or type(error).__name__}") from error
    del image  # a large picture is not to be there twice while it is turned
    return turned(picture, orientation)


def _converted(image: Image.Image, name: str, most_pixels: int) -> tuple[Image.Image, int]:
    """The picture in RGB as it lies in its file, and its orientation."""
    if image.width * image.height > most_pixels:
        raise _too_many_pixels(name, most_pixels)
    return to_rgb(image, name), _orientation(image)


def _orientation(image: Image.Image) -> int:
    """The orientation by EXIF or XMP, 1 to 8; 1 where there is none. For loaded pictures: Pillow turns TIFF itself."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # Pillow's parser raises many kinds
        return 1


def turned(picture: Image.Image, orientation: int) -> Image.Image:
    """The picture upright, where `orientation` (EXIF's, 1 to 8) says how it lies."""
    return picture.transpose(TURNS[orientation]) if orientation in TURNS else picture


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """A new 8-bit RGB picture of an image in any of Pillow's modes, in the image's own size and orientation.

    Transparency (an alpha channel, straight or premultiplied, of the picture or of its palette, or one transparent
    value) is laid on white. Integers of 16 bits lose their low byte, as in OpenCV; integers in mode I count as 8 bits
    where none is above 255 and no file says otherwise. Floats are in 0..1, or whole numbers in 0..255.

    Args:
        image: the image; decoded here if it was not.
        name: of it, for messages.

    Raises:
        BadImage: if it is broken, has no pixels, or values whose range is not known: negative or 32-bit integers,
            other floats.

    Example:
        >>> to_rgb(Image.new("I;16", (1, 1), 0x80FF)).getpixel((0, 0))
        (128, 128, 128)
    """
    if not (image.width and image.height):
        raise BadImage(f"{name} has no pixels")
    try:
        key = _transparent_value(image)  # before it is loaded, while Pillow still knows the file's depth
        image.load()
        levels = _levels(image)
        picture = Image.new("RGB", image.size)
        for top, strip in _strips(image):
            picture.paste(_strip_to_rgb(strip, key, levels), (0, top))
        return picture
    except BadImage as error:
        raise BadImage(f"{name} {error}") from error
    except Exception as error:
        raise BadImage(f"{name} is broken: {error or type(error).__name__}") from error


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Top and content of each strip of at most `STRIP` pixels, or of one row."""
    rows = max(STRIP // image.width, 1)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _strip_to_rgb(strip: Image.Image, key: Any, levels: Levels | None) -> Image.Image:
    if levels is not None:
        values = np.asarray(strip)
        grey = levels(values).astype(np.uint8)
        if key is not None:
            grey[values == key] = 255
        return Image.fromarray(grey).convert("RGB")
    strip.info = {} if key is None else {"transparency": key}
    if strip.mode in STRAIGHT:
        strip = strip.convert(STRAIGHT[strip.mode])
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
    return strip.convert("RGB")


def _transparent_value(image: Image.Image) -> Any:
    """The value that means "transparent", or a palette's alphas as bytes; None where there is neither.

    Pillow gives the value as it stands in the file, but scales the pixels of 2, 4 and 16 bits to 8.
    """
    key = image.info.get("transparency")
    wanted: Any = {"P": (int, bytes), "RGB": tuple}.get(image.mode, int)
    if image.mode not in KEYED or not isinstance(key, wanted):
        return None
    stored = getattr(image, "tile", None)
    match stored[0][3] if stored and image.format == "PNG" else None:
        case "L;2":
            return key * 85
        case "L;4":
            return key * 17
        case "RGB;16B":
            return tuple(value >> 8 for value in key)
    return key


def _levels(image: Image.Image) -> Levels | None:
    """How the values of a picture of more than 8 bits become 0 to 255; None for other modes.

    Raises:
        BadImage: if their range is not known.
    """
    if image.mode not in ("I", "F", *SIXTEEN_BITS):
        return None
    tags = getattr(image, "tag_v2", {})
    (bits, *_) = tags.get(BITS_PER_SAMPLE, (0,))
    if image.mode in SIXTEEN_BITS:
        levels = _shifted(bits or 16)
    elif image.mode == "F":
        levels = _float_levels(image)
    else:
        extrema: Any = image.getextrema()
        low, high = extrema
        if bits not in (12, 16):  # mode I of these formats is 16 bits, of others whatever its values need
            bits = 16 if high > 255 or image.format in ("PNG", "PPM", "JPEG2000") else 8
        if low < 0 or high >= 2**bits:
            raise _unknown_range("integers", str(low), str(high))
        levels = _shifted(bits)
    return (lambda values: 255 - levels(values)) if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else levels


def _shifted(bits: int) -> Levels:
    return lambda values: values >> (bits - 8)


def _float_levels(image: Image.Image) -> Levels:
    low, high, whole = np.inf, -np.inf, True
    for _, strip in _strips(image):
        values = np.asarray(strip)
        if not np.isfinite(values).all():
            raise BadImage("has values that are not finite; replace them, and scale the others to 0..1 or to 8 bits")
        low, high = min(low, values.min()), max(high, values.max())
        whole = whole and bool((values == np.rint(values)).all())
    if low >= -HALF_LEVEL and high <= 1 + HALF_LEVEL:
        return lambda values: np.rint(np.clip(values, 0, 1) * 255)
    if whole and low >= 0 and high <= 255:  # as Pillow makes them of 8 bits
        return lambda values: values
    raise _unknown_range("floats", f"{low:g}", f"{high:g}")


def _unknown_range(kind: str, low: str, high: str) -> BadImage:
    known = "0..1, or whole numbers in 0..255" if kind == "floats" else "0..65535"
    return BadImage(
        f"has {kind} from {low} to {high}, and nothing says which is black and which is white: "
        f"scale them to {known}, or save the picture with 8 bits"
    )


def _too_many_pixels(name: str, most: int) -> TooManyPixels:
    return TooManyPixels(f"{name} has more than {most:,} pixels, the limit; make it smaller first")


def _named(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:97]}...{text[-100:]}"


def _short(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python's limit on the digits of an integer
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."
