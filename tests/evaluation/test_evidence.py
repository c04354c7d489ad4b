"""Evidence: pages show the tables in `results/`, and those tables follow from the saved answers."""

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

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "results" / "evaluation"


def filling():
    spec = importlib.util.spec_from_file_location("fill_tables", ROOT / "docs" / "fill_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_show_the_saved_tables():
    module = filling()
    texts = [page.read_text(encoding="utf-8") for page in module.PAGES]
    assert [module.filled(text) for text in texts] == texts, "run: python docs/fill_tables.py"
    named = {found["file"] for text in texts for found in module.PLACE.finditer(text)}
    assert {f"results/evaluation/{name}.json" for name in TABLES} <= named


def runs_of(folder, place, file, given):
    """Runs on a copy of the saved answers."""
    shutil.copytree(folder / "answers", place / "answers")
    return Runs(load_settings(file, [*given, f"output_dir={place}"]))


@pytest.fixture(scope="module")
def of_pocket(tmp_path_factory):
    """The runs behind all tables but the stages'; they read their questions once."""
    return runs_of(RESULTS, tmp_path_factory.mktemp("evidence"), None, ["preset=pocket"])


@pytest.mark.xdist_group("evidence")
@pytest.mark.parametrize("name", [*TABLES, "stages"])
def test_tables_follow_from_the_saved_answers(name, of_pocket, tmp_path, monkeypatch):
    """Without weights or training, each table is remade from answers alone, cell for cell."""
    monkeypatch.setattr(Runs, "load", lambda *_: pytest.fail("a model was asked for"))
    runs, folder = of_pocket, RESULTS
    if name == "stages":
        name, folder = "main", ROOT / "results" / "stages"
        runs = runs_of(folder, tmp_path, ROOT / "configs" / "pocket-stages.yaml", [])
    write(TABLES[name](runs), tmp_path, "")
    assert read(tmp_path / f"{name}.json") == read(folder / f"{name}.json")


def test_results_name_their_commands():
    for path in RESULTS.glob("*.json"):
        assert json.loads(path.read_text())["command"] == f"vismem eval tables {path.stem} preset=pocket"
    stages = json.loads((ROOT / "results" / "stages" / "main.json").read_text())
    assert stages["command"] == "vismem eval tables main configs/pocket-stages.yaml"
