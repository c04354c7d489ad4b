"""Shared settings: no network, one thread for each worker, and the tiny models.

What takes seconds to import is imported where it is used: the controller of pytest-xdist needs none of it.
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import threading

import pytest


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): run by one worker; pytest-xdist's, also where it is off")


def pytest_collection_finish() -> None:
    """Sets one thread; keeps imports out of garbage collections, which training and lmms-eval run often."""
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()


@pytest.fixture
def held(chat):
    """An event that keeps the worker of the module's `chat` from decoding until it is set."""
    gate = threading.Event()
    chat.worker.call(gate.wait, 60)
    yield gate
    gate.set()
    chat.worker.call(lambda: None).result(60)


def pytest_generate_tests(metafunc) -> None:
    """Parametrizes `family`: all families in modules with `EVERY_FAMILY = True`, elsewhere two different ones."""
    if "family" in metafunc.fixturenames and not any(
        "family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")
    ):
        import tiny

        everywhere = getattr(metafunc.module, "EVERY_FAMILY", False)
        metafunc.parametrize("family", list(tiny.FAMILIES) if everywhere else tiny.UNLIKE)
