"""What happened while decoding: invocations, and the output that `generate` returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers.utils import ModelOutput

from vismem.config import Kind
from vismem.memory.choice import Choice


@dataclass
class Invocation:
    """One invocation in an answer.

    Args:
        kind: `"short"` or `"long"`.
        position: index of the invocation token among the row's new tokens.
        length: memory vectors inserted; 0 if the policy lets this kind form nothing.
        forced: True if a policy inserted it, False if the model sampled it.
        memory: the vectors themselves [length, d]; not part of comparisons or of `to_dict`.
        states: with `record=True`, the observed states [z, d] that the query was built from (H without the image).
        choice: with `memory_init="attended"`, the blocks of the image that a short memory's vectors started from.
    """

    kind: Kind
    position: int
    length: int
    forced: bool
    memory: Tensor | None = field(default=None, repr=False, compare=False)
    states: Tensor | None = field(default=None, repr=False, compare=False)
    choice: Choice | None = field(default=None, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `blocks` has image, row, column and probability of each vector's block."""
        found: dict[str, Any] = {
            "kind": self.kind,
            "position": self.position,
            "length": self.length,
            "forced": self.forced,
        }
        if self.choice is not None:
            sure = self.choice.log_probs.exp().tolist()
            found["blocks"] = [
                {"image": image, "row": row, "column": column, "probability": round(p, 4)}
                for (image, row, column), p in zip(self.choice.places, sure, strict=True)
            ]
        return found


@dataclass(frozen=True)
class Top:
    """Log-probabilities at one sampled token, before temperature, penalties and truncation.

    Args:
        log_prob: of the token.
        likeliest: ids and log-probabilities of the likeliest tokens, most likely first.
    """

    log_prob: float
    likeliest: list[tuple[int, float]]


@dataclass
class Rollout:
    """One answer as training needs it: which tokens were sampled, with which probabilities, and which inserted.

    Args:
        tokens: the answer's ids [T], invocation and end ids among them.
        sampled: bool [T], False for inserted tokens.
        allowed: bool [T, 2], which kinds the row might have invoked at each token, in the order of `config.KINDS`.
        log_probs: float32 [T], of the sampled tokens under the distribution they were sampled from; 0 elsewhere.
        invocations: the answer's invocations, with their memories and observed states.
    """

    tokens: Tensor
    sampled: Tensor
    allowed: Tensor
    log_probs: Tensor
    invocations: list[Invocation]


@dataclass
class VisMemOutput(ModelOutput):
    """What `VisMem.generate(..., return_dict_in_generate=True)` returns.

    Args:
        sequences: LongTensor [batch, prompt + new]; invocation and end ids are in it, memory slots are not.
        scores: with `output_scores`, for each new position the processed scores [batch, vocabulary] that its token
            was sampled from. An inserted token has 0 for itself and -inf elsewhere: it was certain.
        logits: with `output_logits`, the same before processors and before any token was forbidden.
        invocations: for each row its invocations, in order.
        rollout: with `record=True`, for each row a `Rollout`.
    """

    sequences: Tensor = None  # type: ignore[assignment]  # is always there; ModelOutput asks for a default
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    invocations: list[list[Invocation]] = None  # type: ignore[assignment]  # is always there too
    rollout: list[Rollout] | None = None
