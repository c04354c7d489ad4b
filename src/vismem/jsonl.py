"""JSON Lines as this package writes them: one object a line, split at `\\n` alone, safe to append to after a crash.

Texts may hold U+2028, U+0085 and other characters that `str.splitlines` takes for line ends, so files are read as
bytes. A process that dies while it appends leaves a cut last line; readers drop it, and the next append replaces it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from vismem.files import disk_errors, write_bytes


class BrokenLineError(ValueError):
    """A line, other than a cut last one, that is no JSON object; names file and line."""


def read(path: str | Path) -> list[dict[str, Any]]:
    """The whole objects of a file. A cut last line is left out, and blank lines are skipped.

    Raises:
        BrokenLineError: if any other line is no JSON object.
    """
    path = Path(path)
    lines, found = path.read_bytes().split(b"\n"), []
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # also of bytes that are not UTF-8
            if number == last:
                break
            raise BrokenLineError(f"{path}, line {number} is not JSON ({error}); repair or delete the file") from error
        if not isinstance(entry, dict):
            raise BrokenLineError(f"{path}, line {number} is not a JSON object; repair or delete the file")
        found.append(entry)
    return found


def dumps(entries: Iterable[dict[str, Any]]) -> bytes:
    """Objects as lines of UTF-8."""
    return b"".join(_dumped(entry) + b"\n" for entry in entries)


def _dumped(entry: dict[str, Any]) -> bytes:
    try:
        return json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(entry).encode()


def write(path: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Writes a whole file, unless it holds these lines already."""
    path, content = Path(path), dumps(entries)
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)


def append(path: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Adds objects to the end of a file, on lines of their own; makes the file if need be, and drops a cut last line.

    Raises:
        DiskFullError: if there is no room.
    """
    path, content = Path(path), dumps(entries)
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            start, line = _last_line(file)
            if line and not _is_whole(line):
                file.truncate(start)
            elif line and not line.endswith(b"\n"):
                content = b"\n" + content
            file.write(content)


def _last_line(file: BinaryIO) -> tuple[int, bytes]:
    """Offset and content of the last line of a file."""
    end, size = file.seek(0, os.SEEK_END), 2**16
    while True:
        start = max(end - size, 0)
        file.seek(start)
        piece = file.read(end - start)
        cut = piece.rfind(b"\n", 0, -1)
        if cut >= 0 or not start:
            return start + cut + 1, piece[cut + 1 :]
        size *= 2


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False
