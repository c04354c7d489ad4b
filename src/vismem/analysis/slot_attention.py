"""Who looks at memory: attention of an answer's tokens to memory slots, visual tokens, the prompt's text and itself.

Finished answers are read again by `VisMem.forward`, with their memories in place and eager attention in the language
model, whose weights are reduced layer by layer as they come. Where memory itself looked is in `looks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vismem.config import Kind
from vismem.decoding.trace import Rollout
from vismem.model import VisMem
from vismem.reading.splice import Splice, find_invocations
from vismem.training.replay import collate

GROUPS = ("memory", "visual", "prompt", "answer")  # what a token can attend to; every place of a sequence is in one


@dataclass(frozen=True)
class SlotAttention:
    """What the tokens of one answer attended to, as means over heads; row t is of token t as it is read.

    Args:
        row: index of the answer.
        kinds: of its invocations.
        positions: index of each invocation's token among the answer's tokens.
        slots: for each invocation float32 [layers, tokens, N]: weights on its slots, 0 before it.
        shares: for each of `GROUPS` float32 [layers, tokens]: slots of any kind, visual tokens, the prompt's other
            tokens, the answer's tokens up to this one. They add up to 1.
    """

    row: int
    kinds: list[Kind]
    positions: list[int]
    slots: list[Tensor]
    shares: dict[str, Tensor]

    def after(self, index: int) -> Tensor:
        """[layers, later tokens, N]: what an invocation's slots get from its end token and all tokens after it."""
        return self.slots[index][:, self.positions[index] + 1 :]

    def reading(self, index: int) -> Tensor:
        """[layers, tokens, N]: the same up to the next invocation of that kind, whose memory is the fresher one."""
        later = zip(self.kinds[index + 1 :], self.positions[index + 1 :], strict=True)
        end = next((place for kind, place in later if kind == self.kinds[index]), self.slots[index].shape[1])
        return self.slots[index][:, self.positions[index] + 1 : end]


@torch.no_grad()
def attention_to_slots(model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout]) -> list[SlotAttention]:
    """How much every token of finished answers attends to memory, to what it sees, to the prompt and to the answer.

    Costs one forward with eager attention, so time and memory grow with the square of the length.

    Args:
        model: the model.
        inputs: the processor's output for B prompts, padded on the left.
        rollouts: n answers to each prompt, one after another, as `generate(..., record=True)` gives them.

    Returns:
        A `SlotAttention` for each answer; tensors are on the CPU.

    Raises:
        ValueError: if the answers do not fit the prompts, or the base's language model has layers without weights.

    Example:
        >>> out = model.generate(**inputs, record=True, return_dict_in_generate=True)
        >>> attention_to_slots(model, inputs, out.rollout)[0].shares["memory"].mean()
    """
    if not rollouts or len(rollouts) % len(inputs["input_ids"]):
        raise ValueError(
            f"{len(rollouts)} rollouts for {len(inputs['input_ids'])} prompts; give as many for each prompt, in order"
        )
    call = collate(dict(inputs), list(rollouts), model.processor.tokenizer.pad_token_id or 0, True, 1.0)
    call = {name: value for name, value in call.items() if name not in ("sampled", "allowed", "temperature")}
    ids, start, memories = call["input_ids"], call["prompt_length"], call["memories"]
    places = find_invocations(ids, [start] * len(ids), model.tokens.invocation_ids, model.tokens.end_ids)
    splice = Splice(places, memories, ids.shape[1])
    reading = Reading(groups_of(splice, ids, start, model.backbone.image_token_id), slots_of(splice), start)
    with eager(model), reading.of(attention_layers(model)):
        model(**call, logits_to_keep=1)
    slots, shares = reading.result()  # [layers, n, E - start, S] and [layers, n, E - start, groups]
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


