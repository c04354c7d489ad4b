"""Where rows come from: JSON Lines by byte offset, and tables (lists and `datasets`), each as raw dictionaries.

A source names its rows and hands them out; whether a row is good is decided by its reader. `datasets` is imported
only for what needs it, so that JSON files work without it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismem.data.rows import BadDataError, BadRow, read_row, read_text

FILES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_CHUNK = 2**20
_LONGEST = 2**28


def missing(package: str, needed_for: str) -> BadDataError:
    return BadDataError(f"{needed_for} needs the package {package}: pip install 'vismem[train]'")


def _object(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not valid JSON: {error}") from error


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object a line. Keys are byte offsets, numbers are line numbers from 1."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def folder(self) -> Path:
        return self.path.absolute().parent

    def row_id(self, number: int) -> str:
        return f"{self.name}:{number}"

    def fetch(self, key: int) -> Any:
        with self.path.open("rb") as file:  # opened each time: safe in threads, forks and after pickling
            file.seek(key)
            return _object(file.readline())

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        with self.path.open("rb") as file:
            offset = 0
            for number, line in enumerate(file, start=1):
                start = offset + 3 if number == 1 and line.startswith(b"\xef\xbb\xbf") else offset
                text = line[start - offset :]
                if text.strip():
                    yield number, start, text
                offset += len(line)

    def scan(self) -> Iterator[tuple[int, int, str | None]]:
        """Each line's offset and number, and what is wrong with it but for its images."""
        for number, offset, line in self._lines():
            try:
                read_row(_object(line))
                yield offset, number, None
            except BadRow as error:
                yield offset, number, str(error)

    def stream(self) -> Iterator[tuple[int, Any]]:
        """Each line's number, and its content or a BadRow."""
        for number, _, line in self._lines():
            try:
                yield number, _object(line)
            except BadRow as error:
                yield number, error


@dataclass(frozen=True)
class Table:
    """A list of dictionaries or a `datasets.Dataset`. Keys and numbers are indices."""

    rows: Any
    name: str
    folder: Path

    def row_id(self, number: int) -> str:
        return f"{self.name}[{number}]"

    def fetch(self, key: int) -> Any:
        return self.rows[key]

    def scan(self) -> Iterator[tuple[int, int, str | None]]:
        """Each row's index and what is wrong with it; a dataset's image columns are left for later, for speed."""
        rows: Any = self.rows
        check: Callable[[Any], object] = read_row
        if hasattr(rows, "select_columns"):
            names = [name for name in ("prompt", "answer", "completion") if name in rows.column_names]
            absent = {"prompt", "answer"} - set(names)
            if absent:
                raise BadDataError(f"{self.name} has no column {min(absent)!r}; it has {', '.join(rows.column_names)}")
            rows, check = rows.select_columns(names), read_text
        for index, raw in enumerate(rows):
            try:
                check(raw)
                yield index, index, None
            except BadRow as error:
                yield index, index, str(error)

    def stream(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self.rows)


@dataclass(frozen=True)
class Stream:
    """Rows that can only be read in order. `shards_itself`: it gives each DataLoader worker its own part."""

    rows: Iterable[Any]
    name: str
    folder: Path
    shards_itself: bool = False

    def row_id(self, number: int) -> str:
        return f"{self.name}[{number}]"

    def stream(self) -> Iterator[tuple[int, Any]]:
        yield from enumerate(self.rows)


@dataclass(frozen=True)
class JsonArray:
    """A file that is one JSON array of objects, read piece by piece."""

    path: Path

    def __iter__(self) -> Iterator[Any]:
        decoder, text, done, started = json.JSONDecoder(), "", False, False
        with self.path.open(encoding="utf-8-sig") as file:
            while True:
                text = text.lstrip(" \t\r\n," if started else " \t\r\n")
                if started and text.startswith("]"):
                    return
                if not started and text:
                    started, text = True, text[1:]
                    continue
                found, end = None, 0
                try:
                    found, end = decoder.raw_decode(text)
                except (json.JSONDecodeError, RecursionError) as error:
                    if done or len(text) > _LONGEST:
                        raise BadDataError(f"{self.path} is not a whole JSON array: {error}") from error
                if end and (end < len(text) or done):  # a number at the very end might go on
                    yield found
                    text = text[end:]
                    continue
                piece = file.read(max(_CHUNK, len(text)))
                done, text = not piece, text + piece


