"""Opens images: a path, bytes, a data URI or a PIL image becomes an upright 8-bit RGB image.

Training, evaluation, `ask`, the server and the viewer all open images here, so they see the same pixels. Transparency
is composited on white, as in transformers' `convert_to_rgb`; more than 8 bits per channel are scaled to 8, where
Pillow's `convert` would clip.
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

from vismem.deprecation import renamed

MOST_PIXELS = 89_478_485  # Pillow's threshold for a decompression bomb
BASE64 = re.compile(rb"[A-Za-z0-9+/]+")
FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")
MOST_BYTES = 512 * 2**20  # of a file; far above any realistic image of MOST_PIXELS
STRIP = 2**21  # pixels converted at once, so a large image is not in memory several times

ORIENTATION = 0x0112  # the EXIF tag
TRANSPOSES = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRAIGHT_ALPHA = {"La": "LA", "RGBa": "RGBA"}  # by mode with premultiplied alpha
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
COLOR_KEYED = ("1", "L", "P", "RGB", "I", *SIXTEEN_BITS)  # modes without alpha where one value may be transparent
BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 258, 262, 0  # TIFF tags
HALF_LEVEL = 0.5 / 255
FILE_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
Levels = Callable[[NDArray[Any]], NDArray[Any]]


class BadImageError(ValueError):
    """The image cannot be used; the message says which and why."""


class TooManyPixelsError(BadImageError):
    """The image has more pixels than allowed."""


class NoImageFileError(BadImageError):
    """The path does not exist or is not a regular file."""


@contextmanager
def whole_images() -> Iterator[None]:
    """Makes Pillow reject truncated files; other libraries (lmms-eval) make it accept them globally."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def open_image(
    value: Any, folder: Path = Path(), most_pixels: int = MOST_PIXELS, formats: Sequence[str] | None = None
) -> Image.Image:
    """Opens an image as upright 8-bit RGB with transparency on white (`to_rgb`); the first frame of an animation.

    Args:
        value: a path (relative to `folder`, or absolute), a `data:image/...;base64,` URI, bytes, a PIL image, or a
            dictionary with "bytes" or "path" as from `datasets.Image`.
        folder: base of relative paths.
        most_pixels: maximum number of pixels, checked before decoding.
        formats: allowed file formats, by Pillow's names; None for all.

    Raises:
        NoImageFileError: if the file does not exist or is not a regular file.
        TooManyPixelsError: if the image has more than `most_pixels` pixels.
        BadImageError: if the image is broken or truncated, of another format, larger than `MOST_BYTES`, or the range
            of its values is unknown.

    Example:
        >>> ink = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
        >>> ink.putpixel((0, 0), (0, 0, 0, 255))
        >>> list(open_image(ink).getdata())
        [(0, 0, 0), (255, 255, 255)]
    """
    source, name = _source(value, folder)
    if isinstance(source, Image.Image):
        with whole_images():
            return upright(*_convert(source, name, most_pixels))
    if isinstance(source, str):
        source = read_data_uri(source)
    return _decode(read_file(source) if isinstance(source, Path) else source, name, most_pixels, formats)


def check_image_file(value: Any, folder: Path = Path()) -> None:
    """Checks an image without opening it: its file exists, or its type is supported. Arguments as for `open_image`.

    Raises:
        NoImageFileError: if the file does not exist or, after following links, is not a regular file.
        BadImageError: if it is a web address, inaccessible, larger than `MOST_BYTES`, or of an unsupported type.
    """
    source, _ = _source(value, folder)
    if isinstance(source, Path):
        with _file_errors(source):
            _check_file(os.stat(source), source)


