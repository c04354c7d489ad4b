"""A run's files: atomic checkpoints with checksums, resuming from them exactly, and a stage's results.

The Trainer saves learner, optimizer, schedule and RNG states. This adds what the method and exact logs need: the KL
coefficient, the baselines, the stage's initial parameters, and sums not logged yet.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import rotate_checkpoints

from vismem import files
from vismem.card import METRICS
from vismem.training.baselines import save_adapter
from vismem.training.sharding import Parameter, gathered

if TYPE_CHECKING:
    from vismem.model import VisMem
    from vismem.training.arguments import MemoryTrainingArguments
    from vismem.training.experience import Collector
    from vismem.training.grpo import AdaptiveKL
    from vismem.training.metrics import Metrics, Samples
    from vismem.training.replay import Learner
    from vismem.training.rows import PromptSampler

log = logging.getLogger(__name__)

MANIFEST = "checksums.json"  # in a checkpoint: SHA-256 of every other file
STATE = "trainer_state.json"


class DamagedCheckpointError(ValueError):
    """A checkpoint file is missing or differs from what was written; names it."""


class CheckpointingTrainer(Trainer):
    """A Trainer whose checkpoints are atomic and hold the method's state; the base of `MemoryTrainer`."""

    args: MemoryTrainingArguments
    vismem: VisMem
    history: tuple[dict[str, Any], ...]  # of the memory before this stage
    kl: AdaptiveKL
    collector: Collector | None
    start: dict[str, Tensor]  # the stage's initial parameters
    metrics: Metrics
    samples: Samples
    scalars: set[Parameter]  # as `make_shardable` returns them
    sampler: PromptSampler | None = None

    staging = ""  # folder of the checkpoint being written
    restored: dict[str, Any] | None = None  # sums from a checkpoint, until the loop starts
    started = earlier = 0.0  # start time in this process, and the seconds of earlier processes

    @property
    def learner(self) -> Learner:
        """The learner without accelerate's wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def train(  # transformers' signature
        self,
        resume_from_checkpoint: str | bool | None = None,  # noqa: FBT001
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Trains; leaves the model in evaluation mode, with this stage in its `history`.

        Args:
            resume_from_checkpoint: a checkpoint's folder, or True for the newest intact one in `output_dir`, if there
                is one.
            *args, **kwargs: as in transformers.

        Raises:
            ValueError: if this trainer has trained before, or `output_dir` holds a run and none is resumed.
            FolderInUseError: if another run writes to `output_dir`.
            DiskFullError: if there is no room; names the newest checkpoint.
            DamagedCheckpointError: if a file of the checkpoint is damaged.
        """
        folder, main = self.args.folder, self.is_world_process_zero()
        with files.locked(folder) if main else contextlib.nullcontext():
            if resume_from_checkpoint is True:
                resume_from_checkpoint = last_checkpoint(folder)
            elif not resume_from_checkpoint:
                self.refuse_old_run()
            step = 0
            if resume_from_checkpoint:
                verify(Path(resume_from_checkpoint))
                step = TrainerState.load_from_json(str(Path(resume_from_checkpoint) / STATE)).global_step
            self.accelerator.wait_for_everyone()  # before writing anything that others look for
            if main:
                if resume_from_checkpoint:
                    drop_newer(folder, step)
                self.samples.forget_from(step)
            self.accelerator.wait_for_everyone()
            self.earlier, self.restored = 0.0, None
            try:
                with self.naming_checkpoint():
                    output = super().train(resume_from_checkpoint or None, *args, **kwargs)
                self.vismem.history = (*self.history, self.summary())
                return output
            finally:
                self.learner.eval()

    def refuse_old_run(self) -> None:
        """Raises ValueError if training from scratch would overwrite an earlier run."""
        if self.state.global_step:
            raise ValueError("this trainer has trained already: make a new one, with another output_dir")
        if newest_checkpoint(self.args.folder) or self.args.result.exists():
            raise ValueError(
                f"{self.args.folder} holds a run already: continue it with train(resume_from_checkpoint=True), "
                "or choose another output_dir"
            )

    def _run_epoch(self, *positional: Any, **named: Any) -> None:
        self.restore_sums(named["start_time"])
        # On several processes the sampler would otherwise not learn of an epoch that is resumed in the middle.
        if self.sampler is not None:
            self.sampler.set_epoch(named["epoch"])
        super()._run_epoch(*positional, **named)

    def _get_output_dir(self, trial: Any) -> str:
        return self.staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        name, target = f"checkpoint-{self.state.global_step}", self.args.folder
        staging = target / ".partial"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.staging = str(staging)
        try:
            with files.disk_errors(staging):
                super()._save_checkpoint(model, trial)
                torch.save(self.own_state(), staging / name / f"memory_state_{self.args.process_index}.pt")
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    write_manifest(staging / name)
                    if not (target / name).exists():  # a callback may ask for two at one step
                        os.rename(staging / name, target / name)
                        files.sync(target)
        finally:
            self.staging = ""
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.should_save:
            rotate_checkpoints(output_dir=str(target), save_total_limit=self.args.save_total_limit, use_mtime=False)
        self.accelerator.wait_for_everyone()

    def own_state(self) -> dict[str, Any]:
        """What a checkpoint holds beyond the Trainer's state."""
        return {
            "kl_coef": self.kl.coef,
            "baselines": self.collector.baselines if self.collector else {},
            "start": {name: p.cpu() for name, p in self.start.items()},
            "sums": {
                "figures": dict(self.metrics.values),
                "loss": self._tr_loss.detach().cpu(),
                "total_loss": self._total_loss_scalar,
                "last_logged": self._globalstep_last_logged,
                "seconds": self.seconds(),
            },
        }

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
            self.restored = state["sums"]

    def restore_sums(self, started: float) -> None:
        """Restores a checkpoint's sums, once the Trainer has reset its own at `started` (in seconds)."""
        self.started = started
        if self.restored is None:
            return
        sums, self.restored = self.restored, None
        self.metrics.values.update(sums["figures"])
        self._tr_loss = sums["loss"].to(self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = sums["total_loss"], sums["last_logged"]
        self._initial_global_step = 0  # loss and speed cover the whole run, not this process
        self.earlier = sums["seconds"]

    def seconds(self) -> float:
        """Duration of the run in seconds, over all processes that continued it."""
        return self.earlier + time.time() - self.started

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: float) -> Any:
        self.restore_sums(start_time)  # if the run had no steps left
        return super()._finalize_training(trial, num_train_samples, start_time - self.earlier)

    @contextlib.contextmanager
    def naming_checkpoint(self) -> Iterator[None]:
        """Adds the newest checkpoint to the error for a full disk."""
        try:
            with files.disk_errors(self.args.folder):
                yield
        except files.DiskFullError as error:
            last = newest_checkpoint(self.args.folder)
            raise files.DiskFullError(
                f"{error}; last good checkpoint: {last or 'none yet'}. Free some space and continue with --resume"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:  # noqa: FBT001, FBT002
        """Saves the stage's memory or adapter; within a checkpoint, what resuming needs."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
        else:
            self.save_result(output_dir or self.args.result)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Saves the learner's weights for resuming, and the settings as JSON."""
        if not self.args.should_save:  # called on every process if parameters are sharded
            return
        folder = Path(output_dir or self.args.folder)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.learner.state_dict() if state_dict is None else state_dict
        weights = {n: t.detach().cpu().contiguous() for n, t in state.items()}
        safetensors.torch.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        settings = json.dumps(self.args.to_dict(), indent=2, default=str, sort_keys=True)
        files.write_text(folder / "training_args.json", settings + "\n")

    def save_result(self, folder: str | Path) -> None:
        """Saves the stage's memory, or a baseline's adapter."""
        if self.args.plan.adapts:
            self.save_gathered(partial(save_adapter, self.vismem.base), folder)
        else:
            self.save_memory(folder)

    def save_memory(self, folder: str | Path) -> None:
        """Saves the memory for `VisMem.from_pretrained`."""
        self.save_gathered(self.vismem.save_pretrained, folder)

    def save_gathered(self, save: Callable[[Path], None], folder: str | Path) -> None:
        """Calls `save` on the main process, with sharded parameters gathered."""
        with gathered(self.learner, self.scalars), self.naming_checkpoint():
            if self.args.should_save:
                save(Path(folder))
        self.accelerator.wait_for_everyone()

    def summary(self) -> dict[str, Any]:
        """This stage's entry in a memory's history: its settings and the last metrics it logged."""
        args, logged = self.args, {name: value for entry in self.state.log_history for name, value in entry.items()}
        data = Path(args.data).name if args.data and Path(args.data).exists() else args.data
        return {
            "stage": args.stage,
            "steps": self.state.global_step,
            "seed": args.seed,
            "data": data,
            "rewards": self.collector.rewards.names if self.collector else [],
            "figures": {name: logged[name] for name in METRICS if name in logged},
        }


def write_manifest(folder: Path) -> None:
    """Flushes a finished checkpoint's files to disk and writes their checksums."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for path in found:
        files.sync(path)
    files.write_json(folder / MANIFEST, {path.relative_to(folder).as_posix(): files.sha256(path) for path in found})


def verify(folder: Path) -> None:
    """Raises DamagedCheckpointError if a checkpoint's file is missing or differs; without checksums, only warns."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        log.warning("%s has no %s, so damage cannot be detected", folder, MANIFEST)
        return
    try:
        expected = dict(json.loads(manifest.read_bytes()))
    except (ValueError, TypeError) as error:
        raise DamagedCheckpointError(f"{manifest} is damaged ({error})") from error
    if wrong := changed(folder, expected):
        raise DamagedCheckpointError(f"{wrong} is damaged or missing: it does not match {MANIFEST}")


def changed(folder: Path, expected: dict[str, str]) -> Path | None:
    """The first file that is missing or has a different checksum; None if all match."""
    found = ((folder / name, digest) for name, digest in expected.items())
    return next((path for path, digest in found if not path.is_file() or files.sha256(path) != digest), None)


def checkpoints_of(folder: str | Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if (path / STATE).is_file()]
    return sorted((path for path in found if path.name.partition("-")[2].isdigit()), key=step_of)


def step_of(checkpoint: str | Path) -> int:
    """The step in a checkpoint's name."""
    return int(Path(checkpoint).name.rpartition("-")[2])


def newest_checkpoint(folder: str | Path) -> Path | None:
    """A run's newest checkpoint, intact or not."""
    return next(reversed(checkpoints_of(folder)), None)


def last_checkpoint(folder: str | Path) -> str | None:
    """A run's newest intact checkpoint, or None if it has no checkpoint; warns about damaged ones it skips.

    Raises:
        DamagedCheckpointError: if there are checkpoints and all of them are damaged.
    """
    errors: list[DamagedCheckpointError] = []
    for path in reversed(checkpoints_of(folder)):
        try:
            verify(path)
        except DamagedCheckpointError as error:
            errors.append(error)
        else:
            for damaged in errors:
                log.warning("%s; continuing from %s", damaged, path)
            return str(path)
    if errors:
        raise DamagedCheckpointError(f"{errors[0]}; no older checkpoint is intact, so choose another output_dir")
    return None


def drop_newer(folder: str | Path, step: int) -> None:
    """Renames checkpoints after `step`, for a run that resumes there."""
    for path in checkpoints_of(folder):
        if step_of(path) > step:
            unused = path.with_name(f"unused-{path.name}")
            shutil.rmtree(unused, ignore_errors=True)
            os.rename(path, unused)
            log.warning("%s is after step %d, where this run resumes; renamed to %s", path, step, unused.name)
