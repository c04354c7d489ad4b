"""Finished answers as the analyses need them: matched with their prompts, as forward arguments, cut into segments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vismem.config import Kind
from vismem.decoding.trace import Invocation, Rollout
from vismem.model import VisMem
from vismem.training.replay import collate


def answers_per_prompt(rollouts: Sequence[Rollout], inputs: dict[str, Tensor]) -> int:
    """How many answers each prompt has. Raises ValueError if the answers do not match the prompts."""
    prompts = len(inputs["input_ids"])
    if not rollouts or len(rollouts) % prompts:
        raise ValueError(
            f"{len(rollouts)} rollouts for {prompts} prompts; pass the same number for each prompt, in order"
        )
    return len(rollouts) // prompts


def replay_inputs(model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Arguments of `VisMem.forward` that read finished answers with their memories in place.

    Raises ValueError if the answers do not match the prompts.
    """
    answers_per_prompt(rollouts, inputs)
    pad = model.processor.tokenizer.pad_token_id or 0
    call = collate(dict(inputs), list(rollouts), pad, formed=True, temperature=1.0)
    return {name: value for name, value in call.items() if name not in ("sampled", "allowed", "temperature")}


def recorded_invocations(
    model: VisMem, answers: Sequence[Sequence[Invocation]], kind: Kind
) -> list[tuple[int, int, Invocation]]:
    """Row, index and invocation of every memory of one kind that was formed.

    Raises ValueError if the model does not form memory, or if an invocation has no states.
    """
    if model.memory_config.content != "formed":
        raise ValueError(f"memory with content={model.memory_config.content!r} is not formed, so it attends to nothing")
    found = [
        (row, index, invocation)
        for row, invocations in enumerate(answers)
        for index, invocation in enumerate(invocations)
        if invocation.kind == kind and invocation.length
    ]
    for row, index, invocation in found:
        if invocation.states is None:
            raise ValueError(
                f"invocation {index} of answer {row} has no states; call generate with record=True and "
                "return_dict_in_generate=True"
            )
    return found


def segment_start(rollout: Rollout, index: int) -> int:
    """Index of the first token of an invocation's segment: the one after the last end token."""
    return rollout.invocations[index - 1].position + 2 if index else 0


def segment_of(rollout: Rollout, index: int) -> Tensor:
    """Ids [z] of an invocation's segment, including its own token."""
    return rollout.tokens[segment_start(rollout, index) : rollout.invocations[index].position + 1]
