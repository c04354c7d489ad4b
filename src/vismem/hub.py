"""Finds a base or a memory by name: a local folder, or a repository on the Hugging Face Hub.

No network means no waiting: the hub is asked once, for a few seconds, and if it does not answer, files downloaded
earlier are used.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

NETWORK_TIMEOUT = 5  # seconds; huggingface_hub's own retries take half a minute
SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/")  # a repository in the local cache


class LoadError(ValueError, OSError):
    """A base or a memory is missing or damaged, or the two do not fit together."""


def silent(_note: str) -> None:
    """Drops a note."""


def find(
    name: str,
    file: str,
    what: str,
    say: Callable[[str], None] = silent,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[str, bool]:
    """The folder or repository of a base or a memory, and whether it is on this machine.

    Args:
        name: a folder or `owner/name`.
        file: a file that every base, or every memory, has.
        what: `"base"` or `"checkpoint"`, for messages.
        say: called with a note when a download starts.
        revision, token: for the hub.

    Raises:
        LoadError: if there is no such folder or repository, or it lacks the file.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / file).is_file():
            raise LoadError(f"{name} is not a {what}: the folder has no {file}")
        return str(path), True
    if path.exists() or not is_repository(name):
        raise LoadError(f"no {what} {name}: there is no such folder, and a hub repository is named like owner/name")

    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    cached = isinstance(try_to_load_from_cache(name, file, revision=revision), str)
    reason = "offline mode is on"
    if not constants.HF_HUB_OFFLINE:
        try:
            get_hf_file_metadata(hf_hub_url(name, file, revision=revision), token=token, timeout=NETWORK_TIMEOUT)
            if not cached:
                say(f"note: downloading {name} from the hub")
            return name, False
        except errors.GatedRepoError as error:
            raise LoadError(f"{what} {name} is gated: ask for access on its page, then `hf auth login`") from error
        except errors.RepositoryNotFoundError as error:
            raise LoadError(f"no {what} {name}: no such folder, and no such repository that you may read") from error
        except errors.EntryNotFoundError as error:
            raise LoadError(f"{name} is not a {what}: the repository has no {file}") from error
        except Exception:  # no network, or the hub is down; the client raises many types
            reason = "the hub cannot be reached"
    if not cached:
        raise LoadError(f"no {what} {name}: no such folder, nothing downloaded earlier, and {reason}")
    return name, True


def is_repository(name: str) -> bool:
    """Whether a name has the form of a hub repository's: `owner/name`."""
    from huggingface_hub import errors, utils

    try:
        utils.validate_repo_id(name)
    except errors.HFValidationError:
        return False
    return name.count("/") == 1


def repository_of(base: str) -> str:
    """The hub repository of a base's name, which may be its path in the local cache; an empty string if it has none."""
    if found := SNAPSHOT.search(Path(base).as_posix()):
        return f"{found[1]}/{found[2]}"
    return base if is_repository(base) and not Path(base).expanduser().is_dir() else ""
