"""Bad rows wherever they are found: when a file is opened, in the processor while training, and in evaluation."""

from __future__ import annotations

import json
import logging

import pytest
import tiny
import torch
import training_runs
from PIL import Image
from training_runs import equip, low, settings

from vismem.data import BadDataError, Row, load_dataset_rows
from vismem.evaluation.answering import answer
from vismem.evaluation.records import RecordFile
from vismem.evaluation.settings import settings_of
from vismem.evaluation.tables import make
from vismem.training.trainer import MemoryTrainer

TALL = Image.new("RGB", (1, 300))  # Qwen's processor takes no picture that is over 200 times as high as wide


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def records(count: int, bad: tuple[int, ...] = ()) -> list[dict]:
    """Rows as dictionaries; those at `bad` have an image that the processor rejects."""
    pictures = [TALL if i in bad else tiny.picture(i) for i in range(count)]
    return [
        {
            "prompt": training_runs.QUESTIONS[i % 3],
            "images": [picture],
            "answer": "a red cup",
            "completion": "A red cup.",
        }
        for i, picture in enumerate(pictures)
    ]


class Noting(MemoryTrainer):
    """Records each step's row ids and loss."""

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
def test_a_rejected_row_is_replaced_also_after_resuming(tmp_path, caplog, stage, streaming):
    """One bad row occurs in the first update, one in the third."""
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


def test_too_many_bad_rows_stop_training_and_strict_allows_none(tmp_path):
    data = records(6, bad=(1, 2))
    with pytest.raises(BadDataError, match="2 bad rows in rows, more than max_bad_rows=1"):
        run(tmp_path, "warmup", data, max_bad_rows=1)
    with pytest.raises(BadDataError, match=r"rows\[1\]: .*aspect ratio"):
        run(tmp_path, "warmup", data, strict=True)
    with pytest.raises(BadDataError, match="no good row left"):
        run(tmp_path, "warmup", records(2, bad=(0, 1)))


def test_row_objects_are_checked_too(tmp_path):
    rows = training_runs.rows(4)
    rows[0] = Row("mine", rows[0].prompt, [TALL], "a", "a", {})
    done = run(tmp_path, "warmup", rows, max_steps=1)
    assert [ids for ids, _ in done.met] == [["row-1", "row-1"]]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"completion": "A <|image_pad|> cup."}, "the reply's text contains <|image_pad|>"),
        ({"prompt": "What is <|vision_start|>?"}, "contains <|vision_start|>"),
        ({"prompt": "What is <ms_I>?"}, "contains <ms_I>"),
        ({"prompt": "Look! " * 5000}, "the prompt has"),
    ],
)
def test_texts_that_models_reject(tmp_path, caplog, change, problem):
    data = records(3)
    data[1] |= change
    model = equip("qwen2_5_vl")
    model.base.config.get_text_config().max_position_embeddings = 4096
    trainer = MemoryTrainer(model, settings(tmp_path, "warmup"), data)
    assert {row.id for row in trainer.train_dataset} == {"rows[0]", "rows[2]"}
    assert caplog.text.count("bad row") == 1 and problem in caplog.text


def test_a_missing_image_is_found_on_loading(tmp_path, caplog):
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


# What the trainer is given.


def test_the_trainer_accepts_trls_inputs(tmp_path):
    datasets = pytest.importorskip("datasets")
    raw = [{"question": row["prompt"], "image": row["images"][0], "answer": "a"} for row in records(4)]
    table = datasets.Dataset.from_list(raw)
    for number, source in enumerate((raw, table, table.to_iterable_dataset())):
        done = run(tmp_path / str(number), "warmup", source, max_steps=1)
        assert len(done.met[0][0]) == 2
    renamed = table.rename_columns({"question": "q", "answer": "gt"})
    columns = {"prompt": "q", "answer": "gt"}
    done = run(tmp_path / "renamed", "warmup", renamed, max_steps=1, columns=columns)
    assert done.train_dataset[0].answer == "a"


