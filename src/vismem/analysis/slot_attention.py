"""What attends to memory: an answer's attention to memory slots, visual tokens, the prompt's text and itself.

`VisMem.forward` reads finished answers again with their memories in place and eager attention in the language model;
the weights are reduced layer by layer.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vismem.analysis.rollouts import replay_inputs
from vismem.config import Kind
from vismem.decoding.trace import Rollout
from vismem.model import VisMem
from vismem.reading.attention import attention_weights
from vismem.reading.splice import Splice, find_invocations

GROUPS = ("memory", "visual", "prompt", "answer")  # every position of a sequence belongs to exactly one


@dataclass(frozen=True)
class SlotAttention:
    """What the tokens of one answer attended to, as means over heads.

    Args:
        row: index of the answer.
        kinds: of its invocations.
        positions: index of each invocation's token among the answer's tokens.
        slots: for each invocation its slots' weights, float32 [layers, tokens, N]; 0 before it.
        shares: for each of `GROUPS` float32 [layers, tokens], summing to 1: slots of any kind, visual tokens, the
            prompt's other tokens, the answer's tokens up to this one.
    """

    row: int
    kinds: list[Kind]
    positions: list[int]
    slots: list[Tensor]
    shares: dict[str, Tensor]

    def after(self, index: int) -> Tensor:
        """[layers, later tokens, N]: weights on an invocation's slots from its end token on."""
        return self.slots[index][:, self.positions[index] + 1 :]

    def until_next(self, index: int) -> Tensor:
        """[layers, tokens, N]: the same up to the next invocation of that kind, which replaces this memory."""
        later = zip(self.kinds[index + 1 :], self.positions[index + 1 :], strict=True)
        end = next((place for kind, place in later if kind == self.kinds[index]), self.slots[index].shape[1])
        return self.slots[index][:, self.positions[index] + 1 : end]

    def reading(self, index: int) -> Tensor:
        """Deprecated name of `until_next`."""
        warnings.warn("SlotAttention.reading is now SlotAttention.until_next", DeprecationWarning, stacklevel=2)
        return self.until_next(index)


@torch.no_grad()
def attention_to_slots(model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout]) -> list[SlotAttention]:
    """How much each token of finished answers attends to memory, to visual tokens, to the prompt and to the answer.

    Takes one forward with eager attention, so time and memory grow with the square of the length.

    Args:
        model: the model.
        inputs: the processor's output for B prompts, padded on the left.
        rollouts: n answers to each prompt, prompt by prompt, from `generate(..., record=True)`.

    Returns:
        A `SlotAttention` for each answer; tensors are on the CPU.

    Raises:
        ValueError: if the answers do not match the prompts, or a layer of the base's language model returns no
            attention weights.

    Example:
        >>> out = model.generate(**inputs, record=True, return_dict_in_generate=True)
        >>> attention_to_slots(model, inputs, out.rollout)[0].shares["memory"].mean()
    """
    call = replay_inputs(model, inputs, rollouts)
    ids, start, memories = call["input_ids"], call["prompt_length"], call["memories"]
    places = find_invocations(ids, [start] * len(ids), model.tokens.invocation_ids, model.tokens.end_ids)
    splice = Splice(places, memories, ids.shape[1])
    reducer = AttentionReducer(splice, ids == model.backbone.image_token_id, start)
    with attention_weights(model.backbone, reducer.add):
        model(**call, logits_to_keep=1)
    slots, shares = reducer.result()
    found = []
    for row, rollout in enumerate(rollouts):
        kept = splice.kept[row, start : start + len(rollout.tokens)] - start
        lengths = [0 if memory is None else len(memory) for memory in memories[row]]
        mine, own = slots[:, row, kept, : sum(lengths)], shares[:, row, kept]
        found.append(
            SlotAttention(
                row,
                [invocation.kind for invocation in rollout.invocations],
                [invocation.position for invocation in rollout.invocations],
                list(mine.split(lengths, dim=-1)) if lengths else [],
                {name: own[..., group].contiguous() for group, name in enumerate(GROUPS)},
            )
        )
    return found


class AttentionReducer:
    """Reduces attention weights to slots and groups as the layers compute them.

    A sequence may be read in parts: a cached prefix and the rest. Keys that a windowed layer has dropped are missing on
    the left.

    Args:
        splice: where memories lie in the sequences of E positions.
        visual: bool [n, L], the visual tokens of the sequences without memories.
        start: length of the prompt; its queries are skipped.
    """

    def __init__(self, splice: Splice, visual: Tensor, start: int) -> None:
        source, self.start = splice.source, start
        group = torch.where(source >= start, GROUPS.index("answer"), GROUPS.index("prompt"))
        group[visual.cpu().gather(1, source) & (source < start)] = GROUPS.index("visual")
        group[splice.slot] = GROUPS.index("memory")
        self.groups = nn.functional.one_hot(group, len(GROUPS)).float()  # [n, E, groups]
        rows = [row.nonzero().flatten() for row in splice.slot]
        # [n, S]: positions of each row's slots, padded with -1, whose weights are meaningless.
        self.slots = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        self.read: dict[int, int] = defaultdict(int)  # positions seen by each layer
        self.parts: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def add(self, layer: int, weights: Tensor) -> None:
        """Adds a layer's weights [n, heads, queries, keys] of its next queries."""
        before, queries, keys = self.read[layer], *weights.shape[2:]
        self.read[layer] = end = before + queries
        if end <= self.start:  # the prompt, which rows may share
            return
        mean = weights[:, :, max(self.start - before, 0) :].mean(1, dtype=torch.float32)  # [n, queries, keys]
        shares = mean @ self.groups[:, end - keys : end].to(mean)
        index = (self.slots - (end - keys)).to(mean.device)
        at = index.clamp(0, keys - 1)[:, None].expand(-1, mean.shape[1], -1)
        slots = mean.gather(2, at) * (index < keys)[:, None]  # later slots are not read yet
        self.parts[layer].append((slots.cpu(), shares.cpu()))

    def result(self) -> tuple[Tensor, Tensor]:
        """Weights [layers, n, E - start, S] and shares [layers, n, E - start, groups]."""
        layers = [[torch.cat(part, 1) for part in zip(*parts, strict=True)] for parts in self.parts.values()]
        slots, shares = (torch.stack(part) for part in zip(*layers, strict=True))
        return slots, shares
