"""Checkpoints that are whole or not there: written aside, renamed at the end; and the memory as users load it.

The Trainer saves learner, optimizer, schedule and random states; here come what the method adds to them - the KL
coefficient, the baselines, the stage's starting parameters.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn
from transformers.trainer_utils import rotate_checkpoints

from vismem.training.baselines import save_adapter
from vismem.training.sharding import gathered


class WholeCheckpoints:
    """What `MemoryTrainer` puts in the place of the Trainer's saving."""

    staging = ""  # where a checkpoint is being written

    def _get_output_dir(self, trial: Any) -> str:
        return self.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name, target = f"checkpoint-{self.state.global_step}", Path(self.args.output_dir)
        staging = target / ".partial"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
            state = {"kl_coef": self.kl.coef, "baselines": self.collector.baselines if self.collector else {}}
            own = staging / name / f"memory_state_{self.args.process_index}.pt"
            torch.save({**state, "start": {n: p.cpu() for n, p in self.start.items()}}, own)
            self.accelerator.wait_for_everyone()
        finally:
            self.staging = ""
        if self.args.should_save:
            shutil.rmtree(target / name, ignore_errors=True)
            for file in (staging / name).rglob("*"):
                if file.is_file():
                    with open(file, "rb+") as handle:
                        os.fsync(handle.fileno())
            os.replace(staging / name, target / name)
            shutil.rmtree(staging, ignore_errors=True)
            limit = self.args.save_total_limit
            rotate_checkpoints(output_dir=str(target), save_total_limit=limit, use_mtime=False)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        own = Path(resume_from_checkpoint) / f"memory_state_{self.args.process_index}.pt"
        if not own.is_file():  # saved by fewer processes
            own = own.with_name("memory_state_0.pt")
        if own.is_file():
            state = torch.load(own, weights_only=True)
            self.kl.coef = state["kl_coef"]
            if self.collector is not None:
                self.collector.baselines = state["baselines"]
            for name, value in state["start"].items():
                self.start[name].copy_(value)
        if self.args.should_save:
            self.samples.forget_from(int(Path(resume_from_checkpoint).name.rpartition("-")[2]))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves what the stage makes, memory or adapter; within a checkpoint, what going on needs."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        else:
            self.save_result(output_dir or Path(self.args.output_dir) / self.args.plan.result)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The learner's weights, for going on, and the settings in words."""
        if not self.args.should_save:  # asked of every process where parameters are sharded
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.learner.state_dict() if state_dict is None else state_dict
        weights = {n: t.detach().cpu().contiguous() for n, t in state.items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.dumps(self.args.to_dict(), indent=2, default=str, sort_keys=True)
        (folder / "training_args.json").write_text(settings + "\n", encoding="utf-8")

    def save_result(self, folder: str | Path) -> None:
        """Writes what the stage makes: a memory, or a baseline's adapter."""
        if self.args.plan.adapts:
            self.save_whole(partial(save_adapter, self.vismem.base), folder)
        else:
            self.save_memory(folder)

    def save_memory(self, folder: str | Path) -> None:
        """Writes the memory as `VisMem.from_pretrained` reads it."""
        self.save_whole(self.vismem.save_pretrained, folder)

    def save_whole(self, save: Callable[[Path], None], folder: str | Path) -> None:
        """Has `save` write into a folder, each file whole or not at all."""
        folder = Path(folder)
        with gathered(self.learner, self.numbers):
            if self.args.should_save:
                staging = folder.with_name(folder.name + ".partial")
                shutil.rmtree(staging, ignore_errors=True)
                save(staging)
                folder.mkdir(parents=True, exist_ok=True)
                for file in staging.iterdir():
                    os.replace(file, folder / file.name)
                staging.rmdir()
        self.accelerator.wait_for_everyone()


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint of a run, or None."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    numbered = [(int(path.name.partition("-")[2]), path) for path in found if path.name.partition("-")[2].isdigit()]
    return str(max(numbered)[1]) if numbered else None
