"""Dataset layouts: each one is read, each bad row is one line, and no other error is raised."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image

from vismem.data import BadDataError, Row, load_dataset_rows, reward_columns
from vismem.data.layouts import BadRowError
from vismem.data.rows import check_files, read_row
from vismem.training.rewards import load_rewards

PICTURE = tiny.picture(0)


def texts(row: Row) -> list[tuple[str, str]]:
    """Roles and contents; an image part is written [image]."""
    return [
        (m["role"], "".join("[image]" if part["type"] == "image" else part["text"] for part in m["content"]))
        for m in row.prompt
    ]


def said(*turns: str, keys=("role", "content"), roles=("user", "assistant")) -> list[dict]:
    return [dict(zip(keys, (roles[i % 2], text), strict=True)) for i, text in enumerate(turns)]


LLAVA = {"keys": ("from", "value"), "roles": ("human", "gpt")}
LAYOUTS = {
    "TRL prompt and completion": (
        {"prompt": said("How many?"), "completion": said("", "Three.")[1:], "image": "a.png"},
        ([("user", "[image]How many?")], "Three.", "Three."),
    ),
    "TRL messages": (
        {"messages": said("How many?", "Three."), "images": ["a.png"]},
        ([("user", "[image]How many?")], "Three.", "Three."),
    ),
    "messages in several turns": (
        {"messages": said("Hello", "Hi", "How many?", "3"), "answer": 3},
        ([("user", "Hello"), ("assistant", "Hi"), ("user", "How many?")], "3", "3"),
    ),
    "messages that end with the user": (
        {"messages": said("How many?"), "solution": "<answer>3</answer>"},
        ([("user", "How many?")], "<answer>3</answer>", "<answer>3</answer>"),
    ),
    "LLaVA": (
        {"id": "1", "image": "a.png", "conversations": said("<image>\nHow many?", "Three", "Sure?", "Yes", **LLAVA)},
        ([("user", "[image]How many?"), ("assistant", "Three"), ("user", "Sure?")], "Yes", "Yes"),
    ),
    "ShareGPT with a system text": (
        {"system": "Be brief.", "conversations": said("How many?", "Three", **LLAVA)},
        ([("system", "Be brief."), ("user", "How many?")], "Three", "Three"),
    ),
    "conversations by columns": (
        {"conversations": {"from": ["human", "gpt"], "value": ["How many?", "Three"]}},
        ([("user", "How many?")], "Three", "Three"),
    ),
    "the Cauldron": (
        {"images": ["a.png"], "texts": [{"user": "How many?", "assistant": "Three", "source": "x"}]},
        ([("user", "[image]How many?")], "Three", "Three"),
    ),
    "EasyR1": (
        {"problem": "<image>How many?", "images": ["a.png"], "answer": "3"},
        ([("user", "[image]How many?")], "3", "3"),
    ),
    "verl": (
        {
            "data_source": "x",
            "prompt": said("Compare <image> and <image>."),
            "images": [{"bytes": b"x", "path": None}, {"bytes": b"x", "path": None}],
            "reward_model": {"style": "rule", "ground_truth": "3"},
            "extra_info": {"index": 0, "answer": "no"},
        },
        ([("user", "Compare [image] and [image].")], "3", "3"),
    ),
    "LLaMA-Factory": (
        {"messages": said("What is it?<image>", "A cup."), "images": ["a.png"]},
        ([("user", "What is it?[image]")], "A cup.", "A cup."),
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "1 and 2", "output": "3", "system": "Be brief.", "history": [["a", "b"]]},
        ([("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "Add.\n1 and 2")], "3", "3"),
    ),
    "ms-swift": (
        {"query": "<image>How many?", "response": "Three.", "images": ["a.png"], "answer": "3"},
        ([("user", "[image]How many?")], "3", "Three."),
    ),
    "question and answer": (
        {"question": "How many?", "image": "a.png", "answer": 3},
        ([("user", "[image]How many?")], "3", "3"),
    ),
    "question and response": (
        {"question": "How many?", "response": "Three."},
        ([("user", "How many?")], "Three.", "Three."),
    ),
    "text and label": ({"text": "Cat?", "image": "a.png", "label": 1}, ([("user", "[image]Cat?")], "1", "1")),
    "labels": ({"query": "How many?", "label": ["14"], "image": "a.png"}, ([("user", "[image]How many?")], "14", "14")),
    "target": ({"question": "How many?", "target": "14"}, ([("user", "How many?")], "14", "14")),
    "ground truth": ({"problem": "How many?", "ground_truth": 1.0}, ([("user", "How many?")], "1", "1")),
    "VQA": (
        {"question": "How many?", "answers": [{"answer": "two", "answer_id": 1}, {"answer": "2"}, {"answer": "2"}]},
        ([("user", "How many?")], "2", "2"),
    ),
    "SQuAD": (
        {"question": "Who?", "answers": {"text": ["Ada"], "answer_start": [3]}},
        ([("user", "Who?")], "Ada", "Ada"),
    ),
    "parts without a type": (
        {"messages": [{"role": "user", "content": [{"image": "a.png"}, {"text": "How many?"}]}], "answer": "3"},
        ([("user", "[image]How many?")], "3", "3"),
    ),
    "arrays, as pandas has them": (
        {"prompt": np.array(said("How many?"), dtype=object), "answer": np.int64(3), "images": np.array([], object)},
        ([("user", "How many?")], "3", "3"),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_each_layout_is_read(name):
    raw, (prompt, answer, completion) = LAYOUTS[name]
    row, images = read_row(raw)
    assert (texts(row), row.answer, row.completion) == (prompt, answer, completion)
    assert len(images) == sum(text.count("[image]") for _, text in prompt)
    assert all(row.columns[key] is value for key, value in raw.items() if key in row.columns)


def test_the_commonest_of_several_references_is_the_answer():
    votes = [{"answer": "two"}, {"answer": "2"}, {"answer": "two"}, {"answer": "a pair"}]
    rows = list(load_dataset_rows([{"question": "?", "answers": votes}, {"question": "?", "answer": "dog"}]))
    assert rows[0].answer == "two" and rows[0].references == ["two", "2", "a pair"]
    columns = reward_columns(rows)
    assert columns["answer"] == ["two", "dog"] and columns["references"] == [["two", "2", "a pair"], ["dog"]]
    assert columns["answers"] == [votes, None]
    for name, replies in {
        "exact": ("A pair.", "dog"),
        "contains": ("it is 2 of them", "a dog"),
        "numeric": ("2", ""),
    }.items():
        found = load_rewards([name, {"name": "format", "pattern": ".*"}])(["?", "?"], list(replies), columns)
        assert found.parts[0, 0] == 1.0
    seen = []
    judge = {"name": "judge", "function": lambda question, completion, answer: seen.append(answer) or answer == "2"}
    assert load_rewards([judge])(["?", "?"], ["2", "2"], columns).total.tolist() == [1.0, 0.0]
    assert sorted(seen) == ["2", "a pair", "dog", "two"]

    def old(completions, answer, **others):
        return [float(text == one.strip()) for text, one in zip(completions, answer, strict=True)]

    assert load_rewards(old)(["?", "?"], ["two", "cat"], columns).total.tolist() == [1.0, 0.0]


def test_columns_may_have_other_names(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    raw = {"q": "<image>How many?", "gt": ["3", "three"], "pic": "a.png", "image": "preview.png", "prompt": 7, "k": 1}
    names = {"prompt": "q", "answer": "gt", "images": "pic", "kind": "k"}
    (tmp_path / "t.jsonl").write_text(json.dumps(raw))
    for more in ({}, {"streaming": True}):
        (row,) = load_dataset_rows(tmp_path / "t.jsonl", columns=names, strict=True, **more)
        assert len(row.images) == 1 and row.references == ["3", "three"] and row.columns == {"kind": 1}
    with pytest.raises(
        BadDataError, match="no column `label`, which `columns` names for answer; the row has `q`, `gt`"
    ):
        load_dataset_rows([raw], columns={"prompt": "q", "answer": "label"}, strict=True)
    swapped = {"prompt": "completion", "completion": "prompt"}
    (row,) = load_dataset_rows([{"prompt": "a", "completion": "b"}], columns=swapped)
    assert (row.prompt[0]["content"][0]["text"], row.completion) == ("b", "a")
    for wrong in ("prompt", ["prompt"], {"prompt": 1}, {1: "a"}, {"prompt": ""}):
        with pytest.raises(ValueError, match="columns must map"):
            load_dataset_rows([raw], columns=wrong)


def test_datasets_may_have_other_names_and_kinds_of_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"q": ["?", "?"], "gt": ["1", "2"], "pic": [PICTURE, PICTURE]})
    many = datasets.Dataset.from_dict(
        {"q": ["<image>?", "<image><image>?"], "gt": ["1", "2"], "pic": [[PICTURE], [PICTURE]]}
    )
    talk = [{"role": "user", "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "?"}]}]
    feature = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    feature = datasets.List({"role": datasets.Value("string"), "content": datasets.List(feature)})
    inside = datasets.Dataset.from_list(
        [{"q": talk, "gt": "1"}], features=datasets.Features({"q": feature, "gt": datasets.Value("string")})
    )
    for dataset, good, names in ((one, 2, ("q", "gt", "pic")), (many, 1, ("q", "gt", "pic")), (inside, 1, ("q", "gt"))):
        columns = dict(zip(("prompt", "answer", "images"), names, strict=False))
        for kind in (dataset, dataset.with_format("numpy"), dataset.to_iterable_dataset()):
            rows = load_dataset_rows(kind, columns=columns)
            if hasattr(rows, "__len__"):
                assert len(rows) == good
            assert [row.images[0].tobytes() == PICTURE.tobytes() for row in rows] == [True] * good
    both = load_dataset_rows(one, columns={"prompt": "q", "answer": "gt", "completion": "gt", "question": "q"})
    assert both[1].completion == "2"  # one column by two names
    with pytest.raises(BadDataError, match=r"no `prompt`; its columns are `q`, `gt`, `pic`; .*columns=\{prompt: q\}"):
        load_dataset_rows(one)


def test_datasets_may_make_or_hold_images_in_their_own_way(tmp_path, caplog):
    """A transform, structs of bytes as pandas writes them, and a column that nobody reads."""
    datasets = pytest.importorskip("datasets")
    PICTURE.save(tmp_path / "a.png")
    raw = {"prompt": "<image>?", "answer": "1"}
    held = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    gone = {"bytes": None, "path": str(tmp_path / "gone.png")}
    rows = load_dataset_rows(datasets.Dataset.from_list([{**raw, "images": [held]}, {**raw, "images": [gone]}]))
    assert len(rows) == 1 and rows[0].images[0].tobytes() == PICTURE.tobytes()
    made = datasets.Dataset.from_dict({"n": [1, 2]})
    made.set_transform(lambda batch: {"question": ["?" for _ in batch["n"]], "answer": batch["n"]})
    assert [row.answer for row in load_dataset_rows(made)] == ["1", "2"]
    made.set_transform(lambda batch: {"question": ["?"], "answer": [1 // (2 - batch["n"][0])]})
    rows = load_dataset_rows(made)
    assert len(rows) == 1 and "ZeroDivisionError" in rows.reports.found[0][1]
    assert "is not read" not in caplog.text
    assert not load_dataset_rows([{"question": "?", "answer": 1, "img": "a.png"}] * 2)[0].images
    assert caplog.text.count("`img` looks like an image but is not read; if it is one: columns={images: img}") == 1


UNREADABLE = [
    ({"prompt": "<image> and <image>?", "images": ["a.png"]}, "the prompt contains <image> twice, but"),
    ({"prompt": "What does <image> do?"}, "the prompt contains <image> once, but the row has 0 images"),
    ({"prompt": "<image>?", "images": ["a.png", "b.png"]}, "once, but the row has 2 images"),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image"}, "<image>?"]}], "image": "a"},
        "both image parts and the text <image>",
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "image": "a.png"},
        "images are both in the prompt's parts and in `images`",
    ),
    (
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "image"}]}]},
        "2 image parts in the prompt, but only 1 of them hold an image",
    ),
    ({"prompt": "<video>What happens?"}, "the prompt has <video>: VisMem takes images and text"),
    ({"messages": said("?", "See <image>.")}, "the reply's text contains <image>"),
    ({"prompt": "?", "videos": ["a.mp4"]}, "`videos` cannot be read"),
    ({"prompt": "?", "video": "a.mp4"}, "`video` cannot be read"),
    ({"prompt": "<|image_pad|>?"}, "contains <|image_pad|>"),
    ({"prompt": "<image_soft_token>?"}, "contains <image_soft_token>"),
    ({"prompt": "half \ud800"}, r"half of a surrogate pair"),
    ({"prompt": "?", "note": {"deep": ["\udfff"]}}, r"half of a surrogate pair"),
    ({"question": "", "label": 1}, "`question` is empty"),
    ({"img": "a.png", "gt": "b"}, "no `prompt`; the row has `img`, `gt`"),
    ({"instruction": "Add.", "input": 5}, "`input` must be a string"),
    ({"messages": said("?"), "system": np.zeros((2, 2))}, "`system` must be a string, not ndarray"),
    ({"query": "?", "history": [["a"]]}, "`history` must be a list of pairs"),
    ({"conversations": [{"from": ["human"], "value": "?"}]}, "must have a `role`"),
    ({"messages": [*said("?"), {"role": "assistant"}]}, "last message of `messages` must be text"),
    ({"prompt": "?", "answer": 10**5000}, "too many digits"),
    ({"prompt": "?", "answers": [None, ""]}, "`answers` is empty"),
    ({"prompt": "?", "answers": [{"score": 1}]}, "not an object without `answer`"),
    ({"messages": [{"role": "system", "content": "Be brief."}]}, "`messages` has no user message"),
    ({"messages": [{"role": "assistant", "content": "Hi."}], "system": "Be brief."}, "has no user message"),
]  # fmt: skip


@pytest.mark.parametrize(("raw", "problem"), UNREADABLE)
def test_unreadable_rows_name_the_problem(raw, problem):
    with pytest.raises(BadRowError) as caught:
        read_row({**({} if "gt" in raw or "label" in raw or "answers" in raw else {"answer": "x"}), **raw})
    assert problem in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_column_suggests_the_nearest_one():
    for raw, hint in [
        ({"question": "?", "img": "a", "gt": "b"}, "no `answer`; the row has `question`, `img`, `gt`; if `gt` is it"),
        ({"questions": "?", "answer": "b"}, "if `questions` is it: columns={prompt: questions}"),
        ({"user_prompt": "?", "answer": "b"}, "columns={prompt: user_prompt}"),
        ({"prompt": "?", "gold_answer": "b"}, "columns={answer: gold_answer}"),
        ({"x": "?", "answer": "b"}, "name it: columns={prompt: NAME}"),
    ]:  # fmt: skip
        with pytest.raises(BadRowError) as caught:
            read_row(raw)
        assert hint in str(caught.value)


def test_columns_without_a_value_are_ignored():
    """NaN as tables store it, and turns by column as pandas stores them."""
    turns = {"from": np.array(["human", "gpt"], dtype=object), "value": np.array(["<image>?", "1"], dtype=object)}
    row, found = read_row({"prompt": np.float32("nan"), "conversations": turns, "images": [], "image": "a.png"})
    assert row.prompt[0]["content"][0]["type"] == "image" and row.answer == "1" and found == ["a.png"]


def test_values_that_are_not_images_are_reported_on_loading():
    for value in (5, ["a.png"], {"path": None, "bytes": None}, np.zeros((2, 2, 3)), 10**5000):
        rows = load_dataset_rows([{"prompt": "?", "answer": 1, "images": [value]}, {"prompt": "?", "answer": 1}])
        ((row_id, problem),) = rows.reports.found
        assert len(rows) == 1 and row_id == "rows[0]" and "an image must be a path" in problem
        assert ("PIL.Image.fromarray" in problem) == isinstance(value, np.ndarray)


def test_nesting_too_deep_is_a_bad_row():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    loop: dict = {"prompt": "?", "answer": "x"}
    loop["self"] = loop
    for raw in ({"prompt": "?", "answer": "x", "deep": deep}, loop):
        with pytest.raises(BadRowError, match="nested too deeply"):
            read_row(raw)
    while deep:
        deep = deep[0]  # freed from the outside: Python frees so deep a list by recursion


def test_any_values_give_a_row_or_a_bad_row():
    """Random rows of all layouts with wrong types anywhere."""
    rng = random.Random(0)
    odd = [None, True, 0, -1, 1.5, float("nan"), float("inf"), "", "a", "<image>", "\ud800", b"x", [], {}, [[]], [None],
           {"type": "image"}, {"role": []}, {1: 2}, ("a",), {"a"}, object(), PICTURE, np.zeros(3), np.zeros((2, 2)),
           np.array("a"), Path("a"), 10**5000, {"bytes": 5}, {"path": 5}, lambda: 0]  # fmt: skip

    def broken(value, depth=0):
        if rng.random() < 0.12:
            return rng.choice(odd)
        if isinstance(value, dict) and not isinstance(value, Image.Image):
            found = {key: broken(inner, depth + 1) for key, inner in value.items() if rng.random() > 0.05}
            if rng.random() < 0.1:
                found[rng.choice(["images", "image", "system", "history", "input", "completion", "videos", 5])] = (
                    rng.choice(odd)
                )
            return found
        if isinstance(value, list):
            return [broken(inner, depth + 1) for inner in value for _ in range(rng.choice((0, 1, 1, 1, 2)))]
        return value

    good = 0
    for _ in range(3000):
        raw = broken(rng.choice(list(LAYOUTS.values()))[0])
        names = rng.choice([None, None, {"prompt": "question"}, {"answer": "label", "images": "image"}])
        try:
            check_files(read_row(raw, names)[1], Path("/nowhere"))
            good += 1
        except BadRowError as error:
            assert str(error) and "\n" not in str(error) and str(error).isprintable()
    assert good > 100
