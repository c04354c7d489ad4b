"""Images from outside, as files: bombs, broken ones, and what their metadata would do."""

from __future__ import annotations

import asyncio
import base64
import io
import random
import struct
import subprocess
import zlib
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from image_requests import (
    KINDS,
    LIMITS,
    chunk,
    exif,
    fetched,
    file_of,
    png,
    refused,
    scene,
    turned,
    uri,
)

pytest.importorskip("httpx")

import numpy as np
from PIL import GifImagePlugin, Image, ImageFile, ImageOps
from transformers.image_transforms import convert_to_rgb

from vismem.data.images import BadImageError, TooManyPixelsError, open_image
from vismem.serving.errors import ApiError
from vismem.serving.metadata import orientation_of, stripped
from vismem.serving.pictures import FORMATS, PictureLimits, Pictures


def decoded(*files: bytes, limits: PictureLimits = LIMITS) -> list[Image.Image]:
    return Pictures(limits).decode(files)


# Files.


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_decodes_images_like_open_image(kind: str) -> None:
    file = KINDS[kind]()
    found, wanted = fetched(uri(file)), open_image(file, Path())
    assert found.mode == "RGB" and found.size == wanted.size and found.tobytes() == wanted.tobytes()
    if "by xmp" in kind:
        assert found.height > found.width


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "16 bits" not in kind])
def test_the_server_decodes_images_like_transformers(kind: str) -> None:
    """transformers rotates first and then composites on white."""
    picture = ImageOps.exif_transpose(Image.open(io.BytesIO(KINDS[kind]())))
    assert (np.asarray(fetched(uri(KINDS[kind]()))) == convert_to_rgb(picture, return_numpy=True)).all()


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_exif_is_dropped_and_the_orientation_kept(kind: str) -> None:
    file = KINDS[f"{kind}, turned 6"]()
    plain, orientation = stripped(file)
    assert orientation == 6 and turned(6) in file and turned(6)[8:] not in plain
    assert not Image.open(io.BytesIO(plain)).getexif()
    assert decoded(file)[0].size == (30, 40)


def test_comments_and_profiles_are_dropped() -> None:
    for kind, mark in (("gif, comment", b"xxxx"), ("jpeg, comment and profile", b"xxxx"), ("webp, profile", b"pppp")):
        file = KINDS[kind]()
        assert mark in file and mark not in stripped(file)[0]
    plain = stripped(KINDS["webp, profile"]())[0]
    assert plain[12:16] == b"VP8X" and not plain[20] & 0b101100  # it does not tell of what is no longer there
    assert stripped(plain) == (plain, 1)


@pytest.mark.parametrize(
    "data",
    [b"", b"II", b"II*\0", b"XX" + turned(6)[2:], turned(9), turned(6)[:14], b"MM\0*\xff\xff\xff\xff" + bytes(99)],
)
def test_an_unreadable_orientation_counts_as_upright(data: bytes) -> None:
    assert orientation_of(data) == 1
    assert orientation_of(turned(6)) == 6


@pytest.mark.parametrize(
    "label", ["image/png", "IMAGE/X-anything;name=a.b", "application/octet-stream", "text/plain", ""]
)
def test_the_media_type_does_not_decide(label: str) -> None:
    assert fetched(uri(KINDS["jpeg"](), label)).size == (40, 30)


@pytest.mark.parametrize("kind", ["png", "jpeg", "gif", "bmp"])
def test_all_spellings_of_base64_are_read(kind: str) -> None:
    file = KINDS[kind]()
    wanted, plain = fetched(uri(file)).tobytes(), base64.b64encode(file).decode()
    for each in (
        "data:image/png;base64," + plain.rstrip("="),
        "data:image/png;base64," + plain + "==",
        "data:image/png;BASE64;x=y," + plain,
        "data:image/png; base64," + base64.urlsafe_b64encode(file).decode(),
        "data:image/png," + plain,
        "data:," + plain.rstrip("="),
        "data:image/png," + quote(file),
    ):
        assert fetched(each).tobytes() == wanted


def test_whitespace_and_percent_encoding_in_a_data_uri_are_read() -> None:
    whole = uri(KINDS["png"]())
    head, _, body = whole.partition(",")
    broken = "\r\n".join(body[i : i + 76] for i in range(0, len(body), 76))
    for each in (f"{head},{broken}\n", f"{head}, {body} ", f"{head},{quote(body, safe='')}", "DATA" + whole[4:]):
        assert fetched(each).tobytes() == scene().tobytes()


