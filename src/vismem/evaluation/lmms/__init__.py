"""VisMem as a model of lmms-eval, and tasks for the paper's benchmarks that lmms-eval lacks.

lmms-eval finds the model through the entry point `lmms_eval.models`, which calls `manifest`. `model` writes the
answers, `messages` reads the prompts, `run` runs a task from Python.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The model's name and class for lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="vismem", chat_class_path="vismem.evaluation.lmms.model.VisMemChat")


def tasks_folder() -> Path:
    """The folder of the packaged tasks, for lmms-eval's `--include_path`."""
    return Path(__file__).parent / "tasks"
