"""Image files, and requests that carry them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import struct
import zlib
from collections.abc import Iterator

import pytest
from PIL import Image

from vismem.serving.errors import ApiError
from vismem.serving.pictures import PictureLimits, Pictures

LIMITS = PictureLimits(count=3, size=200_000, pixels=250_000, total_pixels=400_000, timeout=5.0)


def scene(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """An image with four different corners."""
    made = Image.new("RGB", (width, height), (20, 40, 60))
    made.paste((250, 10, 10), (0, 0, width // 2, height // 2))
    made.paste((10, 250, 10), (width // 2, 0, width, height // 3))
    return made.convert(mode)


def file_of(picture: Image.Image, form: str, **settings: object) -> bytes:
    held = io.BytesIO()
    picture.save(held, form, **settings)
    return held.getvalue()


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes, pixels: bytes | None = None) -> bytes:
    """A handmade PNG with extra chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = zlib.compress(b"\0" * (height * (3 * width + 1))) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", body) + chunk(b"IEND")


def exif(entries: int, size: int) -> bytes:
    """EXIF whose entries all refer to the same bytes, so it expands to `entries * size`."""
    places = 8 + 2 + 12 * entries + 4
    listed = b"".join(struct.pack("<HHII", 1000 + i, 7, size, places) for i in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + listed + b"\0\0\0\0" + b"z" * size


def turned(orientation: int) -> bytes:
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def xmp(orientation: int) -> bytes:
    return b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation


def seen_through(mode: str) -> Image.Image:
    """The scene with a transparent black hole and a half-transparent edge."""
    made = scene(mode="RGBA")
    made.paste((0, 0, 0, 0), (5, 4, 15, 12))
    made.paste((0, 0, 0, 128), (15, 4, 20, 12))
    return made.convert(mode)


def uri(file: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def fetched(url: str, limits: PictureLimits = LIMITS) -> Image.Image:
    pictures = Pictures(limits)
    return pictures.decode(asyncio.run(pictures.fetch([url])))[0]


@contextlib.contextmanager
def refused(status: int, *words: str) -> Iterator[None]:
    """A one-line error of that status in the field `messages`, containing these words."""
    with pytest.raises(ApiError) as caught:
        yield
    assert caught.value.status == status, caught.value
    assert caught.value.param == "messages" and caught.value.code
    assert "\n" not in caught.value.message and len(caught.value.message) < 300
    for word in words:
        assert word in caught.value.message


KINDS = {
    "png": lambda: file_of(scene(), "PNG"),
    "png, palette": lambda: file_of(scene(mode="P"), "PNG"),
    "png, transparent palette": lambda: file_of(scene(mode="P"), "PNG", transparency=3),
    "png, palette of alphas": lambda: file_of(scene(mode="P"), "PNG", transparency=bytes([0, 99, 128, 255] * 64)),
    "png, transparent palette, turned": lambda: file_of(scene(mode="P"), "PNG", transparency=3, exif=turned(6)),
    "png, transparent colour": lambda: file_of(scene(), "PNG", transparency=(250, 10, 10)),
    "png, alpha": lambda: file_of(seen_through("RGBA"), "PNG"),
    "png, alpha, turned": lambda: file_of(seen_through("RGBA"), "PNG", exif=turned(5)),
    "png, grey and alpha": lambda: file_of(seen_through("LA"), "PNG"),
    "png, transparent grey": lambda: file_of(scene(mode="L"), "PNG", transparency=scene(mode="L").getpixel((0, 0))),
    "png, bits": lambda: file_of(scene(mode="1"), "PNG"),
    "png, 16 bits": lambda: file_of(Image.new("I;16", (9, 7), 40_000), "PNG"),
    "png, animated": lambda: file_of(scene(), "PNG", save_all=True, append_images=[scene(mode="L").convert("RGB")]),
    "png, texts": lambda: png(9, 7, chunk(b"tEXt", b"a\0b"), chunk(b"zTXt", b"c\0\0" + zlib.compress(b"d"))),
    "jpeg": lambda: file_of(scene(), "JPEG"),
    "jpeg, grey": lambda: file_of(scene(mode="L"), "JPEG"),
    "jpeg, cmyk": lambda: file_of(scene(mode="CMYK"), "JPEG"),
    "jpeg, progressive": lambda: file_of(scene(), "JPEG", progressive=True),
    "jpeg, comment and profile": lambda: file_of(scene(), "JPEG", comment="x" * 999, icc_profile=b"p" * 70_000),
    "jpeg of several": lambda: file_of(scene(), "MPO", save_all=True, append_images=[scene(20, 10)]),
    "webp": lambda: file_of(scene(), "WEBP"),
    "webp, lossless and alpha": lambda: file_of(seen_through("RGBA"), "WEBP", lossless=True, exact=True),
    "webp, animated": lambda: file_of(scene(), "WEBP", save_all=True, append_images=[scene(mode="L").convert("RGB")]),
    "webp, profile": lambda: file_of(scene(), "WEBP", icc_profile=b"p" * 5001),
    "gif": lambda: file_of(scene(), "GIF"),
    "gif, transparent": lambda: file_of(scene(mode="P"), "GIF", transparency=2),
    "gif, animated": lambda: file_of(scene(), "GIF", save_all=True, append_images=[scene(mode="L"), scene()]),
    "gif, comment": lambda: file_of(scene(), "GIF", comment=b"x" * 3000),
    "bmp": lambda: file_of(scene(), "BMP"),
    "bmp, palette": lambda: file_of(scene(mode="P"), "BMP"),
    **{f"jpeg, turned {i}": lambda i=i: file_of(scene(), "JPEG", exif=b"Exif\0\0" + turned(i)) for i in range(10)},
    **{f"png, turned {i}": lambda i=i: file_of(scene(), "PNG", exif=turned(i)) for i in (1, 5, 6, 8)},
    **{f"webp, turned {i}": lambda i=i: file_of(scene(), "WEBP", exif=turned(i)) for i in (1, 3, 6, 7)},
    "jpeg, turned by xmp": lambda: file_of(scene(), "JPEG", xmp=xmp(6)),
    "png, turned by xmp": lambda: png(9, 7, chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(6))),
    "webp, turned by xmp": lambda: file_of(scene(), "WEBP", xmp=xmp(6)),
    "jpeg, turned by exif, not xmp": lambda: file_of(scene(), "JPEG", exif=b"Exif\0\0" + turned(8), xmp=xmp(6)),
}
