"""The examples run as they are, offline."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(("name", "lines"), [("ask", 3), ("many", 16)])
def test_examples(name, lines):
    ran = subprocess.run([sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    said = ran.stdout.splitlines()
    assert len(said) == lines
    if name == "many":
        assert any("row 1 cost with its promotion?" in line and "So 27." in line for line in said)