@pytest.mark.parametrize(
    "url, word",
    [
        ("data:", "no comma"),
        ("data:image/png;base64", "no comma"),
        ("data:" + "a=b;" * 200, "no comma"),
        ("data:,", "empty"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,   ", "empty"),
        ("data:image/png;base64,====", "empty"),
        ("data:text/html;base64,PGI+", "not an image"),
        ("data:image/png,abc", "not an image"),
        ("data:image/svg+xml,<svg/>", "not an image"),
        ("data:;base64,AAAA", "not an image"),
        ("data:image/png;base64,AAAA", "not an image"),
        ("data:image/png;base64,iVBO_-w0", "not an image"),
        ("data:image/png;" + "a=b;" * 200 + "base64,AAAA", "not an image"),
        ("data:image/png;base64,iVBORw0KG", "not valid base64"),
        ("data:image/png;base64,iVBO=Rw0", "not valid base64"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "not valid base64"),
        ("data:image/png;base64,%zz%00%ff", "not valid base64"),
    ],
)
def test_data_uris_without_an_image_are_refused(url: str, word: str) -> None:
    with refused(400, word):
        fetched(url)


@pytest.mark.parametrize(
    "file",
    [
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(/etc/passwd) (r) file\nshowpage\n",
        b"%PDF-1.4\n",
        b"P6 10 10 255\n" + bytes(300),
        file_of(scene(), "TIFF"),
        file_of(scene(), "ICO"),
        file_of(scene(), "TGA"),
        file_of(scene(), "JPEG2000"),
        b"/* XPM */\nstatic char *x[] = {};",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"RIFF\x04\0\0\0WEBP",
        b"BM",
        b"\0" * 1000,
    ],
    ids=["svg", "eps", "pdf", "ppm", "tiff", "ico", "tga", "jp2", "xpm", "gif-", "png-", "jpeg-", "webp-", "bmp-", "0"],
)
def test_other_files_and_fragments_are_refused(file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*anything: object, **more: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    with refused(400):
        fetched(uri(file))


def test_only_the_given_formats_are_accepted() -> None:
    assert FORMATS == ("PNG", "JPEG", "WEBP", "GIF", "BMP")
    for form in ("PPM", "TIFF", "EPS"):
        file = b"P6 10 10 255\n" + bytes(300) if form == "PPM" else file_of(scene(), form)
        with pytest.raises(BadImageError, match="has a format other than PNG, JPEG"):
            open_image(file, Path(), formats=FORMATS)
    assert open_image(b"P6 10 10 255\n" + bytes(300), Path()).size == (10, 10)


@pytest.mark.parametrize("kind", ["png", "jpeg", "jpeg, progressive", "webp", "gif", "bmp"])
def test_a_truncated_file_is_refused_wherever_it_ends(kind: str) -> None:
    file = KINDS[kind]()
    for part in (0.3, 0.6, 0.9):
        with refused(400):
            decoded(file[: int(len(file) * part)])


def test_a_png_without_its_end_is_refused() -> None:
    for missing in range(1, 16):
        with refused(400, "is truncated"):
            decoded(KINDS["png"]()[:-missing])


def test_a_truncated_file_is_refused_even_if_pillow_is_set_to_accept_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with refused(400):
        decoded(KINDS["jpeg"]()[:-200])


def test_decompression_bombs_are_refused_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def decodes(self: ImageFile.ImageFile) -> None:
        raise AssertionError("it was decoded")

    gif = bytearray(KINDS["gif"]())
    gif[6:10] = struct.pack("<HH", 60_000, 60_000)
    bmp = bytearray(KINDS["bmp"]())
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    jpeg = bytearray(KINDS["jpeg"]())
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decodes)
    for file in (png(60_000, 60_000, pixels=b""), png(501, 500), bytes(gif), bytes(bmp), bytes(jpeg)):
        with refused(413, "250000 pixels"):
            decoded(file)
    with refused(413, "250000 pixels"):
        decoded(file_of(Image.new("RGB", (501, 500)), "WEBP"))


def test_pixels_are_limited_per_image_and_per_request() -> None:
    file = png(500, 500)
    assert decoded(file)[0].size == (500, 500)
    assert [each.size for each in decoded(file, png(300, 500))] == [(500, 500), (300, 500)]
    with refused(413, "400000"):
        decoded(file, png(301, 500))
    with refused(413, "400000"):
        decoded(file, png(300, 500), png(1, 1))


@pytest.mark.parametrize("size", [(1, 201), (201, 1), (2, 500)])
def test_extreme_aspect_ratios_are_refused(size: tuple[int, int]) -> None:
    """Resized to a model's minimum width, one pixel by millions would take gigabytes."""
    with refused(400, "200 times its shorter"):
        decoded(png(*size))
    assert decoded(png(1, 200))[0].size == (1, 200)


def test_the_number_and_size_of_files_is_limited() -> None:
    pictures, small = Pictures(LIMITS), uri(KINDS["png"]())
    assert len(asyncio.run(pictures.fetch([small] * 3))) == 3
    assert asyncio.run(pictures.fetch([])) == []
    with refused(413, "4 images", "at most 3"):
        asyncio.run(pictures.fetch([small] * 4))
    most = KINDS["bmp"]().ljust(200_000, b"\0")
    assert fetched(uri(most)).size == (40, 30)
    for body in (uri(most + b"\0"), uri(bytes(10_000_000)), "data:image/png;base64," + "%41" * 400_000):
        with refused(413, "200000 bytes"):
            fetched(body)


def test_the_total_size_of_a_request_is_limited() -> None:
    file = KINDS["png"]()
    pictures = Pictures(replace(LIMITS, total_size=3 * len(file) - 1))
    assert asyncio.run(pictures.fetch([uri(file)] * 2)) == [file] * 2
    with refused(413, f"or all have more than {3 * len(file) - 1}"):
        asyncio.run(pictures.fetch([uri(file)] * 3))


def test_metadata_bombs_are_not_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import PngImagePlugin, TiffImagePlugin

    def reads(*anything: object) -> None:
        raise AssertionError("metadata were read")

    monkeypatch.setattr(TiffImagePlugin.ImageFileDirectory_v2, "load", reads)
    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", reads)
    bomb = zlib.compress(b"x" * 10_000_000)
    texts = [chunk(b"zTXt", b"a\0\0" + bomb), chunk(b"iTXt", b"a\0\1\0\0\0" + bomb), chunk(b"iCCP", b"a\0\0" + bomb)]
    raw = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n9\n" + exif(50, 1000).hex().encode())
    for more in (*texts, chunk(b"zTXt", raw), chunk(b"eXIf", exif(50, 1000))):
        assert decoded(png(9, 7, more))[0].size == (9, 7)
    jpeg = KINDS["jpeg"]()
    segment = b"\xff\xe1" + struct.pack(">H", 2 + 6 + len(exif(50, 1000))) + b"Exif\0\0" + exif(50, 1000)
    for file in (jpeg[:2] + segment * 3 + jpeg[2:], jpeg[:2] + segment + jpeg[20:]):  # the latter without JFIF's head
        assert decoded(file)[0].size == (40, 30)
    webp = file_of(scene(), "WEBP", exif=turned(6))
    assert decoded(webp.replace(turned(6), turned(6)[:10] + b"\xff\xff" + turned(6)[12:]))[0].size == (40, 30)


def crumbs() -> dict[str, bytes]:
    """Files with very many parts."""
    jpeg, gif = KINDS["jpeg"](), KINDS["gif"]()
    at = gif.index(b",")
    scan = jpeg[jpeg.index(b"\xff\xda") : -2]
    return {
        "png, chunks": png(9, 7, chunk(b"abCd") * 30_000),
        "png, pixels": png(9, 7, chunk(b"IDAT") * 30_000),
        "jpeg, comments": jpeg[:2] + b"\xff\xfe\0\2" * 30_000 + jpeg[2:],
        "jpeg, exif": jpeg[:2] + b"\xff\xe1\0\x0cExif\0\0abcd" * 30_000 + jpeg[2:],
        "jpeg, filled": jpeg[:2] + b"\xff" * 30_000 + jpeg[2:],
        "jpeg, scans": jpeg[:-2] + scan * 101 + jpeg[-2:],
        "gif, comments": gif[:at] + b"!\xfe\1x\0" * 30_000 + gif[at:],
        "gif, comment in crumbs": gif[:at] + b"!\xfe" + b"\1x" * 30_000 + b"\0" + gif[at:],
        "gif, junk": gif[:at] + b"\0" * 30_000 + gif[at:],
        "webp, chunks": b"RIFF" + struct.pack("<I", 240_004) + b"WEBP" + b"abcd\0\0\0\0" * 30_000,
    }


@pytest.mark.parametrize("kind", crumbs())
def test_files_with_very_many_parts_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *anything, **more: pytest.fail("it was opened"))
    with refused(400):
        decoded(crumbs()[kind], limits=PictureLimits())


