"""An image file without all that is not the picture: texts, profiles, thumbnails, EXIF but for the orientation.

Metadata is where small files become large: a directory of EXIF may name the same ten megabytes a thousand times, and
Pillow copies them a thousand times; comments in crumbs are joined one by one. Nothing of that reaches Pillow here.
A file is walked part by part, never decoded; what does not look like its format is left for Pillow to refuse.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from vismem.data.images import ORIENTATION, BadImageError

MOST_PARTS = 20_000  # of a file; PNG by the common encoders has one in 8 kB
MOST_SCANS = 100  # of a JPEG: each goes over all of the picture, however few bytes it has
PNG, PNG_KEPT = b"\x89PNG\r\n\x1a\n", (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
WEBP_KEPT = (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF")
WEBP_METADATA = 0x2C  # flags of VP8X: profile, EXIF, XMP
JPEG_KEPT = (0xE0, 0xEE)  # of the application's segments, those that tell the colours' meaning: JFIF, Adobe
PNG_XMP, JPEG_XMP = b"XML:com.adobe.xmp\0\0", b"http://ns.adobe.com/xap/1.0/\0"  # the former not compressed
XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])')


def stripped(file: bytes) -> tuple[bytes, int]:
    """The picture's own parts of a file, and its orientation by EXIF, else by XMP (1 to 8; 1 is upright).

    Args:
        file: PNG, JPEG, WebP, GIF; any other comes back as it is.

    Raises:
        BadImageError: if it has more parts than pictures have, or breaks off within one.
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
        raise BadImageError("the file breaks off") from error
    return file, 1


def _png(file: bytes) -> tuple[bytes, int]:
    kept, exif, xmp, at = [PNG], b"", b"", len(PNG)
    for _ in _parts():
        length, kind = struct.unpack_from(">I4s", file, at)
        end = at + 12 + length
        if end > len(file):
            raise BadImageError("the file breaks off")
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
            raise BadImageError("something that is no JPEG stands in the file")
        if marker == 0xFF:  # bytes that fill up
            at += 1
            continue
        if marker == 0xDA:
            if file.count(b"\xff\xda", at) > MOST_SCANS:
                raise BadImageError(f"it has more than {MOST_SCANS} scans")
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
    """Up to the first picture an image in it stays; what comes later is not read."""
    at = 13 + (3 * 2 ** ((file[10] & 7) + 1) if file[10] & 0x80 else 0)
    kept = [file[:at]]
    for _ in _parts():
        if file[at] == 0x2C:
            return b"".join(kept) + file[at:]
        if file[at] != 0x21:
            raise BadImageError("there is no picture in the file")
        begin, at = at, at + 2
        for _ in _parts():
            size = file[at]
            at += 1 + size
            if not size:
                break
        if file[begin + 1] == 0xF9:  # which colour is transparent
            kept.append(file[begin:at])
    raise AssertionError


def _parts() -> Iterator[int]:
    yield from range(MOST_PARTS)
    raise BadImageError(f"the file has more than {MOST_PARTS} parts")


def orientation_of(exif: bytes, xmp: bytes = b"") -> int:
    """Reads the orientation from EXIF data, which begin with a TIFF header, else from XMP; 1 if neither has one."""
    said = XMP_ORIENTATION.search(xmp)
    return _by_exif(exif) or (int(said[1]) if said else 1)


def _by_exif(exif: bytes) -> int | None:
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
