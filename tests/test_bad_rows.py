"""Bad rows wherever they are found: when a file is opened, in the processor while training, and in evaluation."""

from __future__ import annotations

import logging

import pytest
import test_trainer
import tiny
import torch
from PIL import Image
from test_trainer import equip, low, settings

from vismem.data import BadDataError, Row, load_dataset_rows
from vismem.training.trainer import MemoryTrainer

TALL = Image.new("RGB", (1, 300))  # Qwen's processor takes no picture that is over 200 times as high as wide


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def records(count: int, bad: tuple[int, ...] = ()) -> list[dict]:
    """Rows as dictionaries; those at `bad` have a picture that the processor refuses."""
    pictures = [TALL if i in bad else tiny.picture(i) for i in range(count)]
    return [
        {
            "prompt": test_trainer.QUESTIONS[i % 3],
            "images": [picture],
            "answer": "a red cup",
            "completion": "A red cup.",
        }
        for i, picture in enumerate(pictures)
    ]


class Noting(MemoryTrainer):
    """Keeps the ids of each step's rows and its loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.met: list[tuple[list[str], float]] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.met.append(([row.id for row in inputs], float(loss)))
        return loss


def run(folder, stage, data, resume=None, **changes) -> Noting:
    torch.manual_seed(3)
    changes = {"max_steps": 4, "train_sampling_strategy": "sequential", **changes}
    done = Noting(equip("qwen2_5_vl"), settings(folder, stage, **changes), data, None if stage == "warmup" else low)
    done.train(resume_from_checkpoint=resume)
    return done


@pytest.mark.parametrize(("stage", "streaming"), [("warmup", False), ("warmup", True), ("stage1", False)])
def test_a_row_that_the_processor_refuses_is_replaced_also_after_a_resume(tmp_path, caplog, stage, streaming):
    """One bad row comes up in the first update, one in the third."""
    data = records(10, bad=(1, 5))
    more = {"save_strategy": "steps", "save_steps": 2, "streaming": streaming}
    whole = run(tmp_path, stage, data, **more)
    chosen = [[0, 2], [3, 4], [6, 7], [8, 9]] if streaming else [[0, 2], [2, 3], [4, 6], [6, 7]]
    assert [ids for ids, _ in whole.met] == [[f"rows[{i}]" for i in step] for step in chosen]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    bad = [line for line in said if "bad row" in line]
    assert len(bad) == 2 and all("aspect ratio" in line and "\n" not in line for line in bad)
    assert "rows[1]: " in bad[0] and "rows[5]: " in bad[1]
    again = run(tmp_path, stage, data, resume=str(tmp_path / "checkpoint-2"), **more)
    assert again.met == whole.met[2:]


@pytest.mark.parametrize("stage", ["stage2", "sft", "grpo"])
def test_every_stage_replaces_bad_rows(tmp_path, stage):
    done = run(tmp_path, stage, records(4, bad=(0,)), max_steps=1)
    assert [ids for ids, _ in done.met] == [["rows[1]", "rows[1]"]]


def test_too_many_bad_rows_and_strict(tmp_path):
    data = records(6, bad=(1, 2))
    with pytest.raises(BadDataError, match="2 bad rows in rows, more than max_bad_rows=1"):
        run(tmp_path, "warmup", data, max_bad_rows=1)
    with pytest.raises(BadDataError, match=r"rows\[1\]: .*aspect ratio"):
        run(tmp_path, "warmup", data, strict=True)
    with pytest.raises(BadDataError, match="no good row left"):
        run(tmp_path, "warmup", records(2, bad=(0, 1)))


def test_rows_given_as_rows_are_tried_too(tmp_path):
    rows = test_trainer.rows(4)
    rows[0] = Row("mine", rows[0].prompt, [TALL], "a", "a", {})
    done = run(tmp_path, "warmup", rows, max_steps=1)
    assert [ids for ids, _ in done.met] == [["row-1", "row-1"]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"completion": "A <|image_pad|> cup."}, "the reply's text holds <|image_pad|>"),
        ({"prompt": "What is <|vision_start|>?"}, "holds <|vision_start|>"),
        ({"prompt": "What is <ms_I>?"}, "holds <ms_I>"),
        ({"prompt": "Look! " * 5000}, "the prompt has"),
    ],
)
def test_texts_that_no_model_takes(tmp_path, caplog, change, problem):
    data = records(3)
    data[1] |= change
    model = equip("qwen2_5_vl")
    model.base.config.get_text_config().max_position_embeddings = 4096
    trainer = MemoryTrainer(model, settings(tmp_path, "warmup"), data)
    assert {row.id for row in trainer.train_dataset} == {"rows[0]", "rows[2]"}
    assert caplog.text.count("bad row") == 1 and problem in caplog.text


def test_a_missing_image_is_found_when_the_rows_are_opened(tmp_path, caplog):
    datasets = pytest.importorskip("datasets")
    tiny.picture(1).save(tmp_path / "here.png")
    names = ["here.png", "gone.png", "x" * 5000, "", "https://example.com/a.png"]
    (tmp_path / "folder").mkdir()
    paths = [str(tmp_path / name) if name and ":" not in name else name or str(tmp_path / "folder") for name in names]
    rows = load_dataset_rows([{"prompt": "?", "image": path, "answer": 1} for path in paths])
    assert len(rows) == 1 and rows.reports.count == 4
    table = datasets.Dataset.from_dict({"prompt": ["?", "?"], "answer": ["1", "2"], "image": paths[:2]})
    for kind in (table, table.cast_column("image", datasets.Image())):
        rows = load_dataset_rows(kind)
        assert len(rows) == 1 and "no such image" in rows.reports.found[0][1]
