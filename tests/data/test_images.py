"""`open_image`, through which all pictures come: modes, transparency, bit depth, rotation, and valid paths."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb

from vismem import cli
from vismem.cli.ask import read_images
from vismem.data import images, load_dataset_rows, prompt_inputs
from vismem.data.images import BadImageError, NoImageFileError, open_image, to_rgb

RAMP = np.linspace(0, 65535, 4096).astype(np.uint16).reshape(64, 64)
TWIN = (RAMP // 256).astype(np.uint8)  # what OpenCV makes of it


def colours(seed: int = 0, size: tuple[int, int] = (41, 33)) -> Image.Image:
    """An RGBA image with all colours and alphas."""
    made = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    made[:4, :, 3], made[4:8, :, 3] = 0, 255
    return Image.fromarray(made)


def file_of(picture: Image.Image, form: str, **settings: object) -> bytes:
    held = io.BytesIO()
    picture.save(held, form, **settings)
    return held.getvalue()


def base_of(picture: Image.Image) -> np.ndarray:
    """The image as transformers converts it."""
    return convert_to_rgb(picture, return_numpy=True)


def grey_of(value: object) -> np.ndarray:
    """A greyscale image as an array, int [height, width]."""
    found = open_image(value)
    assert found.mode == "RGB"
    channels = np.asarray(found).astype(int)
    assert (channels == channels[..., :1]).all()
    return channels[..., 0]


def difference(found: Image.Image, wanted: np.ndarray) -> int:
    assert found.mode == "RGB" and found.size == (wanted.shape[1], wanted.shape[0])
    return int(np.abs(np.asarray(found).astype(int) - wanted).max())


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, depth: int, colour: int, pixels: bytes, transparent: bytes) -> bytes:
    """A PNG of one row with one transparent value."""
    head = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + pixels)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(values: np.ndarray, photometric: int = 1, bits: int | None = None) -> bytes:
    """A TIFF of one strip: plain grey values, or packed ones of `bits` bits."""
    height, width = values.shape
    order = ">" if values.dtype.byteorder == ">" else "<"
    sample, data = {"u": 1, "i": 2, "f": 3}[values.dtype.kind], values.tobytes()
    if bits == 12:
        first, second = values.reshape(-1, 2).astype(int).T
        data = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()
    tags = {256: width, 257: height, 258: bits or 8 * values.itemsize, 259: 1, 262: photometric}
    tags |= {273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: height, 279: len(data), 339: sample}
    listed = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, 10)
    return head + listed + bytes(4) + data


# Transparency.


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"])
def test_modes_are_converted_as_in_transformers(mode: str) -> None:
    picture = colours() if mode in ("RGBA", "LA") else colours().convert("RGB")
    picture = picture.convert(mode)
    assert difference(open_image(picture), base_of(picture)) == 0


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_premultiplied_alpha_equals_straight_alpha(mode: str) -> None:
    """transformers looks for an "A" among the bands, and finds an "a"."""
    straight = colours().convert(mode)
    premultiplied = straight.convert({"LA": "La", "RGBA": "RGBa"}[mode])
    assert difference(open_image(premultiplied), base_of(straight)) <= 1
    assert open_image(Image.new(premultiplied.mode, (3, 2))).getpixel((1, 1)) == (255, 255, 255)


def palettes() -> dict[str, Image.Image]:
    """Palette images with each kind of alpha."""
    ink = Image.new("RGBA", (12, 9), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (3, 2, 9, 4))
    ink.paste((200, 10, 10, 128), (3, 5, 9, 7))
    plain = ink.convert("RGB").quantize(4)
    one, bytewise, both = plain.copy(), plain.copy(), plain.convert("PA")
    one.info["transparency"] = plain.getpixel((0, 0))
    bytewise.info["transparency"] = bytes([40, 128, 255])
    both.putalpha(ink.getchannel("A"))
    return {"P, index": one, "P, bytes": bytewise, "PA": both}


@pytest.mark.parametrize("kind", palettes())
def test_palettes_with_transparency_match_transformers(kind: str) -> None:
    picture = palettes()[kind]
    found = open_image(picture)
    assert difference(found, base_of(picture)) == 0 and found.getpixel((0, 0)) != (0, 0, 0)
    if picture.mode == "P":
        for form in ("PNG", "GIF") if kind == "P, index" else ("PNG",):
            assert difference(open_image(file_of(picture, form)), base_of(picture)) == 0


def test_palettes_of_rgba_colours_keep_their_alpha() -> None:
    """`quantize` puts the alpha of an RGBA image into the palette, where transformers ignores it."""
    picture = colours().quantize(64)
    assert picture.mode == "P" and "transparency" not in picture.info
    assert difference(open_image(picture), base_of(picture.convert("RGBA"))) == 0


@pytest.mark.parametrize(
    ("file", "row"),
    [
        (png(4, 1, 0, b"\x50", b"\0\0"), [255, 255, 255, 255]),
        (png(4, 1, 0, b"\x50", b"\0\1"), [0, 255, 0, 255]),
        (png(4, 2, 0, b"\x1b", b"\0\0"), [255, 85, 170, 255]),
        (png(4, 2, 0, b"\x1b", b"\0\1"), [0, 255, 170, 255]),
        (png(4, 4, 0, b"\x01\x5a", b"\0\1"), [0, 255, 85, 170]),
        (png(4, 8, 0, b"\0\x0f\x5a\x80", b"\0\x0f"), [0, 255, 90, 128]),
        (png(3, 16, 0, b"\x12\x34\x12\x35\x80\0", b"\x12\x34"), [255, 18, 128]),
    ],
    ids=["1 bit, black", "1 bit, white", "2 bits, black", "2 bits", "4 bits", "8 bits", "16 bits"],
)
def test_one_transparent_value_of_a_grey_png_becomes_white(file: bytes, row: list[int]) -> None:
    assert grey_of(file)[0].tolist() == row
    assert grey_of(Image.open(io.BytesIO(file)))[0].tolist() == row


def test_one_transparent_colour_becomes_white() -> None:
    eight = png(2, 8, 2, b"\1\2\3\4\5\6", b"\0\1\0\2\0\3")
    assert np.asarray(open_image(eight)).tolist() == [[[255] * 3, [4, 5, 6]]]
    sixteen = png(2, 16, 2, b"\1\2\3\4\5\6\7\7\7\7\7\7", b"\1\2\3\4\5\6")
    assert np.asarray(open_image(sixteen)).tolist() == [[[255] * 3, [7, 7, 7]]]
    picture = Image.new("RGB", (2, 1), (9, 9, 9))
    picture.info["transparency"] = (9, 9, 9)
    found = open_image(picture)
    assert difference(found, base_of(picture)) == 0 and found.getpixel((0, 0)) == (255, 255, 255)
    assert not found.info  # or a processor would lay it on white once more
    picture.info["transparency"] = b"of a palette that it had"
    assert open_image(picture).getpixel((0, 0)) == (9, 9, 9)


def test_partial_alpha_is_composited_on_white() -> None:
    row = np.array([[[0, 0, 0, 0], [200, 100, 0, 0], [0, 0, 0, 128], [200, 100, 0, 51], [1, 2, 3, 255]]], np.uint8)
    alpha = row[..., 3:] / 255
    wanted = np.rint(255 * (1 - alpha) + row[..., :3] * alpha)
    assert difference(open_image(Image.fromarray(row)), wanted) <= 1
    for form, settings in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})):
        assert difference(open_image(file_of(Image.fromarray(row), form, **settings)), wanted) <= 1


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF"])
def test_the_first_frame_of_a_transparent_animation_is_read(form: str) -> None:
    ink = Image.new("RGBA", (12, 9), (0, 0, 0, 0))
    ink.paste((0, 0, 0, 255), (3, 2, 9, 4))
    file = file_of(ink, form, save_all=True, append_images=[Image.new("RGBA", (12, 9), "red")])
    found = open_image(file)
    assert Image.open(io.BytesIO(file)).n_frames == 2
    assert difference(found, base_of(ink)) <= (3 if form == "WEBP" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["RGBA", "P", "I;16", "TIFF"])
def test_images_with_alpha_and_16_bits_are_rotated_too(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = {"RGBA": colours(), "TIFF": colours(), "P": palettes()["P, index"], "I;16": Image.fromarray(RAMP[:9])}
    file = file_of(picture[kind], "TIFF" if kind == "TIFF" else "PNG", exif=exif.tobytes())
    wanted = images.upright(to_rgb(picture[kind]), orientation)
    assert open_image(file).size == wanted.size and open_image(file).tobytes() == wanted.tobytes()
    assert open_image(Image.open(io.BytesIO(file))).tobytes() == wanted.tobytes()


def test_inverted_cmyk_of_a_jpeg_is_corrected() -> None:
    file = file_of(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert difference(open_image(file), np.tile([255, 0, 0], (16, 16, 1))) <= 8


# High bits.


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_16_bits_are_read_in_every_byte_order(mode: str) -> None:
    values = RAMP.astype(">u2") if mode == "I;16B" else RAMP
    assert (grey_of(Image.frombytes(mode, (64, 64), values.tobytes())) == TWIN).all()


@pytest.mark.parametrize("extension", [".png", ".tiff", ".jp2", ".pgm", "colour.png", "colour.tiff", "colour.ppm"])
def test_16_bit_files_match_opencv(extension: str) -> None:
    cv2 = pytest.importorskip("cv2", reason="OpenCV comes with lmms-eval")
    colour, dot, form = extension.rpartition(".")
    values = np.stack([RAMP, RAMP.T, RAMP[::-1]], -1) if colour else RAMP
    file = cv2.imencode(dot + form, values)[1].tobytes()
    wanted = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert difference(open_image(file), wanted) <= 1


def test_dark_16_bit_files_stay_dark() -> None:
    """The file determines the bit depth, not its largest value."""
    dark = np.full((4, 4), 255, np.uint16)
    pgm = b"P5 4 4 65535\n" + dark.astype(">u2").tobytes()
    for file in (file_of(Image.fromarray(dark), "PNG"), tiff(dark), tiff(dark.astype(np.int16)), pgm):
        assert not grey_of(file).any()


TIFFS = {
    "16 bits": (tiff(RAMP), TWIN),
    "16 bits, white is zero": (tiff(RAMP, photometric=0), 255 - TWIN),
    "16 bits, big end first": (tiff(RAMP.astype(">u2")), TWIN),
    "16 bits, signed": (tiff((RAMP >> 1).astype(np.int16)), TWIN >> 1),
    "16 bits, signed, big end first": (tiff((RAMP >> 1).astype(">i2")), TWIN >> 1),
    "12 bits": (tiff(RAMP >> 4, bits=12), TWIN),
    "32 bits of 16": (tiff(RAMP.astype(np.uint32)), TWIN),
    "32 bits of 8": (tiff(TWIN.astype(np.int32)), TWIN),
    "float of 0 to 1": (tiff((TWIN / 255).astype(np.float32)), TWIN),
    "float of 0 to 1, white is zero": (tiff((TWIN / 255).astype(np.float32), photometric=0), 255 - TWIN),
    "float of 8 bits": (tiff(TWIN.astype(">f4")), TWIN),
}


@pytest.mark.parametrize("kind", TIFFS)
def test_grey_tiffs_of_every_kind_are_read(kind: str) -> None:
    file, wanted = TIFFS[kind]
    assert np.abs(grey_of(file) - wanted).max() <= 1


def test_integers_and_floats_without_a_file_are_scaled() -> None:
    for values in (RAMP.astype(np.int32), TWIN.astype(np.int32), TWIN.astype(np.float32), np.float32(TWIN / 255)):
        assert (grey_of(Image.fromarray(values)) == TWIN).all()
    overshot = np.float32([[-0.001, 0.5, 1.001]])  # by resampling
    assert grey_of(Image.fromarray(overshot)).tolist() == [[0, 128, 255]]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.float32([[0, 9.7]]), "has floats from 0 to 9.7,"),
        (np.float32([[-0.5, 0.5]]), "has floats from -0.5 to 0.5,"),
        (RAMP.astype(np.float32), "has floats from 0 to 65535,"),
        (np.float32([[0, np.nan]]), "not finite"),
        (np.float32([[0, np.inf]]), "not finite"),
        (np.int32([[-1, 5]]), "has integers from -1 to 5,"),
        (np.int32([[0, 65536]]), "has integers from 0 to 65536,"),
        (np.int32([[-(2**31), 2**31 - 1]]), "has integers from -2147483648 to 2147483647,"),
    ],
)
def test_values_of_unknown_range_are_refused(values: np.ndarray, words: str, tmp_path: Path) -> None:
    Image.fromarray(values).save(tmp_path / "depth.tiff")
    for value, name in ((tmp_path / "depth.tiff", "depth.tiff"), (Image.fromarray(values), "image")):
        with pytest.raises(BadImageError) as caught:
            open_image(value)
        assert f"{name} has" in str(caught.value) and words in str(caught.value) and "\n" not in str(caught.value)


def test_large_images_are_converted_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [colours(), colours().quantize(9), Image.fromarray(RAMP), Image.fromarray(np.float32(RAMP / 65535))]
    pictures += [colours().convert(mode) for mode in ("1", "LA", "CMYK", "LAB", "La")]
    whole = [to_rgb(picture).tobytes() for picture in pictures]
    converted: list[int] = []
    compose = images._strip_to_rgb
    monkeypatch.setattr(images, "STRIP", 100)
    monkeypatch.setattr(images, "_strip_to_rgb", lambda s, *more: converted.append(s.height) or compose(s, *more))
    assert [to_rgb(picture).tobytes() for picture in pictures] == whole
    assert len(converted) > 100 and max(converted) == 2


def test_reading_does_not_modify_images() -> None:
    for picture in (colours(), palettes()["P, bytes"], Image.fromarray(RAMP), Image.new("RGB", (3, 2), (1, 2, 3))):
        before, info = picture.tobytes(), dict(picture.info)
        found = open_image(picture)
        assert found is not picture and picture.tobytes() == before and picture.info == info
    with pytest.raises(BadImageError, match="image has no pixels"):
        open_image(Image.new("RGB", (0, 3)))


# Files.


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket.png")
    Path("folder.png").mkdir()
    for name, target in (("zero", "/dev/zero"), ("linked-pipe", "pipe.png"), ("nothing", "gone"), ("loop", "loop.png")):
        Path(f"{name}.png").symlink_to(target)
    monkeypatch.setattr(images, "open", lambda *anything, **more: pytest.fail("it was opened"), raising=False)
    for name, words in {
        "/dev/zero": "is a device, not a regular file",
        "zero.png": "is a device",
        "/dev/stdin": "not a regular file|no such image",
        "pipe.png": "is a pipe",
        "linked-pipe.png": "is a pipe",
        "socket.png": "is a socket",
        "folder.png": "is a folder",
        "nothing.png": "no such image",
    }.items():
        for value in (name, Path(name), {"bytes": None, "path": name}, f"file://{name}"):
            with pytest.raises(NoImageFileError, match=words):
                open_image(value, tmp_path)
    with pytest.raises(BadImageError, match="cannot read image"):
        open_image("loop.png", tmp_path)


def test_a_file_that_becomes_a_pipe_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file.png").write_bytes(b"x")
    os.mkfifo(tmp_path / "pipe.png")
    status, flags = os.stat(tmp_path / "file.png"), []
    monkeypatch.setattr(images.os, "stat", lambda path, **more: status)
    opens = os.open
    monkeypatch.setattr(images.os, "open", lambda path, how: flags.append(how) or opens(path, how | os.O_NONBLOCK))
    with pytest.raises(NoImageFileError, match="is a pipe"):
        open_image("pipe.png", tmp_path)
    assert flags[0] & os.O_NONBLOCK  # without it, opening waits for a writer


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's /proc")
def test_virtual_files_are_empty() -> None:
    for name in ("/proc/self/pagemap", "/proc/self/maps", "/proc/version"):
        with pytest.raises(BadImageError, match=f"{name} is empty"):
            open_image(name)


def test_files_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    colours().save(tmp_path / "a.png")
    size = (tmp_path / "a.png").stat().st_size
    monkeypatch.setattr(images, "MOST_BYTES", size)
    assert open_image("a.png", tmp_path).size == (41, 33)
    monkeypatch.setattr(images, "MOST_BYTES", size - 1)
    with pytest.raises(BadImageError, match=r"a\.png is larger than 0 MiB, the limit"):
        open_image("a.png", tmp_path)
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(BadImageError, match="is larger than"):
        open_image("sparse.png", tmp_path)


# Readers.


def ink(size: tuple[int, int] = (32, 48)) -> Image.Image:
    """Black and half-transparent red on transparent black."""
    made = Image.new("RGBA", size, (0, 0, 0, 0))
    made.paste((0, 0, 0, 255), (4, 4, 20, 10))
    made.paste((255, 0, 0, 128), (4, 20, 28, 30))
    return made


def read_everywhere(file: Path, tmp_path: Path) -> dict[str, Image.Image]:
    """An image file as each of VisMem's readers opens it."""
    from vismem.app.chat import read_picture
    from vismem.evaluation.lmms.messages import row_of
    from vismem.serving.pictures import PictureLimits, Pictures

    content = file.read_bytes()
    uri = "data:image/png;base64," + base64.b64encode(content).decode()
    row = {"prompt": "?", "answer": "1"}
    sources = {
        "path": str(file),
        "bytes": content,
        "data URI": uri,
        "PIL": Image.open(io.BytesIO(content)),
        "datasets": {"bytes": content, "path": None},
    }
    rows = load_dataset_rows([{**row, "images": [source]} for source in sources.values()])
    found = {name: rows[i].images[0] for i, name in enumerate(sources)}
    shown = [{"type": "image", "url": source} for source in (Image.open(file), str(file), content)]
    lmms = row_of("toy", [{"role": "user", "content": shown}]).images
    found |= {f"lmms-eval, {name}": one for name, one in zip(("PIL", "path", "bytes"), lmms, strict=True)}
    found["serve"] = Pictures(PictureLimits()).decode([content])[0]
    found["app"] = read_picture(file)
    found["ask"] = read_images([str(file)])[0]
    return found


