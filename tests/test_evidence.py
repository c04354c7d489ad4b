"""Evidence: what the page shows is what `results/` has, and what `results/` has follows from the kept answers."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from vismem.evaluation.runs import Runs
from vismem.evaluation.settings import load_settings
from vismem.evaluation.tables import TABLES
from vismem.evaluation.tables.layout import read, write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "evaluation"


def filling():
    spec = importlib.util.spec_from_file_location("fill_evidence", ROOT / "docs" / "fill_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_of_the_results():
    module = filling()
    text = module.PAGE.read_text(encoding="utf-8")
    assert module.filled(text) == text, "run: python docs/fill_evidence.py"
    named = {found["file"] for found in module.PLACE.finditer(text)}
    assert {f"results/evaluation/{name}.json" for name in TABLES} <= named


@pytest.mark.parametrize("name", TABLES)
def test_tables_follow_from_the_kept_answers(name, tmp_path, monkeypatch):
    """Neither weights nor training: each table is made again from answers alone, cell for cell."""
    shutil.copytree(RESULTS / "answers", tmp_path / "answers")
    monkeypatch.setattr(Runs, "load", lambda *_: pytest.fail("a model was asked for"))
    settings = load_settings(None, ["preset=pocket", f"output_dir={tmp_path}"])
    table = TABLES[name](Runs(settings))
    write(table, tmp_path, "")
    assert read(tmp_path / f"{name}.json") == read(RESULTS / f"{name}.json")


def test_results_name_their_commands():
    for path in RESULTS.glob("*.json"):
        assert json.loads(path.read_text())["command"] == f"vismem eval tables {path.stem} preset=pocket"
