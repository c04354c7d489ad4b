"""Imports functions by path: "package.module:function" or "path/to/file.py:function"."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vismem.config import SettingsError
from vismem.training.rewards.errors import FAILURES


def import_function(path: str) -> Callable[..., Any]:
    """Imports the function at "package.module:function" or "path/to/file.py:function".

    Raises:
        SettingsError: if there is no such module, file or function, or it fails to import.
    """
    module, _, name = str(path).rpartition(":")
    if not module or not name:
        raise SettingsError(f"an import path must read 'module:function' or 'file.py:function', got {path!r}")
    try:
        found: Any = _from_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
        for part in name.split("."):
            if not hasattr(found, part):
                raise SettingsError(f"{module} has no {name!r}")
            found = getattr(found, part)
    except SettingsError:
        raise
    except FAILURES as error:  # modules may raise any type
        raise SettingsError(f"cannot import {module}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise SettingsError(f"{path} is not a function")
    return found


def _from_file(path: Path) -> Any:
    path = path.expanduser().resolve()
    name = f"vismem_rewards_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
