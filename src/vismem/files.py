"""Files that survive a crash: written beside their place, flushed to the disk, then renamed into it.

`replacing` is the only way in which this package replaces a file. A process may be killed between any two of its system
calls: the old file or the new one is there, whole. `write_pair` does the same for two files of which the second names
the first by its checksum. A full disk is a `DiskFullError`, and `locked` keeps two runs out of one folder.
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

PARTIAL = ".partial"  # the ending of what is still being written
LOCK, OWNER = ".lock", ".lock.json"  # within a locked folder: filelock's file, and who holds it
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # of file systems that have none
FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "disk quota exceeded", errno.EFBIG: "file size limit exceeded"}


class DiskFullError(OSError):
    """The disk, a quota or a limit on file sizes is full; names the folder and its file system."""


class FolderInUseError(OSError):
    """Another run is writing into the folder; names its process and host."""


def partial_path(path: Path) -> Path:
    """Where the next version of `path` is written, in the same folder."""
    return path.with_name(path.name + PARTIAL)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields the path to write to; when the block ends well, that file becomes `path`.

    The folder is made if it is missing. When the block raises, `path` stays as it was and nothing is left behind.

    Raises:
        DiskFullError: if there is no room.

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
    """Writes a whole file, or leaves the one that is there."""
    with replacing(path) as partial:
        partial.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Writes a whole file of UTF-8 text, or leaves the one that is there."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: Any, indent: int | None = None) -> None:
    """Writes a whole JSON file, or leaves the one that is there."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_pair(first: tuple[Path, bytes], second: tuple[Path, bytes], fits: Callable[[bytes], bool]) -> None:
    """Replaces two files of one folder that belong together.

    Killed at any moment, the folder holds the old or the new pair: `first`, with either `second` or the version of it
    that still waits at its partial path. `matching` finds which.

    Args:
        first, second: path and new content.
        fits: whether some content of `second` belongs to the `first` that is on the disk now.
    """
    folder, pending = first[0].parent, partial_path(second[0])
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if pending.is_file() and fits(pending.read_bytes()):
            os.replace(pending, second[0])  # the last step of a save that was interrupted
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


def matching(path: Path, fits: Callable[[bytes], bool]) -> bytes | None:
    """The content of the second file of a pair: of the version that fits the first, else whatever is at `path`.

    None where neither is there, or only an unfinished version.
    """
    content, found = _content(partial_path(path)), _content(path)  # in this order: the one becomes the other
    if content is None:
        return found
    return content if (found is None or not fits(found)) and fits(content) else found


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:  # a file system that cannot flush a folder
        if not path.is_dir() or error.errno in FULL:
            raise
    finally:
        os.close(handle)


def sha256(path: Path) -> str:
    """The checksum of a file, read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def folders_with(folder: Path, name: str) -> list[Path]:
    """Folders one or two levels below `folder` that have a file of that name."""
    return sorted({path.parent for below in ("*", "*/*") for path in folder.glob(f"{below}/{name}")})


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


# Full disks.


@contextlib.contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turns what libraries raise on a full disk into `DiskFullError`.

    torch and safetensors report a failed write in words of their own, so when anything but an `OSError` comes out of
    the block, a small write to the folder shows whether the disk was the cause.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _errno_of(folder, error)
        if number not in FULL:
            raise
        place = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()), folder)
        mount = next(p for p in (place, *place.parents) if os.path.ismount(p) or p == p.parent)
        raise DiskFullError(f"{FULL[number]} on {mount} (writing to {folder})") from error


def _errno_of(folder: Path, error: Exception) -> int | None:
    """The system's error behind a library's, or None if writing was not the problem."""
    if said := re.search(r"os error (\d+)", str(error)):  # safetensors
        return int(said[1])
    if "inline_container" not in str(error):  # torch.save, which does not say why a write failed
        return None
    probe = folder / f"probe{PARTIAL}"
    try:
        probe.write_bytes(b"\0" * 2**16)
        sync(probe)
    except OSError as found:
        return found.errno
    finally:
        _unlink(probe)
    return errno.EFBIG


# One run in a folder.


@contextlib.contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keeps other processes and threads out of a folder while the context lasts; nested use is fine.

    The kernel drops the lock with its process, so a run that was killed locks nobody out.

    Raises:
        FolderInUseError: at once, if another run holds the folder.
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
        log.warning("%s cannot be locked (%s); make sure that no other run writes there", folder, error)
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
        found = json.loads(owner.read_bytes())
        return f"process {found['pid']} on {found['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "its process is not known"
