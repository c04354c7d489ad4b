"""Old names: every one still imports, warns, and is the same object as the new one."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

from vismem.deprecation import MOVED, MovedModules, renamed_arguments

OLD = [
    *MOVED,
    "vismem.commands.ask",
    "vismem.commands.parsing",
    "vismem.evaluation.audit.interventions",
]


@pytest.mark.parametrize("name", OLD)
def test_an_old_module_name_warns_and_gives_the_module(name):
    parents = [name.rsplit(".", count)[0] for count in range(name.count("."))]
    for parent in {part for part in (name, *parents) if MovedModules.new_name(part)}:
        sys.modules.pop(parent, None)
    with pytest.warns(DeprecationWarning, match=f"{name} is now {MovedModules.new_name(name)}"):
        old = import_module(name)
    new = import_module(MovedModules.new_name(name))
    assert old is new and new.__spec__.name == new.__name__


def test_new_names_do_not_warn():
    code = "import vismem.cli, vismem.config, vismem.audit.names"
    ran = subprocess.run([sys.executable, "-W", "error::DeprecationWarning", "-c", code], capture_output=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("vismem.serving.engine", "Ask", "ChatRequest"),
        ("vismem.serving.engine", "EngineRequest", "ChatRequest"),
        ("vismem.serving.prompts", "marks_of", "reserved_texts"),
        ("vismem.serving.worker", "Closed", "WorkerClosedError"),
        ("vismem.serving.worker", "Full", "QueueFullError"),
        ("vismem.serving.worker", "News", "RowUpdate"),
    ],
)
def test_an_old_name_warns_and_gives_the_object(module, old, new):
    pytest.importorskip("fastapi")
    found = import_module(module)
    with pytest.warns(DeprecationWarning, match=f"{module}.{old} is now {module}.{new}"):
        assert getattr(found, old) is getattr(found, new)


def test_an_old_argument_name_warns_and_works():
    @renamed_arguments(most_waiting="max_waiting")
    def double(max_waiting: int) -> int:
        return 2 * max_waiting

    with pytest.warns(DeprecationWarning, match="the argument most_waiting is now max_waiting"):
        assert double(most_waiting=3) == 6
    assert double(3) == double(max_waiting=3) == 6


def test_a_module_that_never_was_is_not_found():
    with pytest.raises(ModuleNotFoundError):
        import_module("vismem.decoding.nothing")