def test_the_first_frame_of_a_long_animation_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(Image.new("RGB", (8, 8), (7, 9, 200)), "GIF")
    at = file.index(b",")
    file = file[:-1] + file[at:-1] * 10_000 + b";"
    seeks: list[int] = []
    seek = GifImagePlugin.GifImageFile._seek
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "_seek", lambda *a, **k: seeks.append(a[1]) or seek(*a, **k))
    assert Image.open(io.BytesIO(file)).n_frames == 10_001 and len(seeks) > 10_000
    seeks.clear()
    assert decoded(file, limits=PictureLimits())[0].getpixel((0, 0)) == (7, 9, 200)
    assert set(seeks) == {0}


def test_corrupted_files_are_refused_or_decoded() -> None:
    chance, kinds = (
        random.Random(0),
        [KINDS[kind]() for kind in ("png", "jpeg", "webp", "gif", "bmp", "jpeg, turned 6")],
    )
    refusals = 0
    for _ in range(600):
        file = bytearray(chance.choice(kinds))
        for _ in range(chance.randint(1, 8)):
            at = chance.randrange(min(len(file), chance.choice([40, 400, 4000])))
            file[at : at + chance.randint(0, 2)] = chance.randbytes(chance.randint(0, 3))
        try:
            found = decoded(bytes(file))[0]
            assert found.mode == "RGB" and found.width * found.height <= LIMITS.pixels
        except ApiError as error:
            refusals += 1
            assert error.status in (400, 413) and "\n" not in error.message
    assert 50 < refusals < 600


def test_open_image_has_its_own_limits() -> None:
    with pytest.raises(TooManyPixelsError, match="100 pixels"):
        open_image(png(11, 10), Path(), most_pixels=100)
    assert open_image(png(10, 10), Path(), most_pixels=100).size == (10, 10)
