"""What long-term memory read: attention of the long former's memory positions over the segment, the query and memory.

Readings are recomputed from finished answers with recorded states, as looks are (`looks.py`): the former runs as ever,
with eager attention in the language model, whose weights are reduced layer by layer as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vismem.analysis.slot_attention import attention_layers, eager
from vismem.decoding.trace import Rollout
from vismem.model import VisMem
from vismem.reading.splice import batches_of_similar_length


@dataclass(frozen=True)
class Reading:
    """One long-term invocation's reading of its segment. Weights are means over the language model's heads.

    Args:
        row: index of the answer.
        index: of the invocation in that answer.
        tokens: ids [z] of the segment: what the answer wrote since its last invocation, the invocation token included.
        weights: float32 [layers, N, z], attention of each memory vector's position to each token of the segment; 0
            where a layer's window does not reach.
        rest: for each other place that attention went to, float32 [layers, N]: `"query"`, and `"memory"`, which are
            the memory's own positions up to this one. With all of `weights` it adds up to 1.
        memory: the vectors that the reading formed [N, d].
    """

    row: int
    index: int
    tokens: list[int]
    weights: Tensor
    rest: dict[str, Tensor]
    memory: Tensor

    def mean(self, layer: int | None = None, vector: int | None = None) -> Tensor:
        """[z]: the weights of the segment's tokens, mean over layers and vectors but for those that are named."""
        weights = self.weights.mean(0) if layer is None else self.weights[layer]
        return weights.mean(0) if vector is None else weights[vector]

    def shares(self) -> dict[str, Tensor]:
        """Where attention went, float32 [layers, N] each, 1 in all: `"segment"`, `"query"`, `"memory"`."""
        return {"segment": self.weights.sum(-1), **self.rest}


@torch.no_grad()
def readings(model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout]) -> list[Reading]:
    """What the long-term invocations of finished answers read.

    Args:
        model: the model that wrote them.
        inputs: the processor's output for B prompts.
        rollouts: n answers to each prompt, one after another, as `generate(..., record=True)` gives them.

    Returns:
        A `Reading` for each long-term invocation that formed a memory, by row and index; tensors are on the CPU.

    Raises:
        ValueError: if states are missing, answers do not fit the prompts, memory is not formed, or the base's language
            model has layers without weights.

    Example:
        >>> out = model.generate(**inputs, record=True, return_dict_in_generate=True)
        >>> (reading,) = readings(model, inputs, out.rollout)
        >>> processor.tokenizer.decode(reading.tokens), reading.mean()
    """
    if model.memory_config.content != "formed":
        raise ValueError(f"memory with content={model.memory_config.content!r} reads nothing: it is not formed")
    prompts = len(inputs["input_ids"])
    if not rollouts or len(rollouts) % prompts:
        raise ValueError(f"{len(rollouts)} rollouts for {prompts} prompts; give as many for each prompt, in order")
    wanted = [
        (row, index, invocation)
        for row, rollout in enumerate(rollouts)
        for index, invocation in enumerate(rollout.invocations)
        if invocation.kind == "long" and invocation.length
    ]
    for row, index, invocation in wanted:
        if invocation.states is None:
            raise ValueError(
                f"invocation {index} of answer {row} has no states; call generate with record=True and "
                "return_dict_in_generate=True"
            )
    if not wanted:
        return []
    former: Any = model.memory.long
    copies = len(rollouts) // prompts
    visual = model.backbone.prompt_visual_states(inputs["input_ids"], inputs)
    segments = [segment_of(rollouts[row], index) for row, index, _ in wanted]
    found: list[Reading] = []
    for batch in batches_of_similar_length([len(segment) for segment in segments]):
        query = model.memory.builder(
            [visual[wanted[i][0] // copies] for i in batch], [wanted[i][2].states for i in batch]
        )
        embeds = [model.tokens.embed(segments[i].to(inputs["input_ids"].device)) for i in batch]
        with weighed(model, len(former.memory_init)) as layers:
            memories = former(query, embeds)
        stacked = torch.stack(layers, dim=1)  # [n, layers, N, E]
        for i, weights, memory in zip(batch, stacked, memories, strict=True):
            (row, index, _), length = wanted[i], len(segments[i])
            ends = [length, query.shape[1], weights.shape[1]]
            words, queries, own = weights[..., -sum(ends) :].split(ends, dim=-1)  # padding is at the left
            rest = {"query": queries.sum(-1), "memory": own.sum(-1)}
            found.append(Reading(row, index, segments[i].tolist(), words.contiguous(), rest, memory.cpu()))
    return sorted(found, key=lambda reading: (reading.row, reading.index))


def segment_start(rollout: Rollout, index: int) -> int:
    """Where the segment that an invocation ends starts among the answer's tokens: after the last end token."""
    return rollout.invocations[index - 1].position + 2 if index else 0


def segment_of(rollout: Rollout, index: int) -> Tensor:
    """Ids [z] of the segment that an invocation ends, its own token included."""
    return rollout.tokens[segment_start(rollout, index) : rollout.invocations[index].position + 1]


@contextmanager
def weighed(model: VisMem, last: int) -> Iterator[list[Tensor]]:
    """Eager attention while the context lasts, and a list that every layer adds its weights to, mean over heads.

    Args:
        model: the model.
        last: how many last positions are asked for.

    Yields:
        The list, of float32 [n, last, positions] on the CPU.
    """
    found: list[Tensor] = []

    def hook(module: torch.nn.Module, args: Any, output: Any) -> None:
        weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
        if weights is None:
            raise ValueError(
                f"layer {len(found)} of the language model gives no attention weights, even with eager attention"
            )
        found.append(weights[:, :, -last:].mean(1, dtype=torch.float32).cpu())

    with eager(model), ExitStack() as stack:
        for layer in attention_layers(model):
            stack.callback(layer.register_forward_hook(hook).remove)
        yield found