def groups_of(splice: Splice, ids: Tensor, start: int, image_token: int) -> Tensor:
    """One-hot [n, E, groups]: which of `GROUPS` each place of the sequences with memories belongs to."""
    source = splice.source
    seen = (ids.cpu() == image_token).gather(1, source)
    group = torch.where(source >= start, GROUPS.index("answer"), GROUPS.index("prompt"))
    group = group.masked_fill(seen & (source < start), GROUPS.index("visual"))
    return nn.functional.one_hot(group.masked_fill(splice.slot, GROUPS.index("memory")), len(GROUPS)).float()


def slots_of(splice: Splice) -> Tensor:
    """[n, S]: the places of each row's slots, in order; -1 where a row has fewer, whose weights mean nothing."""
    rows = [row.nonzero().flatten() for row in splice.slot]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


class Reading:
    """Reduces attention weights as the layers of a reading give them.

    A reading may come in parts, a cached beginning and the rest; each layer counts what it has read. Keys that a layer
    with a window has dropped are missing at the left.

    Args:
        groups: one-hot [n, E, groups] of all places.
        slots: [n, S] places of slots, -1 where there is none.
        start: places before it are not asked for.
    """

    def __init__(self, groups: Tensor, slots: Tensor, start: int) -> None:
        self.groups, self.slots, self.start = groups, slots, start
        self.read: dict[int, int] = {}
        self.parts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    @contextmanager
    def of(self, layers: list[nn.Module]) -> Iterator[None]:
        """Listens to these layers while the context lasts."""
        with ExitStack() as stack:
            for depth, layer in enumerate(layers):
                self.read[depth], self.parts[depth] = 0, []

                def hook(module: nn.Module, args: Any, output: Any, depth: int = depth) -> None:
                    self.take(depth, output[1] if isinstance(output, tuple) and len(output) > 1 else None)

                stack.callback(layer.register_forward_hook(hook).remove)
            yield

    def take(self, depth: int, weights: Tensor | None) -> None:
        """Weights [n, heads, queries, keys] of the next queries of layer `depth`."""
        if weights is None:
            raise ValueError(
                f"layer {depth} of the language model gives no attention weights, even with eager attention"
            )
        before, queries, keys = self.read[depth], *weights.shape[2:]
        self.read[depth] = end = before + queries
        if end <= self.start:  # a prompt; rows may share it
            return
        mean = weights[:, :, max(self.start - before, 0) :].mean(1, dtype=torch.float32)  # [n, queries, keys]
        shares = mean @ self.groups[:, end - keys : end].to(mean)
        index = (self.slots - (end - keys)).to(mean.device)
        at = index.clamp(0, keys - 1)[:, None].expand(-1, mean.shape[1], -1)
        slots = mean.gather(2, at) * (index < keys)[:, None]  # not read yet, in a first part
        self.parts[depth].append((slots.cpu(), shares.cpu()))

    def result(self) -> tuple[Tensor, Tensor]:
        """Weights [layers, n, E - start, S] and shares [layers, n, E - start, groups]."""
        layers = [[torch.cat(part, 1) for part in zip(*parts, strict=True)] for parts in self.parts.values()]
        slots, shares = (torch.stack(part) for part in zip(*layers, strict=True))
        return slots, shares


def attention_layers(model: VisMem) -> list[nn.Module]:
    """The language model's attention modules, layer by layer.

    Raises:
        ValueError: if it has layers of another kind.
    """
    layers = getattr(model.backbone.language_model, "layers", None) or []
    found: list[Any] = [getattr(layer, "self_attn", None) for layer in layers]
    if not found or any(attention is None for attention in found):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        raise ValueError(
            f"the language model of {model.backbone.model_type} has no attention to show in every layer ({kinds}); "
            "only layers with `self_attn` give weights"
        )
    return found


@contextmanager
def eager(model: VisMem) -> Iterator[None]:
    """Eager attention in the base's language model while the context lasts, and then what it had before."""
    config: Any = model.backbone.language_model.config
    before = config._attn_implementation
    config._attn_implementation = "eager"  # as `set_attn_implementation` does, which refuses code that came along
    try:
        yield
    finally:
        config._attn_implementation = before
