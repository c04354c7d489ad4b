"""Imports reward functions by path."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from vismem.config import SettingsError
from vismem.training.rewards.errors import FAILURES


def import_function(path: str) -> Callable[..., Any]:
    """Imports the function at "package.module:function" or "path/to/file.py:function".

    Raises:
        SettingsError: if there is no such module, file or function, or it fails to import.
    """
    source, _, name = str(path).rpartition(":")
    if not source or not name:
        raise SettingsError(f"an import path must read 'module:function' or 'file.py:function', got {path!r}")
    try:
        module = _from_file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except FAILURES as error:  # modules may raise any type
        raise SettingsError(f"cannot import {source}: {type(error).__name__}: {error}") from error
    try:
        found = attrgetter(name)(module)
    except AttributeError as error:
        raise SettingsError(f"{source} has no {name!r}") from error
    if not callable(found):
        raise SettingsError(f"{path} is not a function")
    return found


def _from_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    name = f"vismem_rewards_{path.stem}_{abs(hash(path)):x}"
    if name not in sys.modules:
        if not path.is_file():
            raise FileNotFoundError(f"no such file: {path}")
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # as the name ends in .py
        sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
