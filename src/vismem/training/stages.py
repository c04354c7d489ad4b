"""The stages as a table: what each trains, by which objective, and who invokes memory meanwhile.

Three train a memory and follow each other. The baselines train a LoRA adapter of the language model instead, with no
memory in sight: what a memory is compared with (`baselines.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

STAGES = ("warmup", "stage1", "stage2")
BASELINES = ("sft", "grpo")
ADAPTER_FILE = "adapter_config.json"  # tells a baseline's adapter from a memory


@dataclass(frozen=True)
class Plan:
    """What a stage does.

    Args:
        trains: parts of the memory, as `VisMem.parameters_of` names them, or `("adapter",)`.
        objective: cross-entropy of the reference replies, or GRPO on trajectories.
        invokes: who invokes memory: the reference reply (or chance, where it names none), chance, the model, nobody.
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
        """Whether it learns to form memories; otherwise an update takes them as they were."""
        return "short" in self.trains

    @property
    def result(self) -> str:
        """Name of the folder that a run leaves."""
        return "adapter" if self.adapts else "memory"


FORMATION = ("builder", "short", "long")
PLANS = {
    "warmup": Plan(FORMATION, "cross-entropy", "reply"),
    "stage1": Plan(FORMATION, "grpo", "chance"),
    "stage2": Plan(("tokens",), "grpo", "model"),
    "sft": Plan(("adapter",), "cross-entropy", "nobody"),
    "grpo": Plan(("adapter",), "grpo", "nobody"),
}
