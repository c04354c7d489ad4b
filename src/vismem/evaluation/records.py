"""Records of answers, and the files that they are kept in: written as they come, and read again after a stop."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vismem import jsonl

ALWAYS = ("id", "score", "reply", "tokens", "sampled")


@dataclass(frozen=True)
class Record:
    """One answered question.

    Args:
        id: of its row.
        score: what the rewards gave.
        reply: the answer's text, without special tokens.
        tokens: new tokens, invocation and end tokens among them.
        sampled: how many of them were sampled.
        delimiters: places where memory might have been called for: ends of phrases, and sampled invocations.
        invocations: `kind`, `position` (index among the new tokens), `length` and `forced` of each, in order.
        finish: `"stop"`, `"length"` or `"error"`.
        columns: of the row, what tables group by.
        error: why there is no answer; the question then counts as wrong.
    """

    id: str
    score: float
    reply: str
    tokens: int
    sampled: int
    delimiters: int = 0
    invocations: list[dict[str, Any]] = field(default_factory=list)
    finish: str = "stop"
    columns: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @classmethod
    def failed(cls, row_id: str, error: str, columns: dict[str, Any] | None = None) -> Record:
        """The record of a question that could not be asked or answered."""
        return cls(row_id, 0.0, "", 0, 0, finish="error", columns=columns or {}, error=error)


USUAL = vars(Record("", 0.0, "", 0, 0))


@dataclass
class Merged:
    """The lines of one record file that was merged into another.

    Args:
        path: of the merged file.
        lines: the settings, then the records.
    """

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)


def merged_answers(folder: Path) -> dict[Path, Merged]:
    """Record files that were merged into one file per table, by the path that each would have on its own.

    A merged file `folder/TABLE.jsonl` has the lines of `folder/METHOD/ANSWERS.jsonl`, each with `method` and `answers`.
    `experiments/merge_answers.py` writes them.

    Raises:
        ValueError: if a line does not name its method and answers.
    """
    found: dict[Path, Merged] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in jsonl.read(path):
            try:
                place = folder / line.pop("method") / f"{line.pop('answers')}.jsonl"
            except (KeyError, TypeError) as error:
                raise ValueError(f"{path} holds a line without method and answers; delete the file") from error
            found.setdefault(place, Merged(path)).lines.append(line)
    return found


class RecordFile:
    """Records in a JSON Lines file: its first line holds the settings, every other one a record.

    Records of an earlier run are read; a last line that was cut off is dropped.

    Args:
        path: the file; it and its folder are created when the first records are added.
        settings: of the answers; plain values.
        merged: the same answers from `merged_answers`, read if there is no file at `path`.

    Raises:
        ValueError: if the file holds answers of other settings, or is no such file; names both.
    """

    def __init__(self, path: str | Path, settings: dict[str, Any], merged: Merged | None = None) -> None:
        self.path = Path(path)
        self.records: dict[str, Record] = {}
        self.settings = json.loads(json.dumps(settings))
        if self.path.is_file():
            self._read(self.path, jsonl.read(self.path))
            self._write()
        elif merged is not None:
            self._read(merged.path, merged.lines)

    def _read(self, source: Path, lines: list[dict[str, Any]]) -> None:
        if not lines:
            return
        check_settings(source, lines[0].get("settings"), self.settings)
        try:
            self.records = {entry["id"]: Record(**entry) for entry in lines[1:]}
        except (KeyError, TypeError) as error:
            raise ValueError(f"{source} holds a line that is no record ({error}); delete the file") from error

    @property
    def done(self) -> set[str]:
        """Ids of the answered questions."""
        return set(self.records)

    def add(self, records: Iterable[Record]) -> None:
        """Appends records."""
        if not self.path.is_file():
            self._write()
        new = list(records)
        jsonl.append(self.path, map(plain, new))
        self.records.update((record.id, record) for record in new)

    def add_all(self, records: Iterable[Record]) -> None:
        """Adds records that are of use only together: a process that dies meanwhile leaves none of them."""
        self.records.update((record.id, record) for record in records)
        self._write()

    def _write(self) -> None:
        """The whole file, where it is not as it should be."""
        jsonl.write(self.path, [{"settings": self.settings}, *map(plain, self.records.values())])


def plain(record: Record) -> dict[str, Any]:
    """A record for its file: what is as by default is left out."""
    return {name: value for name, value in vars(record).items() if name in ALWAYS or value != USUAL[name]}


def check_settings(path: Path, earlier: Any, settings: dict[str, Any]) -> None:
    """Refuses a file whose settings differ."""
    if not isinstance(earlier, dict):
        raise ValueError(f"{path} holds no record of settings; choose another output_dir, or delete the file")
    names = [name for name in {**earlier, **settings} if earlier.get(name) != settings.get(name)]
    if names:
        name = names[0]
        raise ValueError(
            f"{path} holds answers with {name}={earlier.get(name)!r}, not {settings.get(name)!r}; "
            "choose another output_dir, or delete the file to answer anew"
        )
