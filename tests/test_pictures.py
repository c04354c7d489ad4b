"""Images from outside: bombs, broken files, and addresses that a server must never be talked into fetching."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import ipaddress
import random
import socket
import ssl
import struct
import subprocess
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("httpx")

from PIL import GifImagePlugin, Image, ImageFile

from vismem.data.images import BadImage, TooManyPixels, open_image
from vismem.serving import pictures as module
from vismem.serving.addresses import is_public, read_hosts, read_url
from vismem.serving.errors import ApiError
from vismem.serving.pictures import FORMATS, PictureLimits, Pictures, fetch_picture
from vismem.serving.stripping import orientation_of, stripped

LIMITS = PictureLimits(count=3, size=200_000, pixels=250_000, total_pixels=400_000, timeout=5.0)
HOST = "pictures.example.org"


def scene(width: int = 40, height: int = 30, mode: str = "RGB") -> Image.Image:
    """A picture of which no two corners look alike."""
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
    """A PNG by hand, with more chunks before its pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = zlib.compress(b"\0" * (height * (3 * width + 1))) if pixels is None else pixels
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IDAT", body) + chunk(b"IEND")


def exif(entries: int, size: int) -> bytes:
    """EXIF whose entries all name the same bytes: read as it says, it is `entries * size` large."""
    places = 8 + 2 + 12 * entries + 4
    listed = b"".join(struct.pack("<HHII", 1000 + i, 7, size, places) for i in range(entries))
    return b"II*\0" + struct.pack("<IH", 8, entries) + listed + b"\0\0\0\0" + b"z" * size


def turned(orientation: int) -> bytes:
    return b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def uri(file: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file).decode()}"


def fetched(url: str, limits: PictureLimits = LIMITS) -> Image.Image:
    return asyncio.run(fetch_picture(url, limits))


def decoded(*files: bytes, limits: PictureLimits = LIMITS) -> list[Image.Image]:
    return Pictures(limits).decode(files)


@contextlib.contextmanager
def refused(status: int, *words: str) -> Iterator[None]:
    """An error of that status, in one line that has these words in it, of the field `messages`."""
    with pytest.raises(ApiError) as caught:
        yield
    assert caught.value.status == status, caught.value
    assert caught.value.param == "messages" and caught.value.code
    assert "\n" not in caught.value.message and len(caught.value.message) < 300
    for word in words:
        assert word in caught.value.message


# Files.