def _source(value: Any, folder: Path) -> tuple[Image.Image | bytes | str | Path, str]:
    """What an image is read from (a data URI is a string), and its name for messages. Raises BadImageError."""
    name = "image in bytes"
    if isinstance(value, dict):
        content, value = value.get("bytes"), value.get("path")
        if content is not None:
            if not isinstance(content, (bytes, bytearray, memoryview)):
                raise BadImageError(f"the `bytes` of an image must be bytes, not {_short(content)}")
            value, name = content, f"image {value or 'in bytes'}"
    if isinstance(value, Image.Image):
        return value, "image"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value), name
    if not isinstance(value, (str, Path)) or not str(value):
        types = "a path, bytes, a data URI, a PIL image or a dictionary of these"
        hint = "; convert an array with PIL.Image.fromarray" if hasattr(value, "shape") else ""
        raise BadImageError(f"an image must be {types}, not {_short(value)}{hint}")
    text = str(value)
    if text.startswith("data:"):
        return text, "image in a data URI"
    if text.startswith(("http://", "https://")):
        raise BadImageError(
            f"image {_short(text)} is a web address, which is not fetched; download it and give its path"
        )
    path = folder / text.removeprefix("file://")
    return path, f"image {_short_path(path)}"


def read_data_uri(uri: str) -> bytes:
    """Decodes a `data:` URI of any media type, or none.

    Accepts both base64 alphabets, with or without padding, whitespace and percent-encoding. Without `;base64`, data
    that looks like base64 is decoded as such; no image file looks like that.

    Raises:
        BadImageError: if there is no comma, or the data is not valid base64.
    """
    head, comma, body = uri.partition(",")
    if not comma:
        raise BadImageError(f"the data URI {_short(head)} has no comma; it must be data:[TYPE];base64,DATA")
    plain = unquote_to_bytes(body)
    coded = b"".join(plain.split()).translate(FROM_URL_SAFE).rstrip(b"=")
    named = any(part.strip().lower() == "base64" for part in head.split(";")[1:])
    if not named and not BASE64.fullmatch(coded):
        return plain
    try:
        return base64.b64decode(coded + b"=" * (-len(coded) % 4), validate=True)
    except binascii.Error as error:
        raise BadImageError(f"the data URI is not valid base64: {error}") from error


