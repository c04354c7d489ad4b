"""Code that is in a source checkout and not in the package: `benchmarks/` and `experiments/`."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import vismem
from vismem.cli.parsing import CommandError

CHECKOUT = Path(vismem.__file__).resolve().parents[2]


def import_from(folder: str, name: str, what: str) -> Any:
    """Imports a module in a folder of the checkout. Raises CommandError without one; `what` says what needs it."""
    path = CHECKOUT / folder
    if not path.is_dir():
        raise CommandError(f"{what} a source checkout of vismem, installed with `pip install -e .`")
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
    return import_module(name)
