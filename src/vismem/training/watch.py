"""Warns when a run cannot learn: groups without any difference in reward, or memory that is never invoked."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import TrainerCallback

from vismem.training.experience import Experience

log = logging.getLogger(__name__)

PATIENCE = 10  # updates in a row before a warning
PAGE = "docs/training.md"
REASONS = {
    "spread": "there was nothing to learn from: in every group all answers earned the same. Take prompts that the base "
    "gets right sometimes, more trajectories (group_size) or a finer reward",
    "invocations": "memory was never invoked. Check injection_rate, injection_places and memory.delimiters in stage I, "
    "and that stage II starts from a memory that was trained (checkpoint)",
    "gradient": "there was no gradient: no reply invokes memory. Check the replies' marks, injection_rate and "
    "memory.delimiters",
}


class SignalWatch(TrainerCallback):
    """Counts updates without a learning signal, warns after `PATIENCE` in a row, and summarises at the end.

    Args:
        trainer: counts are summed over its processes.
        invokes: whether the stage invokes memory.
    """

    def __init__(self, trainer: Any, *, invokes: bool) -> None:
        self.trainer, self.invokes = trainer, invokes
        self.seen: dict[str, float] = {}  # signal of the current update, by name
        self.row, self.total = dict.fromkeys(REASONS, 0), dict.fromkeys(REASONS, 0)
        self.updates = 0

    def note(self, experience: Experience) -> None:
        """Adds the signal of one batch of an update."""
        spread = float(experience.advantages.abs().sum())
        self.seen["spread"] = self.seen.get("spread", 0.0) + spread
        if self.invokes:
            count = sum(len(rollout.invocations) for rollout in experience.rollouts)
            self.seen["invocations"] = self.seen.get("invocations", 0.0) + count

    def note_gradient(self, norm: float) -> None:
        """Sets the gradient norm of a supervised update, the same on every process."""
        self.seen["gradient"] = norm

    def on_step_end(self, args: Any, state: Any, control: Any, **_given: Any) -> None:  # noqa: ARG002
        names = sorted(self.seen)
        own = torch.tensor([self.seen[name] for name in names], device=args.device)
        values = self.trainer.accelerator.reduce(own).tolist() if names else []
        self.seen.clear()
        self.updates += 1
        for name, value in zip(names, values, strict=True):
            self.row[name] = 0 if value else self.row[name] + 1
            self.total[name] += not value
            if self.row[name] == PATIENCE and state.is_world_process_zero:
                log.warning("warning: in the last %d updates %s (%s)", PATIENCE, REASONS[name], PAGE)

    def on_train_end(self, args: Any, state: Any, control: Any, **_given: Any) -> None:  # noqa: ARG002
        if state.is_world_process_zero:
            for name, count in self.total.items():
                if 2 * count >= self.updates > 0:
                    log.warning("warning: in %d of %d updates %s (%s)", count, self.updates, REASONS[name], PAGE)
