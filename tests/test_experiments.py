"""The scripts in `experiments/runs` parse, and every `vismem` command in them is valid; nothing is run."""

from __future__ import annotations

import re
import shlex
import subprocess

import documents
import pytest
from test_docs import check_ours

SCRIPTS = sorted((documents.ROOT / "experiments" / "runs").glob("*.sh"))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_commands_of_a_script_are_valid(script, monkeypatch):
    monkeypatch.chdir(documents.ROOT)
    subprocess.run(["bash", "-n", script], check=True)
    lines = [line.strip() for line in script.read_text(encoding="utf-8").splitlines()]
    commands = [re.sub(r"\$\w+", "late", line) for line in lines if line.startswith("vismem ")]
    assert commands
    for command in commands:
        check_ours(shlex.split(command)[1:], f"{script.name}: {command}")


def test_every_script_is_in_the_readme():
    text = (documents.ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"`runs/(\w+)\.sh`", text) and set(re.findall(r"`runs/(\w+)\.sh`", text)) == {
        script.stem for script in SCRIPTS
    }
