"""Sources of raw rows: JSON Lines by byte offset, tables (lists and `datasets`), and streams.

A source yields raw dictionaries and their ids; its reader decides which rows are good. `datasets` is imported only
when needed, so JSON files work without it.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset

from vismem.data.layouts import ANSWERS, CONVERSATIONS, LABELS, PROMPTS, REPLIES, missing
from vismem.data.rows import BadDataError, BadRowError

FILES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
_CHUNK = 2**20  # bytes
_MAX_ELEMENT = 2**28  # characters of an element of a JSON array


@dataclass(frozen=True)
class JsonLines:
    """A file with one JSON object per line. Keys are byte offsets; numbers are line numbers, from 1."""

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
        """The content at an offset, or a BadRowError."""
        with self.path.open("rb") as file:  # opened each time: safe in threads, forks and after pickling
            file.seek(key)
            return _object(file.readline())

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        """Yields each line's offset and number, and its content or a BadRowError."""
        offset = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if text.strip():
                    yield offset + len(line) - len(text), number, _object(text)
                offset += len(line)


def _object(line: bytes) -> Any:
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadRowError(f"not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return BadRowError(f"not valid JSON: {error}")


@dataclass(frozen=True)
class Table:
    """A list of dictionaries, a `datasets.Dataset`, or a torch dataset of `Row`s. Keys and numbers are indices.

    `trusted`: rows are created on access, so they are not scanned first.
    """

    rows: Any
    name: str
    folder: Path
    trusted: bool = False

    def row_id(self, number: int) -> str:
        return f"{self.name}[{number}]"

    def fetch(self, key: int) -> Any:
        """The row at an index, or a BadRowError."""
        try:
            return self.rows[key]
        except Exception as error:  # a dataset's decoders and transforms raise any type
            return BadRowError(f"cannot be read: {type(error).__name__}: {error}")

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        """Yields each row's index, twice, and its content or a BadRowError; does not decode images."""
        plain = not hasattr(self.rows, "features") or _transforms(self.rows)
        rows = map(self.fetch, range(len(self.rows))) if plain else _without_bytes(self.rows)
        for index, row in enumerate(rows):
            yield index, index, row


@dataclass(frozen=True)
class Stream:
    """Rows that can only be read in order. `shards_itself`: it gives each DataLoader worker its own share."""

    rows: Iterable[Any]
    name: str
    folder: Path
    shards_itself: bool = False

    def row_id(self, number: int) -> str:
        return f"{self.name}[{number}]"

    def scan(self) -> Iterator[tuple[int, int, Any]]:
        """Yields each row's index, twice, and its content."""
        for index, row in enumerate(self.rows):
            yield index, index, row


@dataclass(frozen=True)
class JsonArray:
    """A file with one JSON array of objects, read in chunks."""

    path: Path

    def __iter__(self) -> Iterator[Any]:
        """Yields each element, or a BadRowError for one that cannot be parsed. Invalid UTF-8 becomes surrogates."""
        decoder, done = json.JSONDecoder(), False
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read(_CHUNK).lstrip()[1:]  # without the opening bracket
            while not (text := text.lstrip(" \t\r\n,")).startswith("]"):
                found, end = None, 0
                try:
                    found, end = decoder.raw_decode(text)
                except RecursionError:
                    found, end = BadRowError("nested too deeply to be read"), _end_of(text)
                except json.JSONDecodeError as error:
                    if done or len(text) > _MAX_ELEMENT:
                        raise BadDataError(f"{self.path} is not a complete JSON array: {error}") from error
                except ValueError as error:  # Python limits the digits of an integer
                    found, end = BadRowError(f"not valid JSON: {error}"), _end_of(text)
                if end and (end < len(text) or done):  # a number at the end may continue
                    yield found
                    text = text[end:]
                elif done:
                    raise BadDataError(f"{self.path} is not a complete JSON array: it ends within an element")
                else:
                    piece = file.read(max(_CHUNK, len(text)))
                    done, text = not piece, text + piece


def _end_of(text: str) -> int:
    """Index after the JSON object or array at the start of `text`; 0 if it is incomplete."""
    depth = 0
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[\[\]{}]', text, re.DOTALL):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found.group(), 0)
        if not depth:
            return found.end()
    return 0


def find_source(
    source: Any, split: str, *, streaming: bool, columns: Mapping[str, str] | None = None
) -> JsonLines | Table | Stream:
    """The source for a path, a hub name, a dataset or a list; arguments and errors as for `load_dataset_rows`."""
    if isinstance(source, (str, Path)):
        found = _from_name(str(source), split, streaming=streaming)
    elif isinstance(source, Mapping):  # a DatasetDict
        return find_source(_split_of(source, split, "the dataset"), split, streaming=streaming, columns=columns)
    elif hasattr(source, "column_names"):
        found = _table(source, str(getattr(source, "split", None) or "dataset"), Path())
    elif isinstance(source, (list, tuple)):
        found = Table(source, "rows", Path())
    elif hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        found = Table(source, "rows", Path(), trusted=True)
    elif isinstance(source, IterableDataset):
        found = Stream(source, "rows", Path())
    else:
        raise BadDataError(
            f"cannot read rows from {type(source).__name__}; give a path, a hub name, a datasets.Dataset, or a list"
        )
    if not isinstance(found, JsonLines) and hasattr(found.rows, "column_names"):
        found = _prepare(found, columns or {})
    return Stream(found.rows, found.name, found.folder) if streaming and isinstance(found, Table) else found


def _from_name(source: str, split: str, *, streaming: bool) -> JsonLines | Table | Stream:
    path = Path(source).expanduser()
    folder = path.absolute().parent
    if path.is_dir():
        if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
            raise BadDataError(f"the folder {path} was not written by datasets.save_to_disk; name a file in it instead")
        found = _datasets(f"reading {path}").load_from_disk(str(path))
        return _table(_split_of(found, split, str(path)) if isinstance(found, Mapping) else found, path.name, path)
    if path.is_file():
        if path.suffix not in FILES:
            raise BadDataError(f"{path} has an unsupported type; rows are read from {', '.join(FILES)} files")
        if path.suffix == ".parquet":
            datasets = _datasets(f"reading {path}")
            try:
                found = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=streaming)
            except Exception as error:  # errors of pyarrow and datasets
                raise BadDataError(f"cannot read {path}: {error}") from error
            return _table(found, path.name, folder)
        if path.suffix == ".json" and _first_byte(path) == b"[":
            rows = JsonArray(path)
            return Stream(rows, path.name, folder) if streaming else Table(list(rows), path.name, folder)
        return JsonLines(path)
    if path.suffix in FILES or path.is_absolute() or not _HUB_NAME.fullmatch(source):
        raise BadDataError(f"no such file or folder: {source}")
    datasets = _datasets(f"loading {source} from the hub, as there is no such local file,")
    name, _, config = source.partition(":")
    try:
        found = datasets.load_dataset(name, config or None, split=split, streaming=streaming)
    except Exception as error:  # no network; no such dataset, config or split
        reason = " ".join(str(error).split())
        raise BadDataError(
            f"no local file {source}, and the hub dataset {name} (config {config or 'default'}, split {split}) "
            f"cannot be loaded: {reason}"
        ) from error
    return _table(found, source, Path())


