"""The examples run as they are, offline."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parents[2] / "examples"
GALLERY = EXAMPLES.parent / "docs" / "gallery"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs an example as `python examples/NAME.py OPTIONS` does, but in this process; gives the lines it prints."""

    def run(name: str, *options: str) -> list[str]:
        script = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [script, *options])
        runpy.run_path(script, run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


@pytest.mark.parametrize(("name", "lines"), [("ask", 3), ("many", 16)])
def test_examples_run(run, name, lines):
    said = run(name)
    assert len(said) == lines
    if name == "many":
        assert any("row 1 cost with its promotion?" in line and "So 27." in line for line in said)


def test_evaluate_finds_that_memory_helps(run):
    said = "\n".join(run("evaluate"))
    without, with_memory = (
        float(re.search(rf"^{n} +([\d.]+) %", said, re.M)[1]) for n in ("without memory", "with memory")
    )
    difference = float(re.search(r"^difference +([+-][\d.]+) points", said, re.M)[1])
    assert difference == pytest.approx(with_memory - without, abs=0.11) and difference > 40
    moved = [float(kl) for kl in re.findall(r"KL of the next word ([\d.]+) nats", said)]
    assert len(moved) == 2 and min(moved) > 0.1
    shares = [float(share) for share in re.findall(r"attention to \w+ +([\d.]+) %", said)]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3)


def test_gallery_adds_an_example_that_fails(run, tmp_path):
    """One example, and the first after it that goes wrong."""
    said = run("gallery", "--examples", "1", "--out", str(tmp_path))
    page = (tmp_path / "index.md").read_text(encoding="utf-8")
    check_page(tmp_path)
    assert page.count("\n## ") == 2 and "first after them that did not is added" in page
    assert said[0].startswith("2 examples, 1 right with memory")
    assert "[◆short]" in page and "| without |" in page and "| reference |" in page


def test_the_gallery_in_the_documents_is_whole():
    check_page(GALLERY)
    page = (GALLERY / "index.md").read_text(encoding="utf-8")
    right = re.search(r"Of these (\d+), (\d+) are right", page)
    assert 6 <= int(right[1]) <= 9 and int(right[2]) < int(right[1])  # a failure is among them


def check_page(folder: Path) -> None:
    """Every picture that the page shows is there, can be opened, and is shown; all are small."""
    page = (folder / "index.md").read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", page)
    assert sorted(shown) == sorted(path.name for path in folder.glob("*.png"))
    assert len(shown) >= page.count("\n## ") > 0
    for name in shown:
        assert Image.open(folder / name).width > 300
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2**20
