"""Crash-safe files: written to a temporary file in the same folder, flushed to disk, then renamed.

The package replaces files only with `replacing`: if the process is killed at any point, either the old or the new file
is there, complete. `write_pair` does the same for two files, the second with the first's checksum. A full disk
raises `DiskFullError`, and `locked` keeps two runs from writing to one folder.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

PARTIAL = ".partial"  # suffix of unfinished files
LOCK, OWNER = ".lock", ".lock.json"  # in a locked folder: filelock's file, and its holder
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # file systems without locks
FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file size limit exceeded"}


class DiskFullError(OSError):
    """The disk, a quota or a file size limit is exhausted; names the folder and its file system."""


class FolderInUseError(OSError):
    """Another run is writing to the folder; names its process and host."""


def partial_path(path: Path) -> Path:
    """The temporary path for the next version of `path`, in the same folder."""
    return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `path` if the block succeeds.

    Creates the folder if necessary. If the block raises, `path` is unchanged and the temporary file is removed.

    Raises:
        DiskFullError: if the disk is full.

    Example:
        >>> with replacing("plot.png") as partial:
        ...     figure.savefig(partial, format="png")
    """
    path = Path(path)
    partial = partial_path(path)
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            sync(partial)
            os.replace(partial, path)
        except BaseException:
            _unlink(partial)
            raise
        sync(path.parent)


def write_bytes(path: str | Path, content: bytes) -> None:
    """Replaces a file atomically."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Replaces a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Replaces a JSON file atomically."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_pair(first: tuple[Path, bytes], second: tuple[Path, bytes], fits: Callable[[bytes], bool]) -> None:
    """Replaces two files in one folder that belong together.

    If the process is killed at any point, the folder holds the old or the new pair: `first`, and a matching `second`
    either at its path or still at its temporary path. `read_matching` returns it.

    Args:
        first, second: path and new content of each.
        fits: whether some content of `second` matches the `first` currently on disk.
    """
    folder, pending = first[0].parent, partial_path(second[0])
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if pending.is_file() and fits(pending.read_bytes()):
            os.replace(pending, second[0])  # finishes an interrupted save
        try:
            for path, content in (first, second):
                partial_path(path).write_bytes(content)
                sync(partial_path(path))
        except BaseException:
            for path, _ in (first, second):
                _unlink(partial_path(path))
            raise
        sync(folder)
        for path, _ in (first, second):
            os.replace(partial_path(path), path)
        sync(folder)


def read_matching(path: Path, fits: Callable[[bytes], bool]) -> bytes | None:
    """Reads the second file of a pair: the version that fits the first, else whatever is at `path`.

    Returns None if there is neither, or only an unfinished version.
    """
    pending, current = _read(partial_path(path)), _read(path)  # in this order, as a save renames one to the other
    if pending is None:
        return current
    return pending if (current is None or not fits(current)) and fits(pending) else current


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def sync(path: Path) -> None:
    """Flushes a file, or a folder's entries, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # a file system that cannot flush a folder
        if not path.is_dir() or error.errno in FULL:
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def folders_with(folder: Path, name: str) -> list[Path]:
    """Folders one or two levels below `folder` that contain a file called `name`."""
    return sorted({path.parent for below in ("*", "*/*") for path in folder.glob(f"{below}/{name}")})


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


# Full disks.


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Converts the errors that libraries raise on a full disk to `DiskFullError`.

    torch and safetensors do not raise `OSError` for a failed write: safetensors quotes the error number, and after a
    failed `torch.save` a small write to the folder shows whether the disk is the cause.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _errno_of(folder, error)
        if number not in FULL:
            raise
        existing = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()), folder)
        mount = next(p for p in (existing, *existing.parents) if os.path.ismount(p) or p == p.parent)
        raise DiskFullError(f"{FULL[number]} on {mount} (writing to {folder})") from error


def _errno_of(folder: Path, error: Exception) -> int | None:
    """The error number behind a library's error, or None if it is not about writing."""
    if quoted := re.search(r"os error (\d+)", str(error)):  # safetensors
        return int(quoted[1])
    if "inline_container" not in str(error):  # torch.save, which does not report why a write failed
        return None
    probe = folder / f"probe{PARTIAL}"
    try:
        probe.write_bytes(b"\0" * 2**16)
        sync(probe)
    except OSError as full:
        return full.errno
    finally:
        _unlink(probe)
    return errno.EFBIG


# One run in a folder.


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Locks a folder against other processes and threads; reentrant.

    The kernel releases the lock when the process ends, so a killed run does not block the next one.

    Raises:
        FolderInUseError: immediately, if another run holds the lock.
    """
    from filelock import FileLock, Timeout

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock, owner = FileLock(folder.absolute() / LOCK, timeout=0, is_singleton=True), folder / OWNER
    try:
        lock.acquire()
    except Timeout as error:
        raise FolderInUseError(
            f"{folder} is in use by another run ({_holder(owner)}); wait for it, stop it, or choose another folder"
        ) from error
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in NO_LOCKS:
            raise
        log.warning("%s cannot be locked (%s); make sure that no other run writes to it", folder, error)
        yield
        return
    try:
        if lock.lock_counter == 1:
            write_json(owner, {"pid": os.getpid(), "host": socket.gethostname()})
        yield
    finally:
        if lock.lock_counter == 1:
            _unlink(owner)
        lock.release()


def _holder(owner: Path) -> str:
    try:
        holder = json.loads(owner.read_bytes())
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "process unknown"