def test_unused_arguments_are_refused(tmp_path):
    model, args, rows = equip("qwen2_5_vl"), settings(tmp_path, "warmup"), training_runs.rows(2)
    for given in ({"eval_dataset": rows}, {"compute_metrics": len}):
        with pytest.raises(ValueError, match=r"training does not evaluate: .* run `vismem eval`"):
            MemoryTrainer(model, args, rows, **given)
    for given in ({"eval_strategy": "steps", "eval_steps": 1}, {"do_eval": True}, {"eval_on_start": True}):
        with pytest.raises(ValueError, match="training does not evaluate"):
            settings(tmp_path, "warmup", **given)
    with pytest.raises(ValueError, match="has its own data_collator"):
        MemoryTrainer(model, args, rows, data_collator=list)
    with pytest.raises(ValueError, match="needs a train_dataset"):
        MemoryTrainer(model, args, None)
    with pytest.raises(ValueError, match="training does not evaluate"):
        MemoryTrainer(model, args, rows).evaluate()


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    done = run(tmp_path, "warmup", records(4), max_steps=1, save_strategy="steps", save_steps=1)
    with pytest.raises(ValueError, match="this trainer has trained already"):
        done.train()
    with pytest.raises(ValueError, match=r"holds a run already: continue it with train\(resume_from_checkpoint=True\)"):
        run(tmp_path, "warmup", records(4), max_steps=1)
    again = run(tmp_path, "warmup", records(4), resume=True, max_steps=2)
    assert again.state.global_step == 2 and len(again.met) == 1
    other = run(tmp_path / "other", "warmup", records(4), max_steps=1)
    other.vismem.base.name_or_path = "tiny"
    other.save_model()
    with pytest.raises(ValueError, match="holds a run already"):
        run(tmp_path / "other", "warmup", records(4), max_steps=1)


# Evaluation.


def test_a_bad_question_is_recorded_and_the_rest_answered(tmp_path, caplog):
    model, rows = equip("qwen2_5_vl"), training_runs.rows(3)
    rows[1] = Row("tall", rows[1].prompt, [TALL], "a", "a", {"task": "sum"})
    store = RecordFile(tmp_path / "a.jsonl", {})
    found = answer(model, rows, "contains", batch_size=2, max_new_tokens=4, store=store)
    assert [record.id for record in found] == ["row-0", "tall", "row-2"]
    assert [record.finish == "error" for record in found] == [False, True, False]
    assert "aspect ratio" in found[1].error and found[1].score == 0.0 and found[1].columns == {"task": "sum"}
    assert "1 of 3 questions failed and count as wrong; the first: tall: " in caplog.text
    assert RecordFile(tmp_path / "a.jsonl", {}).records == {record.id: record for record in found}
    with pytest.raises(ValueError, match="none of 1 questions can be answered; the first: tall"):
        answer(model, rows[1:2], "contains", max_new_tokens=4)


def test_tables_say_how_many_questions_failed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.picture(0, (64, 64)).save("good.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "good.png").read_bytes()[:-400])
    questions = [
        {"q": "How many?", "answer": "3", "image": "good.png"},
        {"q": "How many?", "answer": "3", "image": "broken.png"},
        {"q": "How many?", "answer": "3", "image": "gone.png"},
        {"q": "How many?" * 5000, "answer": "3", "image": "good.png"},
        {"q": "How many?"},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    benchmark = {"name": "cups", "data": "t.jsonl", "columns": {"prompt": "q"}}
    values = {"base": "pocket", "output_dir": "out", "max_new_tokens": 4, "methods": [{"name": "vanilla"}]}
    make(["main"], settings_of({**values, "benchmarks": [benchmark]}), "vismem eval tables {}")
    table = json.loads((tmp_path / "out" / "main.json").read_text())
    assert [cell["n"] for cell in table["cells"]] == [5]
    assert "Failed questions, which count as wrong: 4 of 5 in cups." in table["notes"]
    assert "4 of 5 in cups" in (tmp_path / "out" / "main.md").read_text()
