"""The quickstart notebook runs from its first cell to its last, with fewer updates, and what it shows is small."""

from __future__ import annotations

import json
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_quickstart_runs_in_order(monkeypatch, capsys):
    monkeypatch.chdir(EXAMPLES)  # as Jupyter does
    monkeypatch.setenv("QUICKSTART_UPDATES", "2")
    names: dict = {"__name__": "__main__"}
    for number, cell in enumerate(CODE, 1):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)

    printed = capsys.readouterr().out
    assert "checked[●long] second free" in printed and "So 12." in printed
    assert names["maps"][0].shape == names["maps"][1].shape
    assert names["trainer"].state.global_step == 2 and len(names["losses"]) > 0


def test_the_saved_outputs_show_learning_and_are_small():
    printed = "".join(
        line for cell in CODE for output in cell["outputs"] for line in output.get("text", []) if "memory" in line
    )
    untrained, trained = (
        int(next(line.split()[-4] for line in printed.splitlines() if line.startswith(f"{name} memory")))
        for name in ("untrained", "trained")
    )
    assert trained > untrained + 10
    assert (EXAMPLES / "quickstart.ipynb").stat().st_size < 100 * 1024
