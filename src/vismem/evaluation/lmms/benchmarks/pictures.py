"""Finds a sample's pictures by name: in a folder, a zip archive, or a data set's repository on the hub.

A folder of that name below the working directory takes precedence over the hub, as in `datasets`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from vismem.data.images import MOST_BYTES, BadImageError


def message(pictures: Iterable[Any], text: str) -> list[dict[str, Any]]:
    """A user message with the pictures first, then the text."""
    shown = [{"type": "image", "url": one} for one in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def picture(root: str, name: str) -> str | bytes:
    """A picture's path, or its bytes if it is in an archive.

    Args:
        root: a folder or a zip archive, or `OWNER/NAME/FOLDER` or `OWNER/NAME/FILE.zip` of a data set on the hub. If it
            is missing, the archive or folder of the same name is used.
        name: path of the picture in it.

    Raises:
        FileNotFoundError: if it is not found; lists the places.
        BadImageError: if it is larger than `vismem.data.images.MOST_BYTES` in its archive.
    """
    place = Path(root)
    folder, beside = (place.with_suffix(""), place) if place.suffix == ".zip" else (place, Path(f"{place}.zip"))
    if (folder / name).is_file():
        return str(folder / name)
    if beside.is_file():
        return _from_archive(str(beside), name)
    parts = place.parts
    if folder.is_absolute() or folder.exists() or len(parts) < 2:
        raise FileNotFoundError(f"no picture {name}: there is neither {folder / name} nor an archive {beside}")
    return _from_hub("/".join(parts[:2]), "/".join(parts[2:]), name)


def _from_hub(repository: str, folder: str, name: str) -> str | bytes:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch(file: str) -> str:
        return hf_hub_download(repository, file, repo_type="dataset")

    archive = folder if folder.endswith(".zip") else f"{folder}.zip"
    if archive != folder:
        with contextlib.suppress(EntryNotFoundError):  # raised in offline mode too, for files not downloaded before
            return fetch(f"{folder}/{name}" if folder else name)
    try:
        return _from_archive(fetch(archive), name)
    except EntryNotFoundError as error:
        place = f"{repository}/{archive.removesuffix('.zip')}"
        raise FileNotFoundError(
            f"no picture {name}: there is no local folder {place}, and the data set {repository} on the hub has no "
            f"{archive}, or it cannot be reached"
        ) from error


@lru_cache(maxsize=4)
def _archive(path: str) -> tuple[ZipFile, tuple[str, ...]]:
    found = ZipFile(path)
    return found, tuple(found.namelist())


def _from_archive(path: str, name: str) -> bytes:
    """The picture with this path in the archive, possibly below further folders."""
    archive, names = _archive(path)
    inside = [one for one in names if one == name or one.endswith(f"/{name}")]
    if not inside:
        raise FileNotFoundError(f"no picture {name} in the archive {path}")
    found = archive.getinfo(min(inside, key=len))
    if found.file_size > MOST_BYTES:
        raise BadImageError(f"picture {name} in the archive {path} is larger than {MOST_BYTES // 2**20} MiB, the limit")
    return archive.read(found)
