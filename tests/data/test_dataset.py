"""Rows from every source, what is done with bad ones, batches for processors, and the converters."""

from __future__ import annotations

import base64
import builtins
import json
import logging
import pickle
import struct
import zlib
from io import BytesIO
from pathlib import Path

import pytest
import tiny
import torch
from PIL import Image, ImageFile

from vismem.data import BadDataError, Row, Rows, StreamingRows, load_dataset_rows, prompt_inputs, reward_columns
from vismem.data.converters import convert_mulberry, convert_visual_cot, main
from vismem.data.images import BadImageError, open_image


def png(seed: int = 0, size=(32, 32)) -> bytes:
    buffer = BytesIO()
    tiny.picture(seed, size).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A small PNG whose header claims this width and height."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def same(image: Image.Image, seed: int) -> bool:
    return image.mode == "RGB" and image.tobytes() == tiny.picture(seed).tobytes()


def write(path: Path, rows: list) -> Path:
    """Writes rows as JSON Lines; a string is written verbatim."""
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for seed in range(4):
        (tmp_path / "images" / f"{seed}.png").write_bytes(png(seed))
    return tmp_path


def example(seed: int, **changes) -> dict:
    return {"prompt": f"Question {seed}?", "images": [f"images/{seed}.png"], "answer": str(seed), **changes}


def test_a_jsonl_file_becomes_rows(folder):
    rows = load_dataset_rows(write(folder / "t.jsonl", [example(0, level=3), "", example(1, completion="It is 1.")]))
    assert isinstance(rows, Rows) and len(rows) == 2
    assert [row.id for row in rows] == ["t.jsonl:1", "t.jsonl:3"]
    parts = [{"type": "image"}, {"type": "text", "text": "Question 0?"}]
    assert rows[0].prompt == [{"role": "user", "content": parts}]
    assert same(rows[0].images[0], 0) and same(rows[1].images[0], 1)
    assert (rows[0].answer, rows[0].completion, rows[0].columns) == ("0", "0", {"level": 3})
    assert (rows[1].answer, rows[1].completion, rows[1].columns) == ("1", "It is 1.", {})
    assert rows[-1].id == "t.jsonl:3"
    for index in (2, -3):
        with pytest.raises(IndexError):
            rows[index]


def test_jsonl_may_have_a_bom_crlf_and_unicode(folder):
    lines = [
        json.dumps(example(0)),
        json.dumps(example(1, answer="größer"), ensure_ascii=False),
        json.dumps(example(2)),
    ]
    (folder / "t.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # no end of line at the end
    rows = load_dataset_rows(folder / "t.jsonl", strict=True)
    assert [row.answer for row in rows] == ["0", "größer", "2"]


def test_rows_do_not_depend_on_what_was_read_before(folder):
    rows = load_dataset_rows(write(folder / "t.jsonl", [example(seed) for seed in range(4)]))
    assert [rows[index].id for index in (3, 0, 3, 2, 1)] == [f"t.jsonl:{n}" for n in (4, 1, 4, 3, 2)]
    again = pickle.loads(pickle.dumps(rows))
    assert again[2].id == "t.jsonl:3" and same(again[2].images[0], 2)


def test_jsonl_needs_no_datasets(folder, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **more):
        if name.split(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert len(load_dataset_rows(write(folder / "t.jsonl", [example(0)]))) == 1
    (folder / "t.parquet").write_bytes(b"x")
    with pytest.raises(BadDataError, match=r"needs the package datasets: pip install 'vismem\[train\]'"):
        load_dataset_rows(folder / "t.parquet")


def test_prompts_are_normalised(folder):
    text = {"type": "text", "text": "Which?"}
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "First."},
        {"role": "assistant", "content": "Yes.", "tool_calls": None},
        {"role": "user", "content": [text]},
    ]
    placed = [{"role": "user", "content": [text, {"type": "image", "text": None}, text, {"type": "image"}]}]
    pair = ["images/0.png", "images/1.png"]
    rows = load_dataset_rows(
        write(
            folder / "t.jsonl",
            [
                example(0, prompt=talk),
                example(0, prompt=placed, images=pair),
                {"prompt": "No image.", "answer": 1},
                {"prompt": "None.", "answer": 1.5, "images": []},
                {"prompt": "One.", "answer": 2.0, "image": "images/2.png"},
                {
                    "prompt": [{"role": "user", "content": [{"type": "image", "image": "images/3.png"}, text]}],
                    "answer": "x",
                },
                example(1, completion=[{"role": "assistant", "content": "Well: 1"}]),
            ],
        ),
        strict=True,
    )
    first = rows[0].prompt
    assert [message["role"] for message in first] == ["system", "user", "assistant", "user"]
    assert first[0]["content"] == [{"type": "text", "text": "Be brief."}]
    assert first[1]["content"] == [{"type": "image"}, {"type": "text", "text": "First."}]  # before the first user text
    assert first[2] == {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]}
    assert [part["type"] for part in rows[1].prompt[0]["content"]] == ["text", "image", "text", "image"]
    assert same(rows[1].images[0], 0) and same(rows[1].images[1], 1)
    assert rows[2].images == rows[3].images == []
    assert [row.answer for row in rows][2:5] == ["1", "1.5", "2"]
    assert same(rows[4].images[0], 2)
    assert same(rows[5].images[0], 3) and rows[5].prompt[0]["content"][0] == {"type": "image"}
    assert rows[6].completion == "Well: 1"


