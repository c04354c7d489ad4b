"""JSON Lines: one object per line, split at `\\n` only, safe to append to after a crash.

Files are read as bytes, because text may contain U+2028, U+0085 and other characters that `str.splitlines` splits at.
A process killed while appending leaves a truncated last line; readers ignore it, and the next append replaces it.
"""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from vismem.files import disk_errors, write_bytes


class BrokenLineError(ValueError):
    """A line other than a truncated last one is not a JSON object; names file and line."""


def read(path: str | Path) -> list[dict[str, Any]]:
    """Reads a file's objects. Skips blank lines and a truncated last line.

    Raises:
        BrokenLineError: if any other line is not a JSON object.
    """
    path = Path(path)
    lines = [(number, line) for number, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
    found = []
    for number, line in lines:
        try:
            entry = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # ValueError includes invalid UTF-8
            if number == lines[-1][0]:
                break
            raise BrokenLineError(f"{path}, line {number} is not JSON ({error}); repair or delete the file") from error
        if not isinstance(entry, dict):
            raise BrokenLineError(f"{path}, line {number} is not a JSON object; repair or delete the file")
        found.append(entry)
    return found


def dumps(entries: Iterable[dict[str, Any]]) -> bytes:
    """Encodes objects as lines of UTF-8."""
    return b"".join(_encode(entry) + b"\n" for entry in entries)


def _encode(entry: dict[str, Any]) -> bytes:
    try:
        return json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(entry).encode()


def write(path: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Replaces a file atomically, unless its content is the same."""
    path, content = Path(path), dumps(entries)
    if not path.is_file() or path.read_bytes() != content:
        write_bytes(path, content)


def append(path: str | Path, entries: Iterable[dict[str, Any]]) -> None:
    """Appends objects to a file, creating it if necessary; drops a truncated last line first.

    Raises:
        DiskFullError: if the disk is full.
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
    """Offset and content of a file's last line."""
    if not file.seek(0, os.SEEK_END):
        return 0, b""
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = content.rfind(b"\n", 0, len(content) - 1) + 1
        return start, content[start:]


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode()), dict)
    except (ValueError, RecursionError):
        return False