def find_source(source: Any, split: str, streaming: bool) -> JsonLines | Table | Stream:
    """The source behind what a user named.

    Raises:
        BadDataError: if there is no such file or dataset, or it is of no known kind; the message says what is.
    """
    if isinstance(source, (str, Path)):
        return _named(str(source), split, streaming)
    if isinstance(source, (list, tuple)):
        return Table(source, "rows", Path())
    if isinstance(source, Mapping):  # a DatasetDict
        return find_source(_split_of(source, split, "the dataset"), split, streaming)
    if hasattr(source, "column_names"):
        return _dataset(source, str(getattr(source, "split", None) or "dataset"), Path())
    raise BadDataError(
        f"cannot read rows from {type(source).__name__}; give a path, a hub name, a datasets.Dataset, or a list"
    )


def _named(source: str, split: str, streaming: bool) -> JsonLines | Table | Stream:
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, split)
    if path.is_file():
        if path.suffix not in FILES:
            raise BadDataError(f"{path} is of no known kind; rows are read from {', '.join(FILES)} files")
        if path.suffix == ".parquet":
            return _parquet(path, streaming)
        if path.suffix == ".json" and _first_byte(path) == b"[":
            rows = JsonArray(path)
            return Stream(rows, path.name, path.absolute().parent) if streaming else _whole(rows)
        return JsonLines(path)
    if path.suffix in FILES or path.is_absolute() or not _HUB_NAME.fullmatch(source):
        raise BadDataError(f"no such file or folder: {source}")
    return _hub(source, split, streaming)


def _whole(rows: JsonArray) -> Table:
    try:
        return Table(list(rows), rows.path.name, rows.path.absolute().parent)
    except UnicodeDecodeError as error:
        raise BadDataError(f"{rows.path} is not UTF-8: {error}") from error


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_CHUNK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]


def _folder(path: Path, split: str) -> Table | Stream:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise BadDataError(f"the folder {path} is not one of datasets.save_to_disk; name a file in it instead")
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise missing("datasets", f"reading {path}") from error
    found = load_from_disk(str(path))
    if isinstance(found, Mapping):
        found = _split_of(found, split, str(path))
    return _dataset(found, path.name, path)


def _parquet(path: Path, streaming: bool) -> Table | Stream:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing("datasets", f"reading {path}") from error
    try:
        found = load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
    except Exception as error:  # pyarrow's and datasets' own kinds
        raise BadDataError(f"cannot read {path}: {error}") from error
    return _dataset(found, path.name, path.absolute().parent)


def _hub(source: str, split: str, streaming: bool) -> Table | Stream:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise missing("datasets", f"loading {source}, which is no file here and so taken for a hub dataset,") from error
    name, _, config = source.partition(":")
    try:
        found = load_dataset(name, config or None, split=split, streaming=streaming)
    except Exception as error:  # of many kinds: no network, no such dataset, config or split
        reason = " ".join(str(error).split())
        raise BadDataError(
            f"no file {source} here, and the hub dataset {name} (config {config or 'default'}, split {split}) "
            f"cannot be loaded: {reason}"
        ) from error
    return _dataset(found, source, Path())


def _split_of(splits: Mapping[str, Any], split: str, where: str) -> Any:
    if split not in splits:
        raise BadDataError(f"{where} has no split {split!r}; it has {', '.join(map(str, splits))}")
    return splits[split]


def _dataset(dataset: Any, name: str, folder: Path) -> Table | Stream:
    """A datasets.Dataset or IterableDataset whose images stay encoded, so that a broken one is one row's problem."""
    from datasets import Image, List

    for column in ("images", "image"):
        feature = (dataset.features or {}).get(column)
        inner = getattr(feature, "feature", None)
        if isinstance(feature, Image):
            dataset = dataset.cast_column(column, Image(decode=False))
        elif isinstance(inner, Image):
            dataset = dataset.cast_column(column, List(Image(decode=False)))
    if hasattr(dataset, "__len__"):
        return Table(dataset, name, folder)
    return Stream(dataset, name, folder, shards_itself=True)