def test_images_of_every_kind_are_read(folder):
    uri = "data:image/png;base64," + base64.b64encode(png(2)).decode()
    kinds = [
        "images/2.png",
        str(folder / "images" / "2.png"),
        folder / "images" / "2.png",
        tiny.picture(2),
        png(2),
        {"bytes": png(2), "path": None},
        {"bytes": None, "path": str(folder / "images" / "2.png")},
        uri,
        tiny.picture(2).convert("RGBA"),
    ]
    rows = load_dataset_rows([example(0, images=[kind]) for kind in kinds[1:]])
    assert all(same(row.images[0], 2) for row in rows)
    as_url = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "?"}]
    raw = {"type": "image", "base64": base64.b64encode(png(2)).decode()}
    rows = load_dataset_rows([{"prompt": [{"role": "user", "content": part}], "answer": 1} for part in (as_url, [raw])])
    assert all(same(row.images[0], 2) for row in rows)
    turned = tiny.picture(1, (32, 16)).copy()
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert load_dataset_rows([example(0, images=[buffer.getvalue()])])[0].images[0].size == (16, 32)


BAD_LINES = [
    ("{", "not valid JSON"),
    ("[1]", "must be an object"),
    ("5", "must be an object"),
    ({"answer": "1"}, "no `prompt`"),
    ({"prompt": "?"}, "no `answer`"),
    ({"prompt": "?", "answer": None}, "no `answer`; the row has `prompt`; name it"),
    ({"prompt": "?", "answer": " "}, "`answer` is empty"),
    ({"prompt": "?", "answer": []}, "`answer` is empty"),
    ({"prompt": "?", "answer": float("inf")}, "must be a finite number"),
    ({"prompt": "?", "answer": True}, "must be a string or a number, or a list of them, not bool"),
    ({"prompt": " ", "answer": "1"}, "`prompt` is empty"),
    ({"prompt": [], "answer": "1"}, "non-empty list of chat messages"),
    ({"prompt": {"role": "user"}, "answer": "1"}, "non-empty list of chat messages"),
    ({"prompt": ["hello"], "answer": "1"}, "must have a `role`"),
    ({"prompt": [{"role": "robot", "content": "?"}], "answer": "1"}, "must have a `role`"),
    ({"prompt": [{"role": "user", "content": 5}], "answer": "1"}, "content must be a string or a list of parts"),
    ({"prompt": [{"role": "user", "content": [{"type": "video"}]}], "answer": "1"}, "not 'video'"),
    ({"prompt": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}], "answer": "1"}, "ends with"),
    ({"prompt": [{"role": "system", "content": "?"}], "images": ["images/0.png"], "answer": "1"}, "no user message"),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"},
        "1 image parts in the prompt, but 0",
    ),
    ({"prompt": "?", "answer": "1", "images": ["images/0.png"], "image": "images/0.png"}, "both `images` and `image`"),
    ({"prompt": "?", "answer": "1", "images": [None]}, "an entry of `images` is empty"),
    ({"prompt": "?", "answer": "1", "completion": [{"role": "user", "content": "?"}]}, "`completion` must be"),
]


