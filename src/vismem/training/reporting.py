"""One experiment-tracker run per stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainingArguments


@contextmanager
def reported_apart(args: TrainingArguments) -> Iterator[None]:
    """Closes the tracker runs that transformers' callbacks open inside the context, so that each stage has its own.

    Weights & Biases and SwanLab otherwise keep a run open until the process ends, and the next stage would report to
    it. A run that was open before stays open.

    Args:
        args: of the stage; `project` is Weights & Biases' project too, unless WANDB_PROJECT names one.
    """
    open_before = _open_runs()
    unnamed = "WANDB_PROJECT" not in os.environ
    if unnamed:
        os.environ["WANDB_PROJECT"] = str(args.project)
    try:
        yield
    finally:
        for name, run in _open_runs().items():
            if run is not open_before.get(name):
                sys.modules[name].finish()
        if unnamed:
            del os.environ["WANDB_PROJECT"]


def _open_runs() -> dict[str, Any]:
    """The open run of each tracker that has one."""
    wandb, swanlab = sys.modules.get("wandb"), sys.modules.get("swanlab")
    found = {"wandb": getattr(wandb, "run", None), "swanlab": swanlab.get_run() if swanlab is not None else None}
    return {name: run for name, run in found.items() if run is not None}
