"""Evaluation: intervals, record files, answers, settings, suites, and the paper's tables on the pocket model."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vismem
from vismem.cli import main as command_line
from vismem.evaluation import intervals
from vismem.evaluation.answering import answer, policy_for
from vismem.evaluation.records import Record, RecordFile
from vismem.evaluation.runs import Runs, slug
from vismem.evaluation.settings import Method, load_settings, settings_of
from vismem.evaluation.tables import TABLES, make
from vismem.evaluation.tables.layout import Cell, Table, averaged, grid, in_terminal, measured
from vismem.evaluation.tables.paper import failed, forgetting, never_invoked, relative
from vismem.pocket import MEMORY_PATH, easyvqa, suites
from vismem.pocket.tasks import score


@pytest.fixture(scope="module")
def shipped():
    return vismem.VisMem.from_pretrained(MEMORY_PATH)


# Intervals.


def test_share_intervals_match_the_normal_approximation():
    scores = [1.0] * 70 + [0.0] * 30
    mean, low, high = intervals.bootstrap_mean(scores)
    half = 1.96 * (0.7 * 0.3 / 100) ** 0.5
    assert mean == pytest.approx(0.7)
    assert (low, high) == (pytest.approx(0.7 - half, abs=0.015), pytest.approx(0.7 + half, abs=0.015))
    assert intervals.bootstrap_mean(scores) == (mean, low, high)  # the same each time


def test_intervals_have_their_nominal_coverage():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(100):
        _, low, high = intervals.bootstrap_mean(rng.random(60) < 0.4)
        hits += low <= 0.4 <= high
    assert 88 <= hits <= 99


def test_seeds_that_differ_widen_the_interval():
    alike = [[1.0, 0.0] * 50] * 3
    apart = [[1.0, 1.0] * 50, [1.0, 0.0] * 50, [0.0, 0.0] * 50]
    (_, low, high), (_, lower, higher) = map(intervals.bootstrap_mean, (alike, apart))
    assert higher - lower > 3 * (high - low)


def test_paired_differences_are_narrower_than_unpaired_ones():
    rng = np.random.default_rng(1)
    one = (rng.random(100) < 0.5).astype(float)
    two = one.copy()
    two[:10] = 0.0
    mean, low, high = intervals.bootstrap_difference(one, two)
    assert mean == pytest.approx(one[:10].sum() / 100) and 0 <= low < mean < high < 0.2
    with pytest.raises(ValueError, match="same questions"):
        intervals.bootstrap_difference([1.0], [1.0, 0.0])


def test_groups_are_resampled_together():
    scores, groups = [1.0] * 10 + [0.0] * 10, [0] * 10 + [1] * 10
    mean, low, high = intervals.bootstrap_mean(scores, groups)
    assert (mean, low, high) == (0.5, 0.0, 1.0)
    sizes = [8, 2] * 40  # a group's weight is its size
    scores = [float(size == 8) for size in sizes for _ in range(size)]
    mean, low, high = intervals.bootstrap_mean(scores, [g for g, size in enumerate(sizes) for _ in range(size)])
    assert mean == 0.8 and 0.65 < low < mean < high < 0.92


def test_averages_are_unweighted_over_benchmarks():
    mean, low, high = intervals.bootstrap_average([[1.0] * 10, [0.0] * 1000])
    assert (mean, low, high) == (0.5, pytest.approx(0.5), pytest.approx(0.5))


@pytest.mark.parametrize("scores", [[], [[]], [float("nan")]])
def test_empty_scores_raise(scores):
    with pytest.raises(ValueError):
        intervals.bootstrap_mean(scores)


# Records.


def record(name: str, score: float = 1.0, **more) -> Record:
    return Record(name, score, "so", 4, 4, **more)


def test_record_files_resume_and_drop_a_truncated_line(tmp_path):
    path = tmp_path / "a" / "answers.jsonl"
    file = RecordFile(path, {"n": 1, "what": ("x",)})
    file.add([record("one"), record("two", invocations=[{"kind": "short", "position": 2}])])
    with path.open("a") as torn:
        torn.write('{"id": "three", "sco')
    again = RecordFile(path, {"n": 1, "what": ["x"]})
    assert again.done == {"one", "two"} and again.records["two"] == file.records["two"]
    again.add([record("three", 0.0)])
    assert RecordFile(path, {"n": 1, "what": ["x"]}).records["three"].score == 0.0


@pytest.mark.parametrize(
    "reply", ["a\u2028b", "a\x85b", "a\x0b\x0c\x1c\x1db", "Z\u00fcrich \N{SNOWMAN}", "half \ud83d"]
)
def test_records_truncated_anywhere_are_readable(tmp_path, reply):
    path, kept = tmp_path / "answers.jsonl", Record("one", 1.0, reply, 4, 4)
    RecordFile(path, {}).add([kept, record("two")])
    whole = path.read_bytes()
    end = whole.rindex(b'{"id": "two"')
    for length in (end, end - 1, end - 3, len(whole) - 1, len(whole) - 9):
        path.write_bytes(whole[:length])
        again = RecordFile(path, {})
        assert again.records.get("one", kept) == kept and again.done <= {"one", "two"}
        again.add([record("three")])
        assert RecordFile(path, {}).done == again.done
    assert length < len(whole) and again.records["one"].reply == reply


def test_record_files_refuse_other_settings_and_other_files(tmp_path):
    path = tmp_path / "answers.jsonl"
    file = RecordFile(path, {"n": 1})
    assert not path.exists()  # a run that finds nothing to write leaves nothing behind
    file.add([record("one")])
    with pytest.raises(ValueError, match=r"n=1, not 2.*output_dir"):
        RecordFile(path, {"n": 2})
    path.write_text('{"x": 1}\n{"id": "a"}\n')
    with pytest.raises(ValueError, match="has no settings"):
        RecordFile(path, {"n": 1})
    path.write_text('{"settings": {"n": 1}}\nnonsense\n{"id": "a"}\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        RecordFile(path, {"n": 1})
    path.write_text('{"settings": {"n": 1}}\n{"name": "a"}\n{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"answers.jsonl has a line"):
        RecordFile(path, {"n": 1})


# Suites and answers.


@pytest.mark.parametrize("suite", suites.SUITES)
def test_suites_are_seeded_and_bounds_ask_the_same_questions(suite):
    found = suites.rows(suite, 1, seed=5)
    assert [row.answer for row in found] == [row.answer for row in suites.rows(suite, 1, seed=5)]
    assert len({row.id for row in found}) == len(found)
    assert all(row.columns["ability"] == suites.SUITES[suite].ability for row in found)
    assert [row.answer for row in suites.rows(suite, 1, seed=6)] != [row.answer for row in found]
    if suites.SUITES[suite].bound:
        shown = suites.rows(suite, 1, seed=5, bound=True)
        assert [row.answer for row in shown] == [row.answer for row in found]
        assert [row.prompt for row in shown] != [row.prompt for row in found]
    else:
        with pytest.raises(ValueError, match="no bound"):
            suites.rows(suite, 1, bound=True)


def test_attributes_match_the_answer():
    for row in suites.rows("late", 2):
        if row.columns["task"] in ("colour", "digit"):
            ((r, c),) = row.columns["asked"]
            assert row.columns["attributes"][f"{row.columns['task']} r{r + 1}c{c + 1}"] == row.answer
    labels = {
        row.columns["attributes"][f"label r{row.columns['asked'][0][0] + 1}"] for row in suites.rows("rules_first", 2)
    }
    assert labels == {"striped", "dotted", "checked"}


def test_answers_are_in_order_and_resume(shipped, tmp_path):
    rows = suites.rows("late", 1)[:9]
    store = RecordFile(tmp_path / "answers.jsonl", {})
    first = answer(shipped, rows[3:6], ["pocket"], max_new_tokens=24, store=store)
    found = answer(shipped, rows, ["pocket"], batch_size=4, max_new_tokens=24, store=store)
    assert [r.id for r in found] == [row.id for row in rows]
    assert found[3:6] == first
    assert [r.score for r in found] == [
        score(row.columns["task"], r.reply, row.answer) for r, row in zip(found, rows, strict=True)
    ]
    assert all(r.columns["cell"] == row.columns["cell"] and r.invocations for r, row in zip(found, rows, strict=True))
    assert sum(r.score for r in found) >= 8
    alone = answer(shipped, rows, ["pocket"], batch_size=1, max_new_tokens=24)
    assert [(r.reply, r.invocations) for r in alone] == [(r.reply, r.invocations) for r in found]
    off = answer(shipped, rows, ["pocket"], invocation="off", max_new_tokens=24)
    assert not any(r.invocations for r in off) and sum(r.score for r in off) <= 3


def test_random_invocation_is_seeded_by_row(shipped):
    rows = suites.rows("describe", 1)[:6]
    policy = vismem.invocation.Random(0.5)
    found = [answer(shipped, rows, ["pocket"], invocation=policy, batch_size=b, max_new_tokens=40) for b in (1, 6)]
    assert found[0] == found[1]
    assert len({str(r.invocations) for r in found[0]}) > 1
    assert policy.seed == 0
    seeds = {policy_for(shipped, row, policy).seed for row in rows}
    assert len(seeds) == len(rows)


def test_placed_invocations_follow_their_markers(shipped):
    rows = suites.rows("both", 1)[:3]
    colon = shipped.processor.tokenizer.encode(":", add_special_tokens=False)[-1]
    for row, found in zip(rows, answer(shipped, rows, ["pocket"], invocation="placed", max_new_tokens=40), strict=True):
        assert [i["kind"] for i in found.invocations] == ["short", "long"] and all(
            i["forced"] for i in found.invocations
        )
        assert found.reply.count(":") >= 2 and row.columns["places"]
    assert policy_for(shipped, rows[0], "placed").mark == colon
    with pytest.raises(ValueError, match="no column `places`"):
        answer(
            shipped,
            [vismem.data.Row("r", rows[0].prompt, rows[0].images, "x", "x", {})],
            ["exact"],
            invocation="placed",
        )


def test_duplicate_ids_raise(shipped):
    rows = suites.rows("late", 1)[:1] * 2
    with pytest.raises(ValueError, match="two questions have the id 'pocket:late"):
        answer(shipped, rows, ["pocket"])


def test_a_table_fits_the_terminal():
    names = [f"benchmark {number}" for number in range(5)]
    cells = [Cell(row, name, 0.5, 0.4, 0.6) for row in ("vanilla", "memory") for name in names]
    table = Table("t", "Results", "", ["vanilla", "memory"], names, cells, notes=["A note."], first="method")
    for width in (None, 200, 60, 36, 10):
        text = in_terminal(table, width)
        lines = text.splitlines()
        assert lines[0] == "Results" and lines[-1] == "A note."
        assert text.count("50.0 [40.0, 60.0]") == 10 and all(text.count(name) >= 1 for name in names)
        if width is not None and width >= 36:
            assert max(map(len, lines)) <= width
    assert in_terminal(table, 36).count("benchmark 3") == 2  # the rows' names again, above each further column
    assert in_terminal(table, 200).count("benchmark 3") == 1


def test_a_method_that_never_invoked_is_named():
    answers = {
        ("memory", "one"): [[Record("a", 1.0, "x", 1, 1), Record("b", 1.0, "x", 1, 1)]],
        ("busy", "one"): [[Record("a", 1.0, "x", 1, 1, invocations=[{"kind": "short"}])]],
        ("vanilla", "one"): [[Record("a", 1.0, "x", 1, 1)]],
    }
    methods = {"vanilla": Method("vanilla"), "off": Method("off", checkpoint="x", invocation="off")}
    methods |= {name: Method(name, checkpoint="x") for name in ("memory", "busy")}
    assert never_invoked(methods, answers) == ["memory never invoked memory in 2 answers, so these are the base's."]


# Settings.


def test_command_lines_override_files_and_files_presets(tmp_path):
    file = tmp_path / "e.yaml"
    file.write_text("preset: pocket\nn: 3\nlengths: {query_length: [2]}\nmethods: [{name: vanilla}]\n")
    found = load_settings(file, ["n=4", "lengths.short_length=[4, 8]", "seeds=[7]"])
    assert (found.n, found.seeds, found.base) == (4, (7,), "pocket")
    assert found.lengths["query_length"] == [2] and found.lengths["short_length"] == [4, 8]
    assert found.lengths["long_length"] and [m.name for m in found.methods] == ["vanilla"]
    assert Method("a", train=[{"step": "sft"}]).seeded and not Method("a", checkpoint="x").seeded
    preset = load_settings(None, ["preset=pocket"])
    for benchmark in (*preset.benchmarks, *preset.of(preset.continual)[1]):
        assert benchmark.ability == suites.SUITES[benchmark.name].ability


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("benchmark=[]", "unknown setting benchmark; did you mean benchmarks"),
        ("lengths.query_len=[2]", r"unknown setting lengths\.query_len; did you mean query_length"),
        ("methods=[{checkpoint: x}]", "a method must be a mapping with a `name`"),
        ("methods=[{name: a, chekpoint: x}]", "did you mean checkpoint"),
        ("methods=[{name: a, checkpoint: x, train: [{step: sft}]}]", "both checkpoint and train"),
        ("methods=[{name: a, train: [{max_steps: 1}]}]", "needs a `step`"),
        ("methods=[{name: a}, {name: a}]", "names must be unique"),
        ("benchmarks=[{name: a}]", "either data=FILE or task="),
        ("batch_size=0", "batch_size must be a whole number"),
        ("seeds=[]", "seeds must be a list"),
        ("memory=nobody", "not one of the methods"),
        ("preset=socket", "unknown preset 'socket'"),
        ("n", "not of the form key=value"),
    ],
)
def test_wrong_settings_are_reported_in_one_line(change, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, [change])


def test_wrong_command_lines_exit_with_2(tmp_path, capsys):
    for words, message in (
        (["tables"], "required"),
        (["tables", "mian"], "neither a table nor a settings file; tables are main"),
        (["tables", "n=3"], "no table named"),
        (["tables", "main", "n=3"], "no output_dir"),
        ([], "required"),
    ):
        assert command_line(["eval", *words]) == 2
        assert message in capsys.readouterr().err
    assert command_line(["eval", "tables", "main", f"output_dir={tmp_path}"]) == 1
    assert "nothing to compare" in capsys.readouterr().err
    assert command_line(["eval", "tables", "main", "preset=pocket", "--show"]) == 0
    shown = capsys.readouterr().out
    assert "name: VisMem" in shown and "short_length:" in shown


# Tables.

SMALL = {
    "base": "pocket",
    "dtype": "float32",
    "n": 1,
    "batch_size": 24,
    "max_new_tokens": 40,
    "methods": [
        {"name": "vanilla"},
        {"name": "bound", "bound": True},
        {"name": "memory", "checkpoint": str(MEMORY_PATH)},
    ],
    "benchmarks": [
        {"name": "late", "data": "pocket:late", "ability": "understanding", "rewards": ["pocket"], "subtask": "task"},
        {"name": "seen", "data": "pocket:in_view", "ability": "understanding", "rewards": ["pocket"], "limit": 6},
        {"name": "rules", "data": "pocket:rules", "ability": "reasoning", "rewards": ["pocket"], "limit": 8},
    ],
    "invocation": {"rates": [50]},
    "latency": {"questions": 2, "rounds": 1, "clock": "processor"},
}


def read(path) -> dict:
    return json.loads(path.read_text())


def cells_of(path) -> dict[tuple[str, str], dict]:
    return {(c["row"], c["column"]): c for c in read(path)["cells"]}


def test_tables_are_remade_from_answers_without_weights(tmp_path, monkeypatch):
    settings = settings_of({**SMALL, "output_dir": str(tmp_path)})
    names = ["main", "subtasks", "when"]
    files = make(names, settings, "vismem eval tables {} x.yaml")
    assert {f.name for f in files} == {f"{n}{e}" for n in names for e in (".json", ".md", ".png")}
    cells = cells_of(tmp_path / "main.json")
    assert cells["memory", "late"]["value"] > cells["vanilla", "late"]["value"] + 0.5
    assert (
        cells["bound", "late"]["value"] > 0.8 and ("bound", "seen") not in cells and ("bound", "average") not in cells
    )
    assert cells["memory", "late"]["low"] <= cells["memory", "late"]["value"] <= cells["memory", "late"]["high"]
    parts = [cells["memory", name]["value"] for name in ("late", "seen", "rules")]
    assert cells["memory", "average"]["value"] == pytest.approx(sum(parts) / 3, abs=1e-3)
    assert "vismem eval tables main x.yaml" in (tmp_path / "main.md").read_text()
    assert "| memory |" in (tmp_path / "main.md").read_text()
    tasks = cells_of(tmp_path / "subtasks.json")
    assert tasks["both", "late, colour"]["value"] > tasks["long-term only", "late, colour"]["value"] + 0.5
    assert tasks["both", "late, colour"]["n"] == 5
    when = cells_of(tmp_path / "when.json")
    assert when["rules", "long per answer"]["value"] > 0.8 > when["late", "long per answer"]["value"]
    answered = sorted((tmp_path / "answers").rglob("*.jsonl"))
    before = {f: f.read_bytes() for f in [*files, *answered]}
    monkeypatch.setattr(Runs, "load", lambda *_: pytest.fail("answers are there already"))
    make(names, settings, "vismem eval tables {} x.yaml")
    assert all(f.read_bytes() == content for f, content in before.items())
    shutil.copytree(tmp_path / "answers", tmp_path / "kept")
    changed = settings_of({**SMALL, "output_dir": str(tmp_path), "max_new_tokens": 41})
    with pytest.raises(ValueError, match="max_new_tokens=40, not 41"):
        make(["main"], changed, "{}")


def test_a_benchmark_may_be_a_task_of_lmms_eval(tmp_path, monkeypatch):
    """Its answers are saved all at once and read again; its sub-tasks are columns of its samples."""
    from vismem.evaluation.lmms import run

    asked = []

    def task_records(model, task, **settings):
        asked.append((task, settings["invocation"], settings["limit"]))
        kinds = [{"kind": "short", "position": 1}] if settings["invocation"] != "off" else []
        return [record(f"{task}/{n}", float(n != 1), invocations=kinds, columns={"half": n % 2}) for n in range(4)]

    monkeypatch.setattr(run, "task_records", task_records)
    monkeypatch.setattr(vismem.evaluation.runs, "check_task", lambda task: None)
    monkeypatch.setattr(Runs, "load", lambda *_: None)
    benchmark = {"name": "stars", "task": "mmstar", "subtask": "half", "limit": 4}
    settings = settings_of({**SMALL, "output_dir": str(tmp_path), "benchmarks": [benchmark]})
    make(["subtasks"], settings, "{}")
    found = cells_of(tmp_path / "subtasks.json")
    assert found["both", "stars, 0"]["value"] == 1 and found["vanilla", "stars, 1"]["value"] == 0.5
    assert asked == [("mmstar", mode, 4) for mode in ("off", "short", "long", "learned")]
    make(["subtasks"], settings, "{}")
    assert len(asked) == 4


def test_failed_questions_are_counted_in_a_note():
    lost = Record.failed("b", "no such image")
    answers = {("memory", "one"): [[record("a")], [lost]], ("vanilla", "one"): [[record("a"), lost]]}
    assert failed(answers) == ["Failed questions, which count as wrong: 1 of 2 in one."]
    assert failed({("memory", "one"): [[record("a")]]}) == []


def test_the_table_of_invocation_has_rates_and_times(tmp_path):
    late = {**SMALL["benchmarks"][0], "limit": 6}
    values = {**SMALL, "output_dir": str(tmp_path), "benchmarks": [late]}
    make(["invocation", "latency"], settings_of(values), "{}")
    cells = cells_of(tmp_path / "invocation.json")
    rows = list(dict.fromkeys(row for row, _ in cells))
    assert rows == ["vanilla", "random, 50 %", "short-term only", "long-term only", "complete"]
    assert cells["complete", "late"]["value"] > cells["random, 50 %", "late"]["value"] + 0.3
    assert (
        cells["vanilla", "invocations per answer"]["value"] == 0 < cells["complete", "invocations per answer"]["value"]
    )
    assert cells["vanilla", "time"]["value"] == 1 and cells["complete", "seconds per answer"]["value"] > 0
    latency = cells_of(tmp_path / "latency.json")
    assert latency["memory", "invocations"]["value"] == 1 and latency["vanilla", "per answer"]["value"] == 1
    assert latency["memory", "to the first token"]["value"] <= latency["memory", "seconds per answer"]["value"]
    (tmp_path / "answers" / "times-latency.json").write_text("[]")
    with pytest.raises(ValueError, match=r"times-latency.json is damaged .*; delete it to measure again"):
        make(["latency"], settings_of(values), "{}")


TRAINED = {
    **SMALL,
    "n": 1,
    "benchmarks": [{"name": "one", "data": "pocket:late", "rewards": ["pocket"], "limit": 3}],
    "training": {"preset": "pocket", "max_steps": 1, "per_device_train_batch_size": 2, "attn_implementation": "eager"},
    "partial": {
        "data": {"full": "pocket:warmup", "partial": "pocket:partial"},
        "methods": [
            {"name": "VisMem", "train": [{"step": "warmup"}], "invocation": "placed"},
            {"name": "LoRA", "train": [{"step": "sft"}]},
        ],
    },
    "continual": {
        "stages": {"one": {"data": "pocket:late"}, "two": {"data": "pocket:rules_first"}},
        "methods": [{"name": "LoRA", "train": [{"step": "sft"}]}],
    },
    "lengths": {"short_length": [4, 16], "query_length": [8], "train": [{"step": "warmup"}], "invocation": "placed"},
}


def test_tables_that_train_train_once_and_share(tmp_path, monkeypatch):
    settings = settings_of({**TRAINED, "output_dir": str(tmp_path)})
    make(["partial", "continual", "lengths"], settings, "{}")
    assert {f.name for f in (tmp_path / "answers" / "lora-full").iterdir()} == {"one-off-seed0.jsonl"}
    assert not Method("a", train=[{"step": "warmup"}, {"step": "grpo"}]).remembers
    made = next(settings.runs.glob("sft*/adapter"))
    assert Method("a", checkpoint=str(made)).policy == "off" == Method("a").policy
    assert Method("a", checkpoint=str(made).replace("seed0", "seed{seed}")).policy == "off"
    assert Method("a", checkpoint=str(MEMORY_PATH)).policy == "learned"
    rows = [row for row, _ in cells_of(tmp_path / "partial.json")]
    assert list(dict.fromkeys(rows)) == ["vanilla", "VisMem, full", "VisMem, partial", "LoRA, full", "LoRA, partial"]
    assert [p.name.partition("-")[0] for p in sorted(settings.runs.iterdir())] == ["sft"] * 4 + ["warmup"] * 4
    found = read(tmp_path / "lengths.json")
    assert found["extra"]["points"] == {
        "query_length": [[8, "as configured"]],
        "short_length": [[4, "N_s = 4"], [16, "as configured"]],
    }
    short = next(
        p for p in settings.runs.glob("warmup*/memory/vismem_config.json") if read(p)["config"]["short_length"] == 4
    )
    answers = [
        r for f in (tmp_path / "answers" / "n_s-4").iterdir() for r in map(json.loads, f.read_text().splitlines()[1:])
    ]
    assert short and all(r["invocations"][0]["length"] == 4 for r in answers if r["invocations"])
    chain = cells_of(tmp_path / "continual.json")
    assert ("LoRA, after two", "forgotten") in chain and ("LoRA, after one", "forgotten") not in chain
    stage = next(p for p in settings.runs.glob("sft*/") if (p / "done.json").is_file())
    monkeypatch.setattr(vismem.evaluation.runs, "train", lambda *_, **__: pytest.fail("it is trained already"))
    make(["partial", "lengths"], settings, "{}")
    assert stage.is_dir()


def test_every_step_continues_from_the_one_before_and_is_shared(tmp_path, monkeypatch):
    steps = []

    def train(name, layers, resume):
        steps.append((name, layers[-1]))
        return Path(layers[-1]["output_dir"]) / "result"

    monkeypatch.setattr(vismem.evaluation.runs, "train", train)
    runs = Runs(settings_of({**SMALL, "output_dir": str(tmp_path), "training": {"preset": "pocket"}}))
    first, second = {"step": "sft", "max_steps": 2}, {"step": "grpo"}
    made = runs.artefact(Method("both", train=[first, second]), 3)
    assert [name for name, _ in steps] == ["sft", "grpo"] and all(changes["seed"] == 3 for _, changes in steps)
    assert "checkpoint" not in steps[0][1] and steps[1][1]["checkpoint"] == f"{steps[0][1]['output_dir']}/result"
    assert made.parent == Path(steps[1][1]["output_dir"])
    alone = runs.artefact(Method("alone", train=[first]), 3)
    assert str(alone) == steps[1][1]["checkpoint"]
    assert (
        runs.artefact(Method("x", train=[second]), 3) != made and runs.artefact(Method("x", train=[first]), 4) != alone
    )


def test_a_method_may_have_a_checkpoint_per_seed(tmp_path):
    for seed in (3, 4):
        shutil.copytree(MEMORY_PATH, tmp_path / f"memory{seed}")
    methods = [{"name": "memory", "checkpoint": str(tmp_path / "memory{seed}")}]
    values = {**SMALL, "methods": methods, "seeds": [3, 4], "output_dir": str(tmp_path / "out")}
    values["benchmarks"] = [{"name": "late", "data": "pocket:late", "rewards": ["pocket"], "limit": 4}]
    make(["main"], settings_of(values), "{}")
    cell = cells_of(tmp_path / "out" / "main.json")["memory", "late"]
    assert len(cell["seeds"]) == 2 and cell["seeds"][0] == cell["seeds"][1] == cell["value"]
    assert "over the seeds 3, 4" in (tmp_path / "out" / "main.md").read_text()


def test_tables_take_questions_of_a_file_and_another_base(tmp_path):
    import tiny
    from tiny import base_and_processor

    base, processor = base_and_processor("qwen2_5_vl")
    base.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    tiny.picture(1).save(tmp_path / "a.png")
    lines = [{"prompt": f"look {n}", "images": ["a.png"], "answer": "x", "skill": f"s{n % 2}"} for n in range(4)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.manual_seed(0)
    model = vismem.VisMem(base, processor, vismem.VisMemConfig(query_length=4, short_length=4, long_length=4))
    model.save_pretrained(tmp_path / "memory")
    file = tmp_path / "e.yaml"
    file.write_text(
        f"output_dir: {tmp_path}/out\nbase: {tmp_path}/base\nmax_new_tokens: 6\n"
        f"methods: [{{name: vanilla}}, {{name: ours, checkpoint: {tmp_path}/memory, invocation: 'random:1'}}]\n"
        f"benchmarks: [{{name: mine, data: {tmp_path}/q.jsonl, split: train, subtask: skill}}]\n"
    )
    assert command_line(["eval", "tables", "main", "subtasks", str(file), "latency={questions: 2}"]) == 0
    command = read(tmp_path / "out" / "main.json")["command"]
    assert command == f"vismem eval tables main {file} 'latency={{questions: 2}}'"
    assert set(cells_of(tmp_path / "out" / "main.json")) == {("vanilla", "mine"), ("ours", "mine")}
    assert ("both", "mine, s1") in cells_of(tmp_path / "out" / "subtasks.json")
    answers = (tmp_path / "out" / "answers" / "ours" / "mine-random-1-base.jsonl").read_text().splitlines()
    assert len(answers) == 5 and all(json.loads(line)["invocations"] for line in answers[1:])


def test_tables_name_what_is_missing(tmp_path):
    bare = settings_of({**SMALL, "output_dir": str(tmp_path), "methods": [{"name": "vanilla"}]})
    plain = [{"name": "x", "data": "pocket:late"}]
    for name, settings, message in (
        ("partial", bare, "needs partial.data"),
        ("continual", bare, "needs continual.stages"),
        ("lengths", bare, "no method has a memory"),
        ("invocation", bare, "no method has a memory"),
        (
            "invocation",
            settings_of({**SMALL, "invocation": {"benchmarks": ["x"]}, "output_dir": str(tmp_path)}),
            "is not a benchmark",
        ),
        ("subtasks", settings_of({**SMALL, "benchmarks": plain, "output_dir": str(tmp_path)}), "subtask=COLUMN"),
    ):
        with pytest.raises(ValueError, match=message):
            TABLES[name](Runs(settings))
    with pytest.raises(ValueError, match=r"latency\.clock must be one of wall, processor, got 'sun'"):
        settings_of({**SMALL, "latency": {"clock": "sun"}, "output_dir": str(tmp_path)})


# Numbers.


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"data": "pocket:easy_vqa"}, "easy-VQA needs its package"),
        ({"data": "pocket:rulez"}, "unknown pocket suite 'rulez'"),
        ({"data": "nowhere.jsonl"}, "no such file or folder: nowhere.jsonl"),
        ({"data": "pocket:late", "rewards": ["exakt"]}, "no reward 'exakt'"),
        pytest.param(
            {"task": "vismem_nothing"}, "no task 'vismem_nothing'", marks=pytest.mark.xdist_group("lmms")
        ),  # with the other tests that need lmms-eval's index
    ],
)
@pytest.mark.parametrize("section", ["benchmarks", "partial"])
def test_a_dry_run_checks_all_benchmarks_first(tmp_path, capfd, monkeypatch, section, more, message):
    if "task" in more:
        from lmms_tasks import keep_own_index

        keep_own_index(monkeypatch)
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    easyvqa.questions.cache_clear()
    monkeypatch.setattr(Runs, "load", lambda *_: pytest.fail("nothing should be loaded"))
    monkeypatch.setattr(vismem.evaluation.runs, "train", lambda *_, **__: pytest.fail("nothing should be trained"))
    benchmarks = [SMALL["benchmarks"][1], {"name": "last", **more}]
    values = {**SMALL, "partial": {**TRAINED["partial"], "benchmarks": []}, "output_dir": str(tmp_path / "out")}
    if section == "partial":
        values["partial"]["benchmarks"] = benchmarks
    else:
        values["benchmarks"] = benchmarks
    (tmp_path / "e.yaml").write_text(json.dumps(values))
    tables = ["main", "partial"] if section == "partial" else ["main"]
    assert command_line(["eval", "tables", *tables, str(tmp_path / "e.yaml")]) == (2 if "reward" in message else 1)
    error = next(line for line in capfd.readouterr().err.splitlines() if "vismem: error:" in line)
    assert error.startswith(f"vismem: error: {message}")
    assert not (tmp_path / "out").exists()


def test_finished_answers_need_no_rewards_or_tasks(tmp_path, monkeypatch):
    """With all answers saved, rewards, policies and tasks are not needed."""
    values = {**SMALL, "output_dir": str(tmp_path), "methods": [{"name": "vanilla"}]}
    runs = Runs(settings_of({**values, "benchmarks": [{"name": "a", "data": "pocket:in_view", "limit": 2}]}))
    (benchmark,), (method,) = runs.settings.benchmarks, runs.settings.methods
    monkeypatch.setattr(vismem.evaluation.runs, "load_rewards", lambda spec: pytest.fail("no reward is needed"))
    runs.file(method, benchmark, None).add([record(row.id) for row in runs.rows(benchmark)])
    runs.check(method, benchmark, None)
    task = replace(benchmark, name="b", data="", task="vismem_nothing")
    runs.file(method, task, None).add([record("x")])
    runs.check(method, task, None)


def test_errors_start_on_their_own_line(tmp_path, capfd, monkeypatch):
    def fail(*_):
        raise ValueError("the lights went out")

    monkeypatch.setattr(Runs, "load", fail)
    (tmp_path / "e.yaml").write_text(json.dumps({**SMALL, "output_dir": str(tmp_path / "out")}))
    assert command_line(["eval", "tables", "main", str(tmp_path / "e.yaml")]) == 1
    assert "vismem: error: the lights went out" in capfd.readouterr().err.split("\n")
    assert not (tmp_path / "out" / "answers").exists()


def test_forgetting_counts_losses_since_the_stage():
    def answers(values):
        return [[record(str(i), v) for i, v in enumerate(values)]]

    known = {("m1", "a"): answers([1, 1, 1, 1]), ("m2", "a"): answers([1, 0, 0, 0]), ("m2", "b"): answers([1, 1, 1, 1])}
    (cell,) = forgetting(known, ["m1", "m2"], ["a", "b"], ["a", "b"])
    assert (cell.row, cell.column, cell.value, cell.seeds) == ("m2", "forgotten", 0.75, [0.75])
    assert forgetting(known, ["m1", "m2"], ["x", "b"], ["a", "b"]) == []


def test_a_grid_shows_values_with_intervals_and_units():
    table = Table(
        "t", "T", "P", ["a", "b", "c"], ["x", "time"], [measured("a", "x", [[1, 0], [1, 1]]), Cell("b", "time", 2.0)]
    )
    table.units = {"time": "{:.1f} s"}
    assert table.cell("a", "x").seeds == [0.5, 1.0] and table.cell("a", "x").value == 0.75
    lines = grid(table).splitlines()
    assert lines[2].startswith("| a | 75.0 [") and lines[3] == "| b |  | 2.0 s |" and len(lines) == 4
    assert averaged("r", "c", [[[1.0], [0.0]], [[1.0], [1.0]]]).seeds == [1.0, 0.5]


def test_relative_positions_go_from_0_to_1():
    found = record("a", invocations=[{"kind": "short", "position": 0}, {"kind": "long", "position": 3}])
    assert relative([found], "short") == [0.0] and relative([found], "long") == [1.0]


def test_slugs_are_safe_names():
    assert slug("LoRA, supervised then GRPO (x/y)") == "lora-supervised-then-grpo-x-y"