@pytest.mark.parametrize(
    ("form", "mode"), [("png", "RGBA"), ("png", "LA"), ("png", "P"), ("webp", "RGBA"), ("gif", "P"), ("png", "I;16")]
)
def test_all_readers_see_the_same_pixels(form: str, mode: str, tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the viewer's extra is not installed")
    file = tmp_path / f"ink.{form}"
    if mode == "P":
        drawn = ink().convert("RGB").quantize(4)
        drawn.save(file, transparency=drawn.getpixel((0, 0)))
    elif mode == "I;16":
        Image.fromarray(RAMP).save(file)
    else:
        ink().convert(mode).save(file, **({"lossless": True} if form == "webp" else {}))
    wanted = Image.fromarray(TWIN).convert("RGB") if mode == "I;16" else Image.fromarray(base_of(Image.open(file)))
    for reader, found in read_everywhere(file, tmp_path).items():
        assert found.mode == "RGB" and found.tobytes() == wanted.tobytes(), reader


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_transparent_images_give_the_bases_own_tensors(family: str) -> None:
    processor = tiny.base_and_processor(family)[1]
    (row,) = load_dataset_rows([{"prompt": "Which?", "images": [ink()], "answer": "1"}])
    found = prompt_inputs(processor, [row])
    messages = [{"role": "user", "content": [{"type": "image", "image": ink()}, {"type": "text", "text": "Which?"}]}]
    wanted = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    names = [name for name in wanted if "pixel" in name]
    assert names and all((found[name] == wanted[name]).all() for name in names)


def test_ask_reads_black_ink_on_a_transparent_background(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shelf = Image.open(Path(__file__).parents[2] / "examples" / "shelf.png").convert("L")
    nothing = Image.new("L", shelf.size)
    written = Image.merge("RGBA", (nothing, nothing, nothing, ImageOps.invert(shelf)))
    pictures = {"ink": written, "white": Image.fromarray(base_of(written)), "black": written.convert("RGB")}
    pictures["16 bits"] = Image.fromarray(np.asarray(pictures["white"].convert("L")).astype(np.uint16) * 257)
    answers = {}
    for name, picture in pictures.items():
        picture.save(tmp_path / f"{name}.png")
        question = "What is the price at row 2, column 3?"
        assert cli.main(["ask", str(tmp_path / f"{name}.png"), question, "--json"]) == 0
        answers[name] = json.loads(capsys.readouterr().out)["answer"]
    assert answers["ink"] == answers["16 bits"] == answers["white"] != answers["black"]
