"""`experiments/`: its scripts parse, every `vismem` command in them is valid, and merged answers are complete."""

from __future__ import annotations

import json
import re
import shlex
import subprocess

import documents
import pytest
from test_docs import check_ours

import merge_answers
from vismem import jsonl
from vismem.evaluation.records import Record, RecordFile, merged_answers

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


def test_merged_answers_are_read_and_can_be_added_to(tmp_path):
    """Merging loses nothing; a file of its own is written once there is more, and then takes precedence."""
    paths = [tmp_path / method / "late-off-base.jsonl" for method in ("vanilla", "vismem")]
    records = [Record(f"q{number}", 1.0, "red", 3, 3, columns={"task": "colour"}) for number in range(3)]
    for path in paths:
        RecordFile(path, {"method": path.parent.name}).add(records[:2])
    contents = [path.read_bytes() for path in paths]
    files = [(path, RecordFile(path, {"method": path.parent.name})) for path in paths]
    lines = [line for each in files for line in merge_answers.columns(*each)]
    for path in paths:
        path.unlink()
    jsonl.write(tmp_path / "main.jsonl", lines)

    merged = merged_answers(tmp_path)
    assert [jsonl.dumps(merged[path].lines) for path in paths] == contents
    file = RecordFile(paths[0], {"method": "vanilla"}, merged[paths[0]])
    assert list(file.records.values()) == records[:2] and not paths[0].exists()
    with pytest.raises(ValueError, match=r"main\.jsonl holds answers with method='vanilla'"):
        RecordFile(paths[0], {"method": "other"}, merged[paths[0]])
    file.add(records[2:])
    again = RecordFile(paths[0], {"method": "vanilla"}, merged_answers(tmp_path)[paths[0]])
    assert list(again.records.values()) == records and paths[0].read_bytes().startswith(contents[0])

    (tmp_path / "main.jsonl").write_text(json.dumps({"id": "q0"}))
    with pytest.raises(ValueError, match="without method and answers"):
        merged_answers(tmp_path)