KINDS = {
    "png": lambda: file_of(scene(), "PNG"),
    "png, palette": lambda: file_of(scene(mode="P"), "PNG"),
    "png, transparent palette": lambda: file_of(scene(mode="P"), "PNG", transparency=3),
    "png, alpha": lambda: file_of(scene(mode="RGBA"), "PNG"),
    "png, grey and alpha": lambda: file_of(scene(mode="LA"), "PNG"),
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
    "webp, lossless and alpha": lambda: file_of(scene(mode="RGBA"), "WEBP", lossless=True),
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
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_what_it_is_elsewhere_in_vismem(kind: str) -> None:
    file = KINDS[kind]()
    found, wanted = fetched(uri(file)), open_image(file, Path())
    assert found.mode == "RGB" and found.size == wanted.size and found.tobytes() == wanted.tobytes()


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
def test_an_orientation_that_cannot_be_read_is_upright(data: bytes) -> None:
    assert orientation_of(data) == 1
    assert orientation_of(turned(6)) == 6


def test_the_media_type_does_not_decide() -> None:
    assert fetched(uri(KINDS["jpeg"](), "image/png")).size == (40, 30)
    assert fetched(uri(KINDS["png"](), "IMAGE/X-anything;name=a.b")).size == (40, 30)


def test_blanks_and_percent_signs_in_a_data_uri_do_not_matter() -> None:
    whole = uri(KINDS["png"]())
    head, _, body = whole.partition(",")
    broken = "\r\n".join(body[i : i + 76] for i in range(0, len(body), 76))
    for each in (f"{head},{broken}\n", f"{head}, {body} ", f"{head},{quote(body, safe='')}", "DATA" + whole[4:]):
        assert fetched(each).tobytes() == scene().tobytes()


@pytest.mark.parametrize(
    "url, word",
    [
        ("data:", "must begin"),
        ("data:,", "must begin"),
        ("data:text/html;base64,PGI+", "must begin"),
        ("data:image/png,abc", "must begin"),
        ("data:image/png;base64", "must begin"),
        ("data:;base64,AAAA", "must begin"),
        ("data:image/svg+xml,<svg/>", "must begin"),
        ("data:image/png;" + "a=b;" * 200 + "base64,AAAA", "must begin"),
        ("data:image/png;base64,", "empty"),
        ("data:image/png;base64,   ", "empty"),
        ("data:image/png;base64,iVBORw0KGg", "not valid base64"),
        ("data:image/png;base64,====", "not valid base64"),
        ("data:image/png;base64,iVBO=Rw0", "not valid base64"),
        ("data:image/png;base64,iVBO_-w0", "not valid base64"),
        ("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9", "not valid base64"),
        ("data:image/png;base64,%zz%00%ff", "not valid base64"),
        ("data:image/png;base64,AAAA", "not an image"),
    ],
)
def test_data_uris_that_hold_no_image_are_refused(url: str, word: str) -> None:
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
def test_other_files_and_mere_beginnings_are_refused(file: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*anything: object, **more: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", started)
    with refused(400):
        fetched(uri(file))


def test_only_the_formats_named_are_known() -> None:
    assert FORMATS == ("PNG", "JPEG", "WEBP", "GIF", "BMP")
    for form in ("PPM", "TIFF", "EPS"):
        file = b"P6 10 10 255\n" + bytes(300) if form == "PPM" else file_of(scene(), form)
        with pytest.raises(BadImage, match="of a format other than PNG, JPEG"):
            open_image(file, Path(), formats=FORMATS)
    assert open_image(b"P6 10 10 255\n" + bytes(300), Path()).size == (10, 10)


@pytest.mark.parametrize("kind", ["png", "jpeg", "jpeg, progressive", "webp", "gif", "bmp"])
def test_a_file_that_is_cut_off_is_refused_wherever(kind: str) -> None:
    file = KINDS[kind]()
    for part in (0.3, 0.6, 0.9):
        with refused(400):
            decoded(file[: int(len(file) * part)])


def test_a_png_ends_with_its_own_end() -> None:
    for missing in range(1, 16):
        with refused(400, "breaks off"):
            decoded(KINDS["png"]()[:-missing])


def test_a_cut_file_is_refused_though_another_library_told_pillow_to_fill_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with refused(400):
        decoded(KINDS["jpeg"]()[:-200])


def test_bombs_of_pixels_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_pixels_up_to_the_limit_are_taken_and_all_together_have_one_too() -> None:
    file = png(500, 500)
    assert decoded(file)[0].size == (500, 500)
    assert [each.size for each in decoded(file, png(300, 500))] == [(500, 500), (300, 500)]
    with refused(413, "400000"):
        decoded(file, png(301, 500))
    with refused(413, "400000"):
        decoded(file, png(300, 500), png(1, 1))


@pytest.mark.parametrize("size", [(1, 201), (201, 1), (2, 500)])
def test_lines_are_no_pictures(size: tuple[int, int]) -> None:
    """Made as wide as models want pictures, one pixel by millions would take gigabytes."""
    with refused(400, "200 times its shorter"):
        decoded(png(*size))
    assert decoded(png(1, 200))[0].size == (1, 200)


def test_numbers_and_sizes_of_files_are_limited() -> None:
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


def test_all_files_together_have_a_limit_too(web: Web) -> None:
    web.answers["/a"] = (200, {}, b"x" * 600)
    assert len(fetch(web, "/a", uri(b"y" * 400), size=600, total_size=1000)) == 2
    for second in ("/a", uri(b"y" * 401), "data:image/png;base64," + "%41" * 4000):
        with refused(413, "1000"):
            fetch(web, "/a", second, size=600, total_size=1000)


def test_bombs_of_metadata_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Files of very many parts."""
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
def test_files_of_very_many_parts_are_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *anything, **more: pytest.fail("it was opened"))
    with refused(400):
        decoded(crumbs()[kind], limits=PictureLimits())


def test_of_a_long_animation_the_first_picture_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_mutilated_files_are_refused_or_decoded_but_nothing_else() -> None:
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


def test_data_keeps_its_own_limits() -> None:
    with pytest.raises(TooManyPixels, match="100 pixels"):
        open_image(png(11, 10), Path(), most_pixels=100)
    assert open_image(png(10, 10), Path(), most_pixels=100).size == (10, 10)


# Addresses.


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",
        "100.100.100.200",
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "198.51.100.1",
        "203.0.113.1",
        "224.0.0.1",
        "239.1.2.3",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::ffff:127.0.0.1",
        "::ffff:8.8.8.8",
        "64:ff9b::7f00:1",
        "64:ff9b::808:808",
        "64:ff9b:1::a00:1",
        "100::1",
        "2001::1",
        "2001:0:7f00:1::",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:808:808::",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "febf::1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.215.14", "2606:4700::1111", "2a00:1450:4001::5"])
def test_addresses_that_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "url, status",
    [
        ("", 400),
        ("   ", 400),
        ("/etc/passwd", 400),
        ("examples/shelf.png", 400),
        ("file:///etc/passwd", 400),
        ("FILE:///etc/passwd", 400),
        ("ftp://good.example.org/a.png", 400),
        ("gopher://good.example.org/a.png", 400),
        ("javascript:alert(1)", 400),
        ("http:good.example.org", 400),
        ("//good.example.org/a.png", 400),
        ("http://", 400),
        ("http:///a.png", 400),
        ("http://good.example.org:0/", 403),
        ("http://good.example.org:99999/", 403),
        ("http://good.example.org:8080/", 403),
        ("https://good.example.org:80/", 403),
        ("http://user@good.example.org/", 400),
        ("http://user:pw@good.example.org/", 400),
        ("http://@good.example.org/", 400),
        ("http://good.example.org@evil.example.org/", 400),
        ("http://evil.example.org#@good.example.org/", 403),
        ("http://evil.example.org?@good.example.org/", 403),
        ("http://evil.example.org\\@good.example.org/", 400),
        ("http://good.example.org./", 400),
        ("http://good.example.org%00.evil.example.org/", 400),
        ("http://good%2eexample.org/", 400),
        ("http://good.example.org\n/", 400),
        ("http://good.example.org/a b.png", 400),
        ("\thttp://good.example.org/", 400),
        ("http://g\u00f6od.example.org/", 400),
        ("http://\uff47ood.example.org/", 400),
        ("http://good.example.org/" + "a" * 5000, 400),
        ("http://-good.example.org/", 400),
        ("http://good..example.org/", 400),
        ("http://evil.example.org/", 403),
        ("http://good.example.org.evil.example.org/", 403),
        ("http://evilgood.example.org/", 403),
        ("http://all.example.org/", 403),
        ("http://evilall.example.org/", 403),
        ("http://localhost/", 403),
        ("http://127.0.0.1/", 403),
        ("http://[::1]/", 403),
        ("http://[::1%25eth0]/", 400),
        ("http://[::ffff:127.0.0.1]/", 403),
        ("http://2130706433/", 400),
        ("http://0x7f000001/", 400),
        ("http://0x7f.1/", 400),
        ("http://0177.0.0.1/", 400),
        ("http://127.1/", 400),
        ("http://127.0.0.1./", 400),
        ("http://1.2.3.4.5/", 400),
        ("http://0/", 400),
    ],
)
def test_addresses_that_are_not_taken(url: str, status: int) -> None:
    names = ("good.example.org", "*.all.example.org", "other.example.org:8443")
    hosts = tuple(scheme + name for scheme in ("http://", "https://") for name in names)
    with refused(status):
        read_url(url, read_hosts(hosts))
    with refused(status):
        fetched(url, PictureLimits(hosts=hosts))


def test_addresses_that_are_taken() -> None:
    hosts = read_hosts(
        ["Good.example.org", "*.all.example.org", "http://other.example.org:8080", "8.8.8.8", "[2606:4700::1]:8443"]
    )
    for url in (
        "https://good.example.org/a.png",
        "HTTPS://GOOD.example.org:443/a.png?x=%20y#z",
        "https://a.b.all.example.org/",
        "http://other.example.org:8080/",
        "https://8.8.8.8/",
        "https://[2606:4700::1]:8443/",
    ):
        assert read_url(url, hosts).fragment == ""
    for url in (
        "http://good.example.org/a.png",
        "http://other.example.org/",
        "https://other.example.org:8080/",
        "https://[2606:4700::1]/",
        "https://8.8.4.4/",
    ):
        with refused(403):
            read_url(url, hosts)
    with refused(403, "send a data URI"):
        read_url("https://good.example.org/a.png", ())


@pytest.mark.parametrize(
    "host", ["", "*", "*.", "a b", "ftp://a.org", "a.org/", "a.org:0", "a.org:x", "a.org:70000", "::1", "b@a.org"]
)
def test_a_host_written_wrongly_is_found_out_at_the_start(host: str) -> None:
    with pytest.raises(ValueError, match="no host to fetch images from"):
        PictureLimits(hosts=("a.example.org", host))


# Fetching, from a server on loopback: what lets it in is said in so many words.


class Web:
    """A web server, the answers it gives by path, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str]]] = []
        self.answers: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.slow: threading.Event = threading.Event()
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
                status, headers, body = web.answers[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(body)
                    if self.path == "/endless":
                        while not web.slow.is_set():
                            self.wfile.write(b"x" * 4096)
                    if self.path == "/slow":
                        while not web.slow.wait(0.02):
                            self.wfile.write(b"x")

            def log_message(self, *anything: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Web:
        self.thread.start()
        return self

    def __exit__(self, *anything: object) -> None:
        self.slow.set()
        self.server.shutdown()
        self.server.server_close()

    def url(self, path: str, scheme: str = "http") -> str:
        return f"{scheme}://{HOST}:{self.port}{path}"


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as found:
        yield found


def fetch(web: Web, *paths: str, found: tuple[str, ...] = ("127.0.0.1",), **settings: object) -> list[bytes]:
    """Fetches from the test's server, whose name leads to loopback, which alone is permitted besides what is public."""
    looked_up: list[str] = []

    async def find(host: str, port: int) -> list[str]:
        looked_up.append(host)
        return list(found)

    limits = PictureLimits(
        **{"size": 50_000, "hosts": (f"http://{HOST}:{web.port}", f"{HOST}:{web.port}"), "timeout": 10.0, **settings}
    )
    pictures = Pictures(limits, find=find, permitted=lambda ip: ip == ipaddress.ip_address("127.0.0.1"))
    files = asyncio.run(pictures.fetch([path if ":" in path else web.url(path) for path in paths]))
    assert set(looked_up) <= {HOST}
    return files


def test_a_picture_is_fetched_from_an_allowed_host(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    file = KINDS["png"]()
    web.answers["/a.png?x=1"] = (200, {"Content-Type": "text/plain"}, file)
    assert fetch(web, "/a.png?x=1#part") == [file]
    ((path, headers),) = web.asked
    assert path == "/a.png?x=1" and headers["host"] == f"{HOST}:{web.port}"
    assert headers["accept-encoding"] == "identity" and not {"cookie", "authorization", "referer"} & headers.keys()


def test_a_name_is_looked_up_once_and_every_address_must_be_public(web: Web) -> None:
    web.answers["/a"] = (200, {}, b"file")
    for found in (("127.0.0.1", "10.0.0.1"), ("10.0.0.1",), ("::1",), ("fe80::1%lo",), ("169.254.169.254",)):
        with refused(403, "not public") as _:
            fetch(web, "/a", found=found)
    for found in ((), ("no address",)):
        with refused(400, "no address"):
            fetch(web, "/a", found=found)
    assert web.asked == []
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])  # a name server that says something else when it is asked again

    async def find(host: str, port: int) -> list[str]:
        return next(answers)

    limits = PictureLimits(hosts=(f"http://{HOST}:{web.port}", f"{HOST}:{web.port}"))
    pictures = Pictures(limits, find=find, permitted=lambda ip: str(ip) == "127.0.0.1")
    assert asyncio.run(pictures.fetch([web.url("/a")])) == [b"file"]


def test_private_addresses_are_refused_whatever_is_allowed(web: Web) -> None:
    web.answers["/a"] = (200, {}, b"file")
    hosts = ("localhost", "127.0.0.1", "[::1]", "10.0.0.1", "[::ffff:127.0.0.1]", "169.254.169.254")
    allowed = [f"{scheme}{host}{port}" for scheme in ("http://", "") for host in hosts for port in ("", f":{web.port}")]
    limits = PictureLimits(hosts=tuple(allowed), timeout=5.0)
    for each in allowed:
        with refused(403, "not public"):
            fetched(f"{each if '://' in each else 'https://' + each}/a", limits)
    assert web.asked == []


def test_redirects_are_looked_at_like_first_addresses(web: Web) -> None:
    web.answers["/file"] = (200, {}, b"file")
    web.answers["/near"] = (302, {"Location": "file"}, b"")
    web.answers["/far"] = (301, {"Location": web.url("/near")}, b"")
    assert fetch(web, "/far") == [b"file"]
    for to, status in (
        ("http://evil.example.org/", 403),
        (f"http://127.0.0.1:{web.port}/file", 403),
        (f"http://localhost:{web.port}/file", 403),
        ("http://169.254.169.254/latest/meta-data/", 403),
        ("file:///etc/passwd", 400),
        ("data:image/png;base64,AAAA", 400),
        (f"http://user@{HOST}:{web.port}/file", 400),
        (f"//evil.example.org:{web.port}/file", 403),
        ("http://[", 400),
        ("http://2130706433/", 400),
    ):
        web.answers["/bad"] = (302, {"Location": to}, b"")
        with refused(status):
            fetch(web, "/bad")
    web.answers["/loop"] = (307, {"Location": "/loop"}, b"")
    web.asked.clear()
    with refused(400, "3 redirects"):
        fetch(web, "/loop")
    assert len(web.asked) == 4


def test_a_redirect_whose_name_leads_inside_is_refused(web: Web) -> None:
    web.answers["/a"] = (302, {"Location": f"http://inner.example.org:{web.port}/b"}, b"")
    web.answers["/b"] = (200, {}, b"secret")

    async def find(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == HOST else ["127.0.0.2"]

    limits = PictureLimits(hosts=(f"http://{HOST}:{web.port}", f"http://inner.example.org:{web.port}"))
    pictures = Pictures(limits, find=find, permitted=lambda ip: str(ip) == "127.0.0.1")
    with refused(403, "not public"):
        asyncio.run(pictures.fetch([web.url("/a")]))
    assert [path for path, _ in web.asked] == ["/a"]


def test_what_is_too_large_slow_compressed_or_missing_is_refused(web: Web) -> None:
    web.answers["/told"] = (200, {"Content-Length": "50001"}, b"x")
    web.answers["/large"] = (200, {}, b"x" * 50_001)
    web.answers["/endless"] = (200, {}, b"")
    for path in ("/told", "/large", "/endless"):
        with refused(413, "50000 bytes"):
            fetch(web, path)
    web.answers["/slow"] = (200, {}, b"")
    with refused(400, "within 0.5 seconds"):
        fetch(web, "/slow", timeout=0.5)
    web.answers["/gzip"] = (200, {"Content-Encoding": "gzip"}, b"x")
    web.answers["/gone"] = (404, {}, b"secret")
    web.answers["/error"] = (500, {}, b"")
    web.answers["/cut"] = (200, {"Content-Length": "100"}, b"x")
    for path, word in (("/gzip", "compressed"), ("/gone", "404"), ("/error", "500"), ("/cut", "did not send")):
        with refused(400, word):
            fetch(web, path)


def test_a_host_that_does_not_answer_is_an_error() -> None:
    with Web() as web:
        pass
    with refused(400, "did not send"):
        fetch(web, "/a")


def test_a_name_server_that_does_not_answer_is_given_up(web: Web) -> None:
    async def find(host: str, port: int) -> list[str]:
        await asyncio.sleep(60)
        return []

    limits = PictureLimits(hosts=(f"http://{HOST}:{web.port}", f"{HOST}:{web.port}"), timeout=0.1)
    with refused(400, "within 0.1 seconds"):
        asyncio.run(Pictures(limits, find=find).fetch([web.url("/a")]))


def test_a_secure_host_is_held_to_its_name(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cryptography", reason="makes the certificate")
    certificate = self_signed(tmp_path, HOST)
    asked: list[str | None] = []
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(certificate)
    serving.sni_callback = lambda _, name, __: asked.append(name)
    web.server.socket = serving.wrap_socket(web.server.socket, server_side=True)
    web.answers["/a"] = (200, {}, b"file")
    with refused(400, "did not send"):  # signed by nobody known
        fetch(web, web.url("/a", "https"))
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(module, "_tls", lambda: trusting)
    assert fetch(web, web.url("/a", "https")) == [b"file"]
    assert asked[-1] == HOST and web.asked[-1][1]["host"] == f"{HOST}:{web.port}"
    trusting = ssl.create_default_context(cafile=str(self_signed(tmp_path, "other.example.org")))
    trusting.load_verify_locations(cafile=str(certificate))
    serving.load_cert_chain(tmp_path / "other.example.org.pem")
    with refused(400, "did not send"):  # of another name
        fetch(web, web.url("/a", "https"))


def self_signed(folder: Path, name: str) -> Path:
    """A certificate for a name, with its key, in one file."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    place = folder / f"{name}.pem"
    place.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM))
    return place


def test_the_tests_reach_loopback_only(web: Web) -> None:
    assert web.server.socket.family == socket.AF_INET and web.server.server_address[0] == "127.0.0.1"
