"""Merges the answers behind finished tables into one JSON Lines file per table, which `vismem eval tables` also reads.

Answers that several tables use go to the first of them. Every line gets the columns `method` and `answers`: the folder
and the name of the file it comes from, which is then deleted.

    python experiments/merge_answers.py preset=pocket
    python experiments/merge_answers.py configs/pocket-stages.yaml
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vismem import jsonl
from vismem.evaluation.records import RecordFile, plain
from vismem.evaluation.runs import Runs
from vismem.evaluation.settings import load_settings
from vismem.evaluation.tables import TABLES


class ReadingRuns(Runs):
    """Runs that only read answers, and remember which."""

    used: dict[Path, RecordFile]

    def file(self, *given: Any) -> RecordFile:
        found = super().file(*given)
        self.used.setdefault(found.path, found)
        return found

    def load(self, folder: Path | None) -> Any:
        raise SystemExit("answers are missing: make the tables first")


def merge(runs: ReadingRuns) -> list[Path]:
    """Writes the merged files of all tables in the output folder; returns their paths."""
    tables: dict[Path, dict[Path, RecordFile]] = {}
    taken: set[Path] = set()
    for name, table in TABLES.items():
        if (runs.answers.parent / f"{name}.json").is_file():
            runs.used = {}
            table(runs)
            tables[runs.answers / f"{name}.jsonl"] = {p: file for p, file in runs.used.items() if p not in taken}
            taken |= set(runs.used)
    for merged, files in tables.items():
        if files:
            jsonl.write(merged, [line for path, file in files.items() for line in columns(path, file)])
        else:
            merged.unlink(missing_ok=True)
    for path in taken:
        path.unlink(missing_ok=True)
        if path.parent.is_dir() and not any(path.parent.iterdir()):
            path.parent.rmdir()
    return [path for path, files in tables.items() if files]


def columns(path: Path, file: RecordFile) -> list[dict[str, Any]]:
    """The lines of a record file with the columns that say which file it is."""
    source = {"method": path.parent.name, "answers": path.stem}
    return [source | line for line in ({"settings": file.settings}, *map(plain, file.records.values()))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="as for `vismem eval tables`: FILE.yaml, key=value")
    words = parser.parse_args().settings
    file = None if "=" in words[0] else Path(words[0])
    settings = load_settings(file, words if file is None else words[1:])
    for path in merge(ReadingRuns(settings)):
        print(path)


if __name__ == "__main__":
    main()
