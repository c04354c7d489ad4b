"""Code that is in a source checkout and not in the package: `benchmarks/` and `experiments/`."""

from __future__ import annotations

import sys
from pathlib import Path

import vismem
from vismem.cli.parsing import CommandError


def checkout_folder(name: str) -> Path:
    """A folder of the checkout, beside `src`; it may not exist."""
    return Path(vismem.__file__).resolve().parents[2] / name


def importable(folder: Path, what: str) -> Path:
    """Puts a folder of the checkout on Python's path.

    Raises:
        CommandError: if the folder does not exist; `what` says what needs it.
    """
    if not folder.is_dir():
        raise CommandError(f"{what} a source checkout of vismem, installed with `pip install -e .`")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder
