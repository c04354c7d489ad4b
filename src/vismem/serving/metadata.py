"""Strips metadata from image files: texts, profiles, thumbnails, and EXIF except for the orientation.

Metadata can make small files expand: an EXIF directory may refer to the same ten megabytes a thousand times, and Pillow
copies them each time; comments in tiny pieces are joined one by one. None of this reaches Pillow. A file is
walked part by part, never decoded; anything that does not match its format is left for Pillow to refuse.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from vismem.data.images import ORIENTATION, BadImageError

MAX_PARTS = 20_000  # per file; common PNG encoders write one per 8 kB
MAX_SCANS = 100  # per JPEG; each covers the whole image, however few bytes it has
PNG, PNG_KEPT = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
WEBP_KEPT = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
WEBP_METADATA = 0x2C  # VP8X flags: profile, EXIF, XMP
JPEG_KEPT = (0xE0, 0xEE)  # application segments that define the colour space: JFIF, Adobe
PNG_XMP, JPEG_XMP = b"XML:com.adobe.xmp\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # in PNG only if uncompressed
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def stripped(file: bytes) -> tuple[bytes, int]:
    """Returns a file without metadata, and its orientation from EXIF, or else from XMP (1 to 8; 1 is upright).

    Args:
        file: PNG, JPEG, WebP or GIF; any other format is returned unchanged.

    Raises:
        BadImageError: if the file is truncated, or has implausibly many parts.
    """
    try:
        if file.startswith(PNG):
            return _png(file)
        if file.startswith(b"\xff\xd8\xff"):
            return _jpeg(file)
        if file.startswith(b"RIFF") and file[8:12] == b"WEBP":
            return _webp(file)
        if file.startswith((b"GIF87a", b"GIF89a")):
            return _gif(file), 1
    except (struct.error, IndexError) as error:
        raise BadImageError("the file is truncated") from error
    return file, 1


def _png(file: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, at = [PNG], b"", b"", len(PNG)
    for _ in _parts():
        length, kind = struct.unpack_from(">I4s", file, at)
        end = at + 12 + length
        if end > len(file):
            raise BadImageError("the file is truncated")
        if kind in PNG_KEPT:
            kept.append(file[at:end])
        elif kind == b"eXIf":
            exif = file[at + 8 : at + 8 + length]
        elif kind == b"iTXt" and file.startswith(PNG_XMP, at + 8):
            xmp = file[at + 8 : at + 8 + length]
        if kind == b"IEND":
            return b"".join(kept), orientation_of(exif, xmp)
        at = end
    raise AssertionError


def _jpeg(file: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, at = [b"\xff\xd8"], b"", b"", 2
    for _ in _parts():
        fill, marker = file[at], file[at + 1]
        if fill != 0xFF:
            raise BadImageError("the file contains data that is not JPEG")
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:
            if file.count(b"\xff\xda", at) > MAX_SCANS:
                raise BadImageError(f"it has more than {MAX_SCANS} scans")
            return b"".join(kept) + file[at:], orientation_of(exif, xmp)
        (length,) = struct.unpack_from(">H", file, at + 2)
        segment = file[at : at + 2 + length]
        if marker == 0xE1 and segment[4:10] == b"Exif\0\0":
            exif = segment[10:]
        elif marker == 0xE1 and segment.startswith(JPEG_XMP, 4):
            xmp = segment
        if marker in JPEG_KEPT or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        at += 2 + length
    raise AssertionError


def _webp(file: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, at = [], b"", b"", 12
    for _ in _parts():
        if at + 8 > len(file):
            break
        kind, length = struct.unpack_from("<4sI", file, at)
        end = at + 8 + length + length % 2
        if kind == b"VP8X":
            kept.append(file[at : at + 8] + bytes([file[at + 8] & ~WEBP_METADATA]) + file[at + 9 : end])
        elif kind in WEBP_KEPT:
            kept.append(file[at:end])
        elif kind == b"EXIF":
            exif = file[at + 8 : at + 8 + length].removeprefix(b"Exif\0\0")
        elif kind == b"XMP ":
            xmp = file[at + 8 : at + 8 + length]
        at = end
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body, orientation_of(exif, xmp)


def _gif(file: bytes) -> bytes:
    """Keeps everything from the first image on; Pillow reads only that image."""
    at = 13 + (3 * 2 ** ((file[10] & 7) + 1) if file[10] & 0x80 else 0)
    kept = [file[:at]]
    for _ in _parts():
        if file[at] == 0x2C:
            return b"".join(kept) + file[at:]
        if file[at] != 0x21:
            raise BadImageError("the file has no image")
        begin, at = at, at + 2
        for _ in _parts():
            size = file[at]
            at += 1 + size
            if not size:
                break
        if file[begin + 1] == 0xF9:  # the transparent colour
            kept.append(file[begin:at])
    raise AssertionError


def _parts() -> Iterator[int]:
    yield from range(MAX_PARTS)
    raise BadImageError(f"the file has more than {MAX_PARTS} parts")


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """The orientation in EXIF data (starting at the TIFF header), or else in XMP; 1 if neither has one."""
    match = XMP_ORIENTATION.search(xmp)
    return _exif_orientation(exif) or (int(match[1]) if match else 1)


def _exif_orientation(exif: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (at,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, at)
        for place in range(at + 2, at + 2 + 12 * min(entries, 1000), 12):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", exif, place)
            if tag == ORIENTATION:
                return value if (kind, count) == (3, 1) and 1 <= value <= 8 else 1
    except struct.error:
        pass
    return None
