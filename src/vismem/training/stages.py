"""The stages: what each trains, with which objective, and who invokes memory.

Three stages train a memory, one after the other. The baselines train a LoRA adapter of the language model instead,
without memory (`baselines.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STAGES = ("warmup", "stage1", "stage2")
BASELINES = ("sft", "grpo")
ADAPTER_FILE = "adapter_config.json"  # distinguishes a baseline's adapter from a memory


@dataclass(frozen=True)
class Plan:
    """One stage.

    Args:
        trains: parts of the memory, as `VisMem.parameters_of` names them, or `("adapter",)`.
        objective: cross-entropy of the reference replies, or GRPO on trajectories.
        invokes: who invokes memory: the reference reply (or chance if it does not), chance, the model, or nobody.
    """

    trains: tuple[str, ...]
    objective: Literal["cross-entropy", "grpo"]
    invokes: Literal["reply", "chance", "model", "nobody"]

    @property
    def supervised(self) -> bool:
        """Whether it learns from reference replies."""
        return self.objective == "cross-entropy"

    @property
    def adapts(self) -> bool:
        """Whether it trains a LoRA adapter of the language model, and no memory."""
        return self.trains == ("adapter",)

    @property
    def forms(self) -> bool:
        """Whether it learns to form memories; otherwise an update reuses those of the rollout."""
        return "short" in self.trains

    @property
    def result(self) -> str:
        """Name of the folder with the run's result."""
        return "adapter" if self.adapts else "memory"


FORMATION = ("builder", "short", "long")
PLANS = {
    "warmup": Plan(FORMATION, "cross-entropy", "reply"),
    "stage1": Plan(FORMATION, "grpo", "chance"),
    "stage2": Plan(("tokens",), "grpo", "model"),
    "sft": Plan(("adapter",), "cross-entropy", "nobody"),
    "grpo": Plan(("adapter",), "grpo", "nobody"),
}
