"""What long-term memory attends to: the long former's memory positions over the segment, the query and itself.

Recomputed from finished answers with recorded states: the former runs again with eager attention in the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vismem.analysis.rollouts import answers_per_prompt, recorded_invocations, segment_of
from vismem.decoding.trace import Rollout
from vismem.deprecation import renamed
from vismem.model import VisMem
from vismem.reading.attention import attention_weights
from vismem.reading.splice import batches_of_similar_length


@dataclass(frozen=True)
class LongTermAttention:
    """What one long-term memory attended to while it was formed. Weights are means over the language model's heads.

    Args:
        row: index of the answer.
        index: of the invocation in that answer.
        tokens: ids [z] of the segment: the answer since its last invocation, including the invocation token.
        weights: float32 [layers, N, z], attention of each memory position to each token of the segment; 0 outside a
            layer's window.
        rest: the remaining attention, float32 [layers, N] each: `"query"`, and `"memory"` for the memory's own
            positions up to this one. Sums to 1 with `weights`.
        memory: the memory [N, d].
    """

    row: int
    index: int
    tokens: list[int]
    weights: Tensor
    rest: dict[str, Tensor]
    memory: Tensor

    def mean(self, layer: int | None = None, vector: int | None = None) -> Tensor:
        """[z]: weights of the segment's tokens, of one layer and vector or averaged over all."""
        weights = self.weights.mean(0) if layer is None else self.weights[layer]
        return weights.mean(0) if vector is None else weights[vector]

    def shares(self) -> dict[str, Tensor]:
        """Fractions of attention, float32 [layers, N] each, summing to 1: `"segment"`, `"query"`, `"memory"`."""
        return {"segment": self.weights.sum(-1), **self.rest}


@torch.no_grad()
def long_term_attention(
    model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout]
) -> list[LongTermAttention]:
    """What the long-term memories of finished answers attended to.

    Args:
        model: the model that wrote them.
        inputs: the processor's output for B prompts.
        rollouts: n answers to each prompt, prompt by prompt, from `generate(..., record=True)`.

    Returns:
        One entry for each long-term invocation that formed a memory, by row and index; tensors are on the CPU.

    Raises:
        ValueError: if states are missing, the answers do not match the prompts, memory is not formed, or a layer of the
            base's language model returns no attention weights.

    Example:
        >>> out = model.generate(**inputs, record=True, return_dict_in_generate=True)
        >>> (attention,) = long_term_attention(model, inputs, out.rollout)
        >>> processor.tokenizer.decode(attention.tokens), attention.mean()
    """
    copies = answers_per_prompt(rollouts, inputs)
    wanted = recorded_invocations(model, [rollout.invocations for rollout in rollouts], "long")
    if not wanted:
        return []
    former: Any = model.memory.long
    visual = model.backbone.prompt_visual_states(inputs["input_ids"], inputs)
    segments = [segment_of(rollouts[row], index) for row, index, _ in wanted]
    layers: list[Tensor] = []  # each [n, N, E]

    def receive(_layer: int, weights: Tensor) -> None:
        layers.append(weights[:, :, -len(former.memory_init) :].mean(1, dtype=torch.float32).cpu())

    found: list[LongTermAttention] = []
    for batch in batches_of_similar_length([len(segment) for segment in segments]):
        query = model.memory.builder(
            [visual[wanted[i][0] // copies] for i in batch], [wanted[i][2].states for i in batch]
        )
        embeds = [model.tokens.embed(segments[i].to(inputs["input_ids"].device)) for i in batch]
        layers.clear()
        with attention_weights(model.backbone, receive):
            memories = former(query, embeds)
        stacked = torch.stack(layers, dim=1)  # [n, layers, N, E]
        for i, weights, memory in zip(batch, stacked, memories, strict=True):
            (row, index, _), length = wanted[i], len(segments[i])
            ends = [length, query.shape[1], weights.shape[1]]
            words, queries, own = weights[..., -sum(ends) :].split(ends, dim=-1)  # padding is on the left
            rest = {"query": queries.sum(-1), "memory": own.sum(-1)}
            found.append(LongTermAttention(row, index, segments[i].tolist(), words.contiguous(), rest, memory.cpu()))
    return sorted(found, key=lambda each: (each.row, each.index))


__getattr__ = renamed(__name__, {"Reading": "LongTermAttention", "readings": "long_term_attention"})