def _datasets(needed_for: str) -> Any:
    """The package `datasets`."""
    try:
        import datasets
    except ImportError as error:
        raise BadDataError(f"{needed_for} needs the package datasets: pip install 'vismem[train]'") from error
    return datasets


def _first_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_CHUNK).removeprefix(codecs.BOM_UTF8).lstrip()[:1]


def _split_of(splits: Mapping[str, Any], split: str, where: str) -> Any:
    if split not in splits:
        raise BadDataError(f"{where} has no split {split!r}; it has {', '.join(map(str, splits))}")
    return splits[split]


def _table(dataset: Any, name: str, folder: Path) -> Table | Stream:
    return Table(dataset, name, folder) if hasattr(dataset, "__len__") else Stream(dataset, name, folder)


def _prepare(found: Table | Stream, columns: Mapping[str, str]) -> Table | Stream:
    """Makes a datasets.Dataset or IterableDataset yield plain values and encoded images: a broken one is one bad row.

    Raises BadDataError if it has no prompt column or no answer column.
    """
    dataset: Any = found.rows
    if _transforms(dataset):  # only the transform knows its columns
        return found
    names = list(dataset.column_names or [])
    theirs = {*columns.values()}
    known = {*columns} | ({*names} - theirs) if theirs <= {*names} else set()
    answers = (*ANSWERS, *LABELS, *CONVERSATIONS, "reward_model", "completion", "response", *REPLIES.values())
    for what, likely in (("prompt", PROMPTS), ("answer", answers)):
        if known and known.isdisjoint(likely):
            raise BadDataError(f"{found.name}: {missing(what, names).replace('the row has', 'its columns are')}")
    if isinstance(found, Table):
        dataset = dataset.with_format(None)
    for name in {*columns.values(), *PROMPTS, "images", "image"} & {*names}:
        feature = (dataset.features or {}).get(name)
        encoded = _encoded(feature)
        if encoded != feature:
            dataset = dataset.cast_column(name, encoded)
    if isinstance(found, Table):
        return replace(found, rows=dataset)
    return replace(found, rows=dataset, shards_itself=True)


def _transforms(dataset: Any) -> bool:
    """Whether a user's transform creates the rows."""
    return (getattr(dataset, "format", None) or {}).get("type") == "custom"


def _encoded(feature: Any) -> Any:
    """The same feature with images, at any depth, left encoded."""
    from datasets import Image, List

    if isinstance(feature, Image):
        return Image(decode=False)
    if isinstance(feature, List):
        return List(_encoded(feature.feature), length=feature.length)
    if isinstance(feature, dict):
        return {name: _encoded(inner) for name, inner in feature.items()}
    return feature


def _without_bytes(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yields a dataset's rows, with a placeholder for every image that is stored as bytes."""
    from datasets import Image

    def is_image(feature: Any) -> bool:
        return isinstance(feature, Image) or (isinstance(feature, dict) and {*feature} == {"bytes", "path"})

    features = dataset.features.items()
    images = [name for name, one in features if is_image(one) or is_image(getattr(one, "feature", None))]
    texts = dataset.remove_columns(images)
    rows = iter(texts) if texts.column_names else ({} for _ in range(len(dataset)))
    columns = [_paths(dataset, name) for name in images]
    for row, *values in zip(rows, *columns, strict=True):
        yield {**row, **dict(zip(images, values, strict=True))}


def _paths(dataset: Any, column: str) -> Iterator[Any]:
    """Yields each row's image or images: `{"path": ...}` for files, b"" for stored bytes, which are not read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for batch in dataset.select_columns([column]).with_format("arrow").iter(1000):
        values = batch.column(column).combine_chunks()
        several = not pa.types.is_struct(values.type)
        inner = values.flatten() if several else values
        held = pc.is_valid(pc.struct_field(inner, "bytes")).to_pylist()
        paths = pc.struct_field(inner, "path").to_pylist()
        found = iter(
            b"" if own else None if path is None else {"path": path} for own, path in zip(held, paths, strict=True)
        )
        if several:
            for length in values.value_lengths().to_pylist():
                yield None if length is None else [next(found) for _ in range(length)]
        else:
            yield from found