@pytest.mark.parametrize(("line", "problem"), BAD_LINES)
def test_bad_lines_are_named_and_skipped(folder, caplog, line, problem):
    path = write(folder / "t.jsonl", [example(0), line, example(1)])
    rows = load_dataset_rows(path)
    assert [row.id for row in rows] == ["t.jsonl:1", "t.jsonl:3"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "t.jsonl:2: " in warnings[0] and problem in warnings[0]
    with pytest.raises(BadDataError, match=r"t\.jsonl:2: ") as caught:
        load_dataset_rows(path, strict=True)
    assert problem in str(caught.value)
    assert [row.id for row in load_dataset_rows(path, streaming=True)] == ["t.jsonl:1", "t.jsonl:3"]
    with pytest.raises(BadDataError, match=r"t\.jsonl:2: "):
        list(load_dataset_rows(path, streaming=True, strict=True))


def test_a_line_that_is_not_utf8_is_a_bad_row(folder):
    path = folder / "t.jsonl"
    path.write_bytes(json.dumps(example(0)).encode() + b'\n{"prompt": "\xff", "answer": "1"}\n')
    assert len(load_dataset_rows(path)) == 1
    with pytest.raises(BadDataError, match=r"t\.jsonl:2: not UTF-8"):
        load_dataset_rows(path, strict=True)


def test_too_many_bad_lines_raise(folder):
    path = write(folder / "t.jsonl", [example(0), *["{"] * 3])
    assert len(load_dataset_rows(path, max_bad_rows=3)) == 1
    assert len(load_dataset_rows(path, max_bad_rows=None)) == 1
    with pytest.raises(
        BadDataError, match=r"3 bad rows in t\.jsonl, more than max_bad_rows=2; the last: .*t\.jsonl:4: "
    ):
        load_dataset_rows(path, max_bad_rows=2)
    with pytest.raises(BadDataError, match=r"t\.jsonl has no good row \(2 bad\); the last: t.jsonl:1, t.jsonl:2: not"):
        load_dataset_rows(write(folder / "t.jsonl", ["{", "{"]))
    with pytest.raises(BadDataError, match="has no good row"):
        list(load_dataset_rows(write(folder / "t.jsonl", []), streaming=True))


BAD_IMAGES = {
    "missing": (None, "no such image"),
    "empty": (b"", "is empty"),
    "truncated": (png(0, (64, 64))[:-500], "is broken"),
    "no image": (b"hello, this is no image", "is not an image"),
    "large": (bomb(9_500), "more than 89,478,485 pixels"),
    "bomb": (bomb(20_000), "more than 89,478,485 pixels"),
}


def test_truncated_images_are_bad_whatever_pillow_is_set_to(tmp_path, monkeypatch):
    """Importing lmms-eval makes Pillow accept truncated files."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(BadImageError, match="broken"):
        open_image(png()[: len(png()) // 2], tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("kind", BAD_IMAGES)
def test_a_bad_image_is_replaced_by_the_next_row(folder, caplog, kind):
    content, problem = BAD_IMAGES[kind]
    if content is not None:
        (folder / "images" / "bad.png").write_bytes(content)
    bad = example(9, images=["images/bad.png"])
    path = write(folder / "t.jsonl", [example(0), bad, example(1), bad])
    rows = load_dataset_rows(path)
    if kind == "missing":  # found when the file is opened
        assert len(rows) == rows.reports.count == 2
    else:  # images are not opened before they are asked for
        assert len(rows) == 4 and not caplog.records
        assert [row.id for row in rows] == [f"t.jsonl:{n}" for n in (1, 3, 3, 1)]
        assert rows[1].id == "t.jsonl:3"
    assert [row.id for row in rows.good()] == ["t.jsonl:1", "t.jsonl:3"]
    assert rows.reports.count == 2  # once for each row
    assert len(caplog.records) == 2 and problem in caplog.text and "t.jsonl:2: " in caplog.text
    with pytest.raises(BadDataError, match=r"t\.jsonl:[24]: ") as caught:
        load_dataset_rows(path, strict=True)[3]
    assert problem in str(caught.value)
    with pytest.raises(BadDataError, match="2 bad rows"):
        list(load_dataset_rows(path, max_bad_rows=1))


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("data:image/png;base64,!!!", "not valid base64"),
        ("data:image/png,abc", "in a data URI is not an image"),
        ("https://example.com/a.png", "not fetched"),
        ("images", "images is a folder, not a regular file"),
        ({"bytes": None, "path": None}, "an image must be"),
        (5, "an image must be"),
        ({"bytes": "text"}, "must be bytes"),
        ("a" * 5000, "cannot read image .{0,200}: File name too long"),
        ("\0", "cannot read image"),
    ],
)
def test_invalid_images_raise(folder, value, problem):
    with pytest.raises(BadDataError, match=problem):
        load_dataset_rows(write(folder / "t.jsonl", [example(0, images=[value])]), strict=True)[0]


def test_no_good_row_at_all_raises(folder):
    with pytest.raises(BadDataError, match=r"no good row \(2 bad\)"):
        load_dataset_rows(write(folder / "t.jsonl", [example(9), example(8)]))
    rows = load_dataset_rows([example(0, images=[b"broken"])])
    with pytest.raises(BadDataError, match="no good row left"):
        rows[0]


def test_a_file_that_shrinks_after_the_scan_yields_other_rows(folder):
    path = write(folder / "t.jsonl", [example(0), example(1)])
    rows = load_dataset_rows(path)
    write(path, [example(0)])
    assert rows[1].id == "t.jsonl:1" and rows.reports.count == 1


def test_limit_counts_good_rows(folder):
    path = write(folder / "t.jsonl", [example(0), "{", example(1), example(2), "{"])
    rows = load_dataset_rows(path, limit=2)
    assert [row.id for row in rows] == ["t.jsonl:1", "t.jsonl:3"] and rows.reports.count == 1
    assert [row.id for row in load_dataset_rows(path, limit=2, streaming=True)] == ["t.jsonl:1", "t.jsonl:3"]
    assert len(load_dataset_rows(path, limit=100)) == 3
    for wrong in ({"limit": 0}, {"max_bad_rows": -1}):
        with pytest.raises(ValueError, match="must be"):
            load_dataset_rows(path, **wrong)


def test_a_json_array_becomes_rows(folder):
    (folder / "t.json").write_text(json.dumps([example(0), {"prompt": "?"}, example(1)], indent=1))
    rows = load_dataset_rows(folder / "t.json")
    assert [row.id for row in rows] == ["t.json[0]", "t.json[2]"] and same(rows[1].images[0], 1)
    assert [row.id for row in load_dataset_rows(folder / "t.json", streaming=True)] == ["t.json[0]", "t.json[2]"]
    for text in ('[{"prompt": "a", "answer": "1"}, {"prompt": ', '[{"prompt": "a"} {"x": ]', "[5"):
        (folder / "u.json").write_text(text)
        with pytest.raises(BadDataError, match="not a complete JSON array"):
            load_dataset_rows(folder / "u.json")
    write(folder / "lines.json", [example(0), example(1)])  # JSON Lines under another name
    assert [row.id for row in load_dataset_rows(folder / "lines.json")] == ["lines.json:1", "lines.json:2"]


def test_a_json_array_is_read_in_small_pieces(folder, monkeypatch):
    monkeypatch.setattr("vismem.data.sources._CHUNK", 7)
    expected = [{"prompt": f"[{n}], {{", "answer": 10**n} for n in range(30)]
    (folder / "t.json").write_text(json.dumps([12345678901234567890, *expected], indent=2))  # a number is one bad row
    rows = load_dataset_rows(folder / "t.json", max_bad_rows=1)
    assert [row.answer for row in rows] == [str(row["answer"]) for row in expected]
    assert rows[0].id == "t.json[1]"


def test_lists_and_datasets_become_rows(folder):
    datasets = pytest.importorskip("datasets")
    raw = [example(seed, images=[str(folder / "images" / f"{seed}.png")], level=seed) for seed in range(3)]
    for source in (raw, tuple(raw), datasets.Dataset.from_list(raw)):
        rows = load_dataset_rows(source)
        assert len(rows) == 3 and rows[2].columns == {"level": 2} and same(rows[2].images[0], 2)
        assert rows[2].id in ("rows[2]", "dataset[2]")
    stream = load_dataset_rows(datasets.Dataset.from_list(raw).to_iterable_dataset())
    assert isinstance(stream, StreamingRows)
    assert [row.id for row in stream] == ["dataset[0]", "dataset[1]", "dataset[2]"]
    assert [row.columns["level"] for row in stream] == [0, 1, 2]
    with pytest.raises(BadDataError, match=r"dataset: no `answer`; its columns are `prompt`; name it: columns="):
        load_dataset_rows(datasets.Dataset.from_list([{"prompt": "?"}]))
    with pytest.raises(BadDataError, match="cannot read rows from int"):
        load_dataset_rows(5)


def test_broken_encoded_images_in_datasets_are_bad_rows(folder, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    prompts = [[{"role": "user", "content": f"{n}?"}] for n in range(3)]
    columns = {"prompt": prompts, "answer": [0, 1, None], "images": [[png(0)], [b"broken"], [png(2)]]}
    columns["images"] = [[{"bytes": content[0], "path": None}] for content in columns["images"]]
    dataset = datasets.Dataset.from_dict(columns).cast_column("images", datasets.List(datasets.Image()))
    dataset.save_to_disk(folder / "saved")
    dataset.to_parquet(folder / "t.parquet")
    datasets.DatasetDict({"test": dataset}).save_to_disk(folder / "splits")
    sources = [(dataset, "dataset"), (folder / "saved", "saved"), (folder / "t.parquet", "t.parquet")]
    for source, name in [*sources, (folder / "splits", "splits")]:
        rows = load_dataset_rows(source, split="test")
        assert len(rows) == 2 and rows.reports.count == 1  # no answer in the last
        assert rows[0].id == rows[1].id == f"{name}[0]" and same(rows[0].images[0], 0)
        assert rows.reports.count == 2
        assert [row.id for row in load_dataset_rows(source, split="test", streaming=True)] == [f"{name}[0]"]
    with pytest.raises(BadDataError, match="no split 'train'; it has test"):
        load_dataset_rows(folder / "splits")
    single = datasets.Dataset.from_dict({"prompt": ["?"], "answer": ["1"], "image": [tiny.picture(1)]})
    assert same(load_dataset_rows(single)[0].images[0], 1)


def test_missing_sources_are_named(folder):
    for name in ("gone.jsonl", folder / "gone", "a/b/c.jsonl", "what is this?"):
        with pytest.raises(BadDataError, match="no such file or folder"):
            load_dataset_rows(name)
    (folder / "t.csv").write_text("a")
    with pytest.raises(BadDataError, match="has an unsupported type"):
        load_dataset_rows(folder / "t.csv")
    with pytest.raises(BadDataError, match=r"not written by datasets\.save_to_disk"):
        load_dataset_rows(folder)


def test_hub_names_are_passed_to_datasets(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name, config=None, split=None, streaming=False):
        asked.append((name, config, split, streaming))
        found = datasets.Dataset.from_list([{"prompt": "?", "answer": "1"}])
        return found.to_iterable_dataset() if streaming else found

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_dataset_rows("owner/name:small", split="test")[0].id == "owner/name:small[0]"
    assert next(iter(load_dataset_rows("name", streaming=True))).id == "name[0]"
    assert asked == [("owner/name", "small", "test", False), ("name", None, "train", True)]

    def fail(*arguments, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(BadDataError, match=r"hub dataset owner/name \(config default, split train\) cannot.*offline"):
        load_dataset_rows("owner/name")


def first(rows):
    return rows[0].id


@pytest.mark.parametrize("workers", [0, 3])
def test_workers_read_each_row_once(folder, workers):
    path = write(folder / "t.jsonl", [example(seed % 4) for seed in range(7)])
    expected = [f"t.jsonl:{n}" for n in range(1, 8)]
    for rows, limit in [(load_dataset_rows(path), 7), (load_dataset_rows(path, streaming=True), 7)]:
        loader = torch.utils.data.DataLoader(rows, batch_size=1, num_workers=workers, collate_fn=first)
        assert sorted(loader) == expected[:limit]
    limited = load_dataset_rows(path, streaming=True, limit=4)
    assert sorted(torch.utils.data.DataLoader(limited, 1, num_workers=workers, collate_fn=first)) == expected[:4]


def test_an_error_in_a_worker_is_one_line(folder):
    (folder / "images" / "0.png").write_bytes(b"no image")
    rows = load_dataset_rows(write(folder / "t.jsonl", [example(1), example(0)]), max_bad_rows=0)
    with pytest.raises(BadDataError) as caught:
        list(torch.utils.data.DataLoader(rows, num_workers=1, collate_fn=list))
    assert str(caught.value).startswith("1 bad rows in t.jsonl, more") and "\n" not in str(caught.value)


def test_workers_share_the_shards_of_a_stream():
    datasets = pytest.importorskip("datasets")
    raw = datasets.Dataset.from_list([{"prompt": "?", "answer": n} for n in range(6)])
    rows = load_dataset_rows(raw.to_iterable_dataset(num_shards=2))
    loader = torch.utils.data.DataLoader(rows, 1, num_workers=2, collate_fn=lambda rows: (rows[0].answer, rows[0].id))
    found = list(loader)
    assert sorted(answer for answer, _ in found) == [str(n) for n in range(6)]
    assert len({row_id for _, row_id in found}) == 6


def mixed_rows() -> Rows:
    two = {"prompt": "Describe the image: it is bright.", "images": [tiny.picture(1), tiny.picture(2)], "answer": "x"}
    talk = [{"role": "system", "content": "look again!"}, {"role": "user", "content": "What is on the table?"}]
    one = {"prompt": talk, "images": [tiny.picture(0)], "answer": "x"}
    return load_dataset_rows([one, two, {"prompt": "Describe!", "answer": "x"}])


def test_prompt_inputs_are_padded_on_the_left(family):
    processor = tiny.FAMILIES[family].processor()
    rows = mixed_rows()
    processor.tokenizer.padding_side = "right"
    batch = prompt_inputs(processor, list(rows))
    assert processor.tokenizer.padding_side == "right"
    mask = batch["attention_mask"]
    assert mask.shape == batch["input_ids"].shape and mask.shape[0] == 3
    assert bool((mask[:, 1:] >= mask[:, :-1]).all()) and mask[2, 0] == 0  # padding is on the left
    image_id = tiny.base_and_processor(family)[0].config.image_token_id
    counts = (batch["input_ids"] == image_id).sum(1).tolist()
    assert counts[0] > 0 and counts[1] == 2 * counts[0] and counts[2] == 0
    for index, row in enumerate(rows):  # in a batch as alone
        alone = prompt_inputs(processor, [row])
        length = alone["input_ids"].shape[1]
        assert torch.equal(batch["input_ids"][index, -length:], alone["input_ids"][0])
    said = processor.tokenizer.decode(batch["input_ids"][0], skip_special_tokens=False)
    assert said.index("look again!") < said.index("What is on the table?") and said.endswith("assistant\n")


def test_prompt_inputs_run_through_the_model(family):
    model, processor = tiny.base_and_processor(family)
    rows = list(mixed_rows())
    with torch.no_grad():
        batch = model(**prompt_inputs(processor, rows)).logits[:, -1]
        for index, row in enumerate(rows):
            alone = model(**prompt_inputs(processor, [row])).logits[0, -1]
            torch.testing.assert_close(batch[index], alone, atol=1e-4, rtol=1e-4)


def test_prompt_inputs_refuse_wrong_rows(family):
    processor = tiny.FAMILIES[family].processor()
    rows = list(mixed_rows())
    with pytest.raises(ValueError, match="at least one row"):
        prompt_inputs(processor, [])
    prompt = [{"role": "user", "content": [{"type": "text", "text": f"What is {processor.image_token}?"}]}]
    with pytest.raises(ValueError, match=r"rows\[0\]: the prompt's text contains the processor's image token"):
        prompt_inputs(processor, [Row("rows[0]", prompt, [], "x", "x", {})])

    def refuse(*arguments, **options):
        raise RuntimeError("no mixing")

    processor.tokenizer.padding_side = "right"
    processor.apply_chat_template = refuse
    with pytest.raises(ValueError, match=r"rows\[0\], rows\[1\], rows\[2\]: .*cannot encode it: no mixing; .*mixed"):
        prompt_inputs(processor, rows)
    assert processor.tokenizer.padding_side == "right"
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prompt_inputs(processor, rows)
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad token"):
        prompt_inputs(processor, rows)


def test_reward_columns_hold_all_rows():
    rows = load_dataset_rows([{"prompt": "?", "answer": 1, "task": "sum"}, {"prompt": "?", "answer": 2, "level": [3]}])
    columns = reward_columns(list(rows))
    assert columns == {
        "id": ["rows[0]", "rows[1]"],
        "answer": ["1", "2"],
        "references": [["1"], ["2"]],
        "task": ["sum", None],
        "level": [None, [3]],
    }
    own = load_dataset_rows([{"prompt": "?", "answer": 1, "id": "mine"}])
    assert reward_columns(list(own))["id"] == ["mine"]


REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."


def visual_cot(n: int, question="What is it?", answer="dog", **changes) -> dict:
    """A record as in `viscot_363k.json` and the benchmark."""
    image = f"cot/vsr/{n}.png"
    turns = [("human", f"<image>\n{question}{REQUEST}"), ("gpt", "[0.614, 0.619, 0.731, 0.773]")]
    turns += [("human", "<image>"), ("gpt", answer)]
    record = {"dataset": "vsr", "split": "train", "question_id": n, "image": [image, f"{image}###[392, 316, 467, 414]"]}
    return {**record, "conversations": [{"from": who, "value": text} for who, text in turns], **changes}


@pytest.fixture
def images(tmp_path) -> Path:
    (tmp_path / "pictures" / "cot" / "vsr").mkdir(parents=True)
    for seed in range(3):
        (tmp_path / "pictures" / "cot" / "vsr" / f"{seed}.png").write_bytes(png(seed))
    return tmp_path / "pictures"


def test_visual_cot_is_converted(tmp_path, images, caplog):
    advanced = visual_cot(1, "How many?")
    advanced["conversations"][0]["value"] = advanced["conversations"][0]["value"].replace(
        "Please provide", "Please think step by step and provide"
    )
    talk = [("human", "What is this?\n<image>"), ("gpt", "A cup."), ("human", "Its colour?"), ("gpt", "Red")]
    llava = {"id": "7", "image": "cot/vsr/2.png", "conversations": [{"from": who, "value": text} for who, text in talk]}
    bad = [
        visual_cot(9),
        visual_cot(0, image=["cot/vsr/0.png", "cot/vsr/0.png###[1, 2]"]),
        visual_cot(0, conversations=[]),
    ]
    records = [visual_cot(0, "Yes or no?", "Yes"), *bad, advanced, llava]
    (tmp_path / "viscot.json").write_text(json.dumps(records, indent=4))
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "train.jsonl"
    assert convert_visual_cot(tmp_path / "viscot.json", out, images) == 3
    for problem in ("viscot.json[1]: no such image", "viscot.json[2]: no region", "viscot.json[3]: `conversations`"):
        assert problem in caplog.text
    rows = load_dataset_rows(out, strict=True)
    assert rows[0].prompt == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Yes or no?"}]}]
    assert (rows[0].answer, rows[0].completion) == ("Yes", "Yes") and len(rows[0].images) == 1
    assert rows[0].columns == {"dataset": "vsr", "split": "train", "question_id": 0, "bboxes": [[392, 316, 467, 414]]}
    assert rows[1].prompt[0]["content"][1]["text"] == "How many?" and same(rows[1].images[0], 1)
    assert [message["role"] for message in rows[2].prompt] == ["user", "assistant", "user"]
    assert [part["type"] for part in rows[2].prompt[0]["content"]] == ["text", "image"]
    assert rows[2].answer == "Red" and rows[2].columns == {"id": "7", "bboxes": []}
    assert json.loads(out.read_text().splitlines()[0])["images"] == ["../pictures/cot/vsr/0.png"]


def mulberry(image="cot/vsr/0.png", answer="C: 123", **changes) -> dict:
    """A record as in `mulberry_sft.json`."""
    steps = "### Image Description:\nLines.\n\n### Rationales:\nAngles.\n\n### Let's think step by step.\n\n"
    reply = f"{steps}### Step 1:\nAdd.\n\n### The final answer is:\n{answer}"
    talk = [
        {"role": "user", "content": "<image>Question: Find x.\nA: 30\nC: 123"},
        {"role": "assistant", "content": reply},
    ]
    return {"messages": talk, "images": image, **changes}


def test_mulberry_is_converted(tmp_path, images, caplog):
    reflecting = mulberry("/cot/vsr/1.png", "7")
    reflecting["messages"][1]["content"] = (
        "The final answer is: 6\nI think I have made a mistake.\n" + (reflecting["messages"][1]["content"])
    )
    unanswered = mulberry()
    unanswered["messages"][1]["content"] = "### Step 1:\nI give up"
    turned = mulberry()
    turned["messages"].reverse()
    records = [
        mulberry(),
        unanswered,
        reflecting,
        turned,
        mulberry(["cot/vsr/2.png"], "'yes'"),
        mulberry(5),
        mulberry([]),
    ]
    (tmp_path / "mulberry_sft.json").write_text(json.dumps(records))
    out = tmp_path / "train.jsonl"
    assert convert_mulberry(tmp_path / "mulberry_sft.json", out, images) == 3
    rows = load_dataset_rows(out, strict=True)
    assert [row.answer for row in rows] == ["C: 123", "7", "yes"]
    assert rows[0].completion == records[0]["messages"][1]["content"]
    content = [{"type": "image"}, {"type": "text", "text": "Question: Find x.\nA: 30\nC: 123"}]
    assert rows[0].prompt == [{"role": "user", "content": content}] and rows[0].columns == {}
    assert same(rows[1].images[0], 1) and same(rows[2].images[0], 2)
    for problem in ("[1]: the assistant's text has no final answer", "[3]: ", "[5]: the images", "[6]: 1 image parts"):
        assert f"mulberry_sft.json{problem}" in caplog.text


def test_converters_write_atomically(tmp_path, images):
    source = tmp_path / "t.json"
    source.write_text(json.dumps([visual_cot(0), visual_cot(9), visual_cot(1)]))
    out = tmp_path / "out.jsonl"
    out.write_text("as it was")
    with pytest.raises(BadDataError, match=r"1 bad rows in t\.json, more than max_bad_rows=0"):
        convert_visual_cot(source, out, images, max_bad_rows=0)
    with pytest.raises(BadDataError, match=r"t\.json\[1\]: no such image"):
        convert_visual_cot(source, out, images, strict=True)
    with pytest.raises(BadDataError, match="no such image folder"):
        convert_visual_cot(source, out, tmp_path / "gone")
    with pytest.raises(BadDataError, match="no such file"):
        convert_visual_cot(tmp_path / "gone.json", out, images)
    assert out.read_text() == "as it was" and not list(tmp_path.glob("*.partial"))
    source.write_text("[]")
    with pytest.raises(BadDataError, match="no good row"):
        convert_visual_cot(source, out, images)
    assert out.read_text() == "as it was"


def test_no_record_stops_a_converter(tmp_path, images):
    """Any malformed record is one bad row, in JSON Lines and in an array."""
    good, path = visual_cot(0), "cot/vsr/0.png"
    turns = good["conversations"]
    bad = [
        visual_cot(0, conversations=[{**turns[0], "from": ["human"]}, *turns[1:]]),
        visual_cot(0, conversations=[{**turns[0], "value": {"a": 1}}, *turns[1:]]),
        visual_cot(0, conversations=[None, 5]),
        visual_cot(0, conversations={"a": 1}),
        visual_cot(0, answer="half \ud800"),
        visual_cot(0, note=["\udfff"]),
        visual_cot(0, image=["x" * 5000]),
        visual_cot(0, image=["a\0b"]),
        visual_cot(0, image=[5]),
        visual_cot(0, image={"path": path}),
        visual_cot(0, image=[path, f"{path}###[1.2.3, 1, 1, 1]"]),
        visual_cot(0, image=[path, f"{path}###[{'9' * 5000}, 1, 1, 1]"]),
        visual_cot(0, answer="<image>"),
        visual_cot(0, answer=""),
        visual_cot(0, answer=float("nan")),
        float("nan"),
        [],
        None,
        "text",
    ]
    deep = "[" * 100_000 + "]" * 100_000
    lines = [json.dumps(record) for record in [*bad, good]]
    lines[1:1] = [f'{{"conversations": {deep}}}', f'{{"note": {"9" * 5000}}}']
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (tmp_path / "t.json").write_bytes(f"[{','.join(lines)}".encode() + b', {"image": "\xff"}]')
    for name in ("t.jsonl", "t.json"):
        for convert in (convert_visual_cot, convert_mulberry):
            if convert is convert_visual_cot:
                assert convert(tmp_path / name, tmp_path / "out.jsonl", images, max_bad_rows=None) == 1
                assert len(load_dataset_rows(tmp_path / "out.jsonl", strict=True)) == 1
            with pytest.raises(BadDataError, match="more than max_bad_rows=3"):
                convert(tmp_path / name, tmp_path / "out.jsonl", images, max_bad_rows=3)
    for wrong in ({"limit": 0}, {"limit": -1}, {"max_bad_rows": -1}):
        with pytest.raises(ValueError, match="must be"):
            convert_visual_cot(tmp_path / "t.jsonl", tmp_path / "out.jsonl", images, **wrong)


def test_converters_run_from_the_command_line(tmp_path, images, capsys):
    source = write(tmp_path / "t.jsonl", [visual_cot(0), "{", visual_cot(1), visual_cot(2)])
    arguments = ["visual-cot", str(source), str(tmp_path / "out.jsonl"), "--image-root", str(images)]
    assert main([*arguments, "--limit", "2", "--max-bad-rows", "-1"]) == 0
    assert "2 rows written" in capsys.readouterr().out
    assert len(load_dataset_rows(tmp_path / "out.jsonl", strict=True)) == 2
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--strict"])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: t.jsonl:2: not valid JSON")
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--limit", "0"])
    assert stopped.value.code == 2 and "--limit must be 1 or more" in capsys.readouterr().err
