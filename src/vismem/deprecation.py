"""Deprecated names: they work for one release, with a `DeprecationWarning` that gives the new name."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

# Old module name -> new name. An entry for a package also covers its submodules.
MOVED = {
    "vismem.analysis.findings": "vismem.analysis.inspection",
    "vismem.app.findings": "vismem.analysis.inspection",
    "vismem.app.inspection": "vismem.analysis.inspection",
    "vismem.app.sharing": "vismem.app.export",
    "vismem.app.studio": "vismem.app.chat",
    "vismem.cli.images": "vismem.cli.ask",
    "vismem.commands": "vismem.cli",
    "vismem.commands.loading": "vismem.cli.model_options",
    "vismem.commands.unloaded": "vismem.cli.meta",
    "vismem.decoding.chance": "vismem.decoding.rng",
    "vismem.decoding.drawing": "vismem.decoding.sampling",
    "vismem.decoding.engine": "vismem.decoding.decoder",
    "vismem.decoding.generation": "vismem.decoding.prepare",
    "vismem.decoding.invocation": "vismem.decoding.policies",
    "vismem.decoding.requests": "vismem.decoding.queue",
    "vismem.decoding.rows": "vismem.decoding.row",
    "vismem.decoding.text": "vismem.decoding.detokenizer",
    "vismem.evaluation.attention": "vismem.analysis.slot_attention",
    "vismem.evaluation.audit": "vismem.audit",
    "vismem.evaluation.audit.bank": "vismem.audit.activations",
    "vismem.evaluation.audit.gaze": "vismem.audit.attention",
    "vismem.evaluation.audit.run": "vismem.audit.audit",
    "vismem.evaluation.drawing": "vismem.analysis.heatmaps",
    "vismem.evaluation.looks": "vismem.analysis.short_attention",
    "vismem.evaluation.marks": "vismem.decoding.markers",
    "vismem.evaluation.readings": "vismem.analysis.long_attention",
    "vismem.evaluation.replaying": "vismem.analysis.replacement",
    "vismem.evaluation.tables.comparing": "vismem.evaluation.tables.paper",
    "vismem.evaluation.tables.continuing": "vismem.evaluation.tables.paper",
    "vismem.evaluation.tables.costing": "vismem.evaluation.tables.paper",
    "vismem.evaluation.tables.occasions": "vismem.evaluation.tables.paper",
    "vismem.evaluation.tables.varying": "vismem.evaluation.tables.paper",
    "vismem.evaluation.templating": "vismem.analysis.templates",
    "vismem.evaluation.views": "vismem.analysis.image_geometry",
    "vismem.memory.splice": "vismem.reading.splice",
    "vismem.serving.assembling": "vismem.serving.responses",
    "vismem.serving.checks": "vismem.serving.guards",
    "vismem.serving.cluster": "vismem.serving.replicas",
    "vismem.serving.events": "vismem.serving.responses",
    "vismem.serving.replica": "vismem.serving.replicas",
    "vismem.serving.running": "vismem.serving.lifespan",
    "vismem.serving.stripping": "vismem.serving.metadata",
    "vismem.serving.token_bytes": "vismem.serving.responses",
    "vismem.serving.writing": "vismem.serving.responses",
    "vismem.training.figures": "vismem.training.metrics",
    "vismem.training.rewards.waiting": "vismem.training.rewards.combine",
}


def renamed(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """Returns a module's `__getattr__` that resolves old names.

    Args:
        module: the module's `__name__`.
        names: old name -> new name, both in that module.

    Example:
        >>> __getattr__ = renamed(__name__, {"CannotLoad": "LoadError"})
    """

    def lookup(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(f"{module}.{name} is now {module}.{names[name]}", DeprecationWarning, stacklevel=2)
        return getattr(sys.modules[module], names[name])

    return lookup


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function take keyword arguments by their old names too.

    Args:
        **names: old name to new name.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs:
                warnings.warn(f"the argument {old} is now {names[old]}", DeprecationWarning, stacklevel=2)
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


class MovedModules(MetaPathFinder, Loader):
    """Imports a moved module by its old name; both names refer to the same module."""

    def find_spec(self, name: str, *_unused: object) -> ModuleSpec | None:
        return None if self.new_name(name) is None else ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = self.new_name(spec.name)
        assert new is not None  # by find_spec
        warnings.warn(f"{spec.name} is now {new}", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        self.own_spec = module.__spec__  # the import system is about to overwrite it
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.own_spec

    @staticmethod
    def new_name(name: str) -> str | None:
        """The new name of a moved module, else None."""
        old, rest = name, ""
        while old not in MOVED:
            old, dot, last = old.rpartition(".")
            if not dot:
                return None
            rest = f".{last}{rest}"
        return MOVED[old] + rest


def install() -> None:
    """Makes old module names importable."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.insert(0, MovedModules())