def read_file(path: Path) -> bytes:
    """Reads a regular file of at most `MOST_BYTES`.

    Paths come from user data, so devices (endless) and pipes (blocking) are never opened.

    Raises:
        NoImageFileError: if the file does not exist or, after following links, is not a regular file.
        BadImageError: if it cannot be read or is too large.
    """
    with _file_errors(path):
        _check_file(os.stat(path), path)
        with open(path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            _check_file(status, path)
            return file.read(status.st_size)  # no more: files in /proc report size 0, and some are endless


@contextmanager
def _file_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except BadImageError:
        raise
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoImageFileError(f"no such image: {_short_path(path)}") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadImageError(f"cannot read image {_short_path(path)}: {reason}") from error


def _check_file(status: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")
        raise NoImageFileError(f"image {_short_path(path)} is {kind}, not a regular file")
    if status.st_size > MOST_BYTES:
        raise BadImageError(f"image {_short_path(path)} is larger than {MOST_BYTES // 2**20} MiB, the limit")


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # in case it became a pipe after the check


def _decode(content: bytes, name: str, most_pixels: int, formats: Sequence[str] | None) -> Image.Image:
    if not content:
        raise BadImageError(f"{name} is empty")
    try:
        with warnings.catch_warnings(), whole_images():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `_convert` enforces the limit
            with Image.open(BytesIO(content), formats=None if formats is None else tuple(formats)) as image:
                picture, orientation = _convert(image, name, most_pixels)
    except BadImageError:
        raise
    except Image.UnidentifiedImageError as error:
        allowed = f"other than {', '.join(formats)}" if formats else "that Pillow does not know"
        raise BadImageError(f"{name} is not an image, or has a format {allowed}") from error
    except Image.DecompressionBombError as error:
        raise _too_many_pixels(name, most_pixels) from error
    except Exception as error:  # Pillow's decoders raise many types, from OSError to struct.error
        raise BadImageError(f"{name} is broken: {error or type(error).__name__}") from error
    del image  # do not hold a large image twice while it is rotated
    return upright(picture, orientation)


def _convert(image: Image.Image, name: str, most_pixels: int) -> tuple[Image.Image, int]:
    """The image in RGB, not yet rotated, and its EXIF or XMP orientation, 1 to 8."""
    if image.width * image.height > most_pixels:
        raise _too_many_pixels(name, most_pixels)
    picture = to_rgb(image, name)
    try:
        return picture, int(image.getexif().get(ORIENTATION, 1))  # of the loaded image: Pillow rotates TIFF itself
    except Exception:  # Pillow's parser raises many types
        return picture, 1


def upright(picture: Image.Image, orientation: int) -> Image.Image:
    """Rotates and flips a picture according to its EXIF `orientation`, 1 to 8."""
    return picture.transpose(TRANSPOSES[orientation]) if orientation in TRANSPOSES else picture


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Converts an image in any Pillow mode to a new 8-bit RGB image of the same size and orientation.

    Transparency (straight or premultiplied alpha, a palette's alpha, or one transparent value) is composited on white.
    16-bit integers lose their low byte, as in OpenCV; mode I counts as 8 bits if no value is above 255 and the file
    does not say otherwise. Floats must be in 0..1, or whole numbers in 0..255.

    Args:
        image: the image; decoded here if necessary.
        name: for messages.

    Raises:
        BadImageError: if the image is broken or has no pixels, or its range is unknown (negative or 32-bit integers,
            other floats).

    Example:
        >>> to_rgb(Image.new("I;16", (1, 1), 0x80FF)).getpixel((0, 0))
        (128, 128, 128)
    """
    if not (image.width and image.height):
        raise BadImageError(f"{name} has no pixels")
    try:
        key = _transparent_value(image)  # before loading, while Pillow still knows the file's bit depth
        image.load()
        levels = _levels(image)
        picture = Image.new("RGB", image.size)
        for top, strip in _strips(image):
            picture.paste(_strip_to_rgb(strip, key, levels), (0, top))
        return picture
    except BadImageError as error:
        raise BadImageError(f"{name} {error}") from error
    except Exception as error:
        raise BadImageError(f"{name} is broken: {error or type(error).__name__}") from error


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yields top and content of each strip of at most `STRIP` pixels, or one row."""
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
    if strip.mode in STRAIGHT_ALPHA:
        strip = strip.convert(STRAIGHT_ALPHA[strip.mode])
    if strip.has_transparency_data:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
    return strip.convert("RGB")


def _transparent_value(image: Image.Image) -> Any:
    """The transparent value, or a palette's alphas as bytes; None without either.

    Pillow returns the value as stored in the file, but scales pixels of 2, 4 and 16 bits to 8.
    """
    key = image.info.get("transparency")
    wanted: Any = {"P": (int, bytes), "RGB": tuple}.get(image.mode, int)
    if image.mode not in COLOR_KEYED or not isinstance(key, wanted):
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
    """A function that maps values of more than 8 bits to 0..255; None for other modes.

    Raises:
        BadImageError: if the range of the values is unknown.
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
        if bits not in (12, 16):  # mode I is 16 bits in these formats, and unspecified in others
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
            raise BadImageError("has values that are not finite; replace them, and scale the rest to 0..1 or to 8 bits")
        low, high = min(low, values.min()), max(high, values.max())
        whole = whole and bool((values == np.rint(values)).all())
    if low >= -HALF_LEVEL and high <= 1 + HALF_LEVEL:
        return lambda values: np.rint(np.clip(values, 0, 1) * 255)
    if whole and low >= 0 and high <= 255:  # as Pillow converts 8 bits
        return lambda values: values
    raise _unknown_range("floats", f"{low:g}", f"{high:g}")


def _unknown_range(kind: str, low: str, high: str) -> BadImageError:
    known = "0..1, or whole numbers in 0..255" if kind == "floats" else "0..65535"
    return BadImageError(
        f"has {kind} from {low} to {high}, and their black and white points are unknown: "
        f"scale them to {known}, or save the image with 8 bits"
    )


def _too_many_pixels(name: str, most: int) -> TooManyPixelsError:
    return TooManyPixelsError(f"{name} has more than {most:,} pixels, the limit; resize it first")


def _short_path(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:97]}...{text[-100:]}"


def _short(value: Any) -> str:
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python's limit on the digits of an integer
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


__getattr__ = renamed(__name__, {"BadImage": "BadImageError", "TooManyPixels": "TooManyPixelsError"})
