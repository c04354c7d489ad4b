"""Inserts memories into finished sequences, and reads batches with them in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache

from vismem.backbones import Backbone
from vismem.config import Kind


@dataclass(frozen=True)
class InvocationSite:
    """One invocation in `input_ids`.

    Args:
        kind: `"short"` or `"long"`.
        index: of its token.
        segment_start: index of the first token of its segment.
    """

    kind: Kind
    index: int
    segment_start: int


def find_invocations(
    input_ids: Tensor, starts: list[int], invocation_ids: dict[Kind, int], end_ids: dict[Kind, int]
) -> list[list[InvocationSite]]:
    """Invocations in `input_ids` [B, L], row by row: an invocation token at or after `starts`, and its end token."""
    kind_of = {index: kind for kind, index in invocation_ids.items()}
    rows = []
    for row, segment in zip(input_ids.tolist(), starts, strict=True):
        found = []
        for index in range(segment, len(row) - 1):
            kind = kind_of.get(row[index])
            if kind is not None and row[index + 1] == end_ids[kind]:
                found.append(InvocationSite(kind, index, segment))
                segment = index + 2
        rows.append(found)
    return rows


def batches_of_similar_length(lengths: list[int]) -> list[list[int]]:
    """Indices of `lengths` as one batch, or as the two with the least padding if that saves a quarter or more.

    Example:
        >>> batches_of_similar_length([3, 40, 5, 4, 38])
        [[0, 3, 2], [4, 1]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    if not order:
        return []
    longest = lengths[order[-1]]
    spared = [cut * (longest - lengths[order[cut - 1]]) for cut in range(1, len(order))]
    if not spared or max(spared) * 4 < longest * len(order) or longest == 0:
        return [order]
    cut = spared.index(max(spared)) + 1
    return [order[:cut], order[cut:]]


class Splice:
    """The map from a batch [B, L] to the same batch with memories after their invocation tokens [B, E].

    Args:
        places: for each row its invocations.
        memories: for each row and invocation the vectors [N, d], or None where nothing is inserted.
        length: L.
    """

    def __init__(self, places: list[list[InvocationSite]], memories: list[list[Tensor | None]], length: int) -> None:
        self.memories = [m for row in memories for m in row if m is not None]
        rows = []
        for found, formed in zip(places, memories, strict=True):
            size = {p.index: len(m) for p, m in zip(found, formed, strict=True) if m is not None}
            row = []  # (index of the token at or before, how far it moved, whether it is a slot)
            moved = 0
            for index in range(length):
                row.append((index, moved, 0))
                row += [(index, moved + 1 + slot, 1) for slot in range(size.get(index, 0))]
                moved += size.get(index, 0)
            rows.append(row)
        widest = max(len(row) for row in rows)
        self.real = torch.tensor([[1] * len(row) + [0] * (widest - len(row)) for row in rows])
        table = torch.tensor([row + [(0, 0, 0)] * (widest - len(row)) for row in rows])  # [B, E, 3]
        self.source, self.moved, self.slot = table[..., 0], table[..., 1], table[..., 2].bool()
        own = (self.real == 1) & ~self.slot
        self.kept = own.nonzero()[:, 1].view(len(rows), length)

    def embeddings(self, embeds: Tensor) -> Tensor:
        """[B, L, d] to [B, E, d], with the memories in their slots."""
        index = self.source.to(embeds.device)[..., None].expand(-1, -1, embeds.shape[-1])
        spread = embeds.gather(1, index)
        if not self.memories:
            return spread
        return spread.masked_scatter(self.slot.to(embeds.device)[..., None], torch.cat(self.memories).to(embeds))

    def mask(self, attention_mask: Tensor) -> Tensor:
        """[B, L] to [B, E]: slots count as real, padding up to the longest row does not."""
        device = attention_mask.device
        spread = attention_mask.gather(1, self.source.to(device))
        return spread.masked_fill(self.slot.to(device), 1) * self.real.to(attention_mask)

    def per_token(self, values: Tensor) -> Tensor:
        """[B, L] to [B, E], with 0, which is text, for slots and padding."""
        spread = values.gather(1, self.source.to(values.device))
        return spread.masked_fill((self.slot | (self.real == 0)).to(values.device), 0)

    def positions(self, positions: Tensor) -> Tensor:
        """[..., B, L] to [..., B, E]: slots continue from their invocation token, and what follows shifts."""
        index = self.source.to(positions.device).expand(*positions.shape[:-1], -1)
        return positions.gather(-1, index) + self.moved.to(positions)

    def gather(self, hidden: Tensor) -> Tensor:
        """[B, E, d] back to [B, L, d]: the states at the tokens."""
        return hidden.gather(1, self.kept.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1]))


class Reader:
    """Reads one batch through the base, repeatedly, with different memories in place.

    Args:
        backbone: of the base model.
        embeds: input embeddings [B, L, d], image placeholders not yet filled.
        mask: attention mask [B, L].
        positions: position ids [..., B, L].
        features: what `Backbone.image_features` returned, or None.
        copies: that many consecutive rows share their prompt, and `features` are those of the first of each.
        known: further per-token inputs of the base, by name (`Backbone.token_inputs`): [B, at most L], once per prompt
            if rows share theirs. As in the base's own decoding, what follows a cache is text.
        checkpointing: recompute the base's layers in the backward pass instead of keeping their activations.
    """

    def __init__(
        self,
        backbone: Backbone,
        embeds: Tensor,
        mask: Tensor,
        positions: Tensor,
        features: Any | None,
        copies: int = 1,
        known: dict[str, Tensor] | None = None,
        *,
        checkpointing: bool = False,
    ) -> None:
        self.backbone, self.embeds, self.mask, self.positions = backbone, embeds, mask, positions
        self.images = None if features is None else {"image": features}
        self.copies, self.checkpointing = copies, checkpointing
        self.known = {
            name: nn.functional.pad(values, (0, embeds.shape[1] - values.shape[1]))
            for name, values in (known or {}).items()
        }
        self.cache: DynamicCache | None = None
        self.prefix = embeds[:, :0]

    def read_prefix(self, length: int) -> None:
        """Reads the first `length` tokens once; every later read continues from there.

        Without gradient, unless the base itself is trained (a baseline's adapter). These tokens must contain all image
        placeholders and no memory; with `copies` they must be those of the shared prompt alone.
        """
        if length < 1:
            return
        cache = DynamicCache(config=self.backbone.base.config.get_text_config())
        first = slice(None, None, self.copies)
        adapted = torch.is_grad_enabled() and any(p.requires_grad for p in self.backbone.base.parameters())
        with torch.set_grad_enabled(adapted):
            prefix = self.backbone.read(
                inputs_embeds=self.embeds[first, :length],
                attention_mask=self.mask[first, :length],
                position_ids=self.positions[..., first, :length],
                mm_encoder_outputs=self.images,
                cache=cache,
                use_cache=True,
                **{name: values[:, :length] for name, values in self.known.items()},
            )
        if self.copies > 1:
            cache.batch_repeat_interleave(self.copies)
            prefix = prefix.repeat_interleave(self.copies, 0)
        layers: list[Any] = list(cache.layers)
        for layer in layers:
            layer.update = partial(join, layer)
        self.cache, self.prefix, self.images, self.known = cache, prefix, None, {}

    def __call__(self, splice: Splice) -> Tensor:
        """Last-layer states [B, L, d] at the tokens, with the splice's memories in place."""
        done = self.prefix.shape[1]
        with recomputed(self.backbone.base) if self.checkpointing and torch.is_grad_enabled() else nullcontext():
            hidden = self.backbone.read(
                inputs_embeds=splice.embeddings(self.embeds)[:, done:],
                attention_mask=splice.mask(self.mask),
                position_ids=splice.positions(self.positions)[..., done:],
                mm_encoder_outputs=self.images,
                cache=self.cache,
                use_cache=self.cache is not None,
                **{name: splice.per_token(values) for name, values in self.known.items()},
            )
        return splice.gather(torch.cat([self.prefix, hidden], dim=1))


def join(layer: Any, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    """A cache layer's `update` that does not change the layer, so that one prefix serves many reads."""
    return torch.cat([layer.keys, keys], dim=-2), torch.cat([layer.values, values], dim=-2)


@contextmanager
def recomputed(base: nn.Module) -> Iterator[None]:
    """Makes the base's layers recompute their activations in the backward pass, in evaluation mode.

    transformers requires training mode, set here on the layers themselves and nothing inside them. They may keep
    the cache, which is only read here.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer  # slow to import

    layers: list[Any] = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    # The private names are those of transformers 5.23.
    states = [(layer.training, layer.gradient_checkpointing, layer._can_checkpoint_with_cache) for layer in layers]  # noqa: SLF001
    try:
        for layer in layers:
            layer.training = layer.gradient_checkpointing = layer._can_checkpoint_with_cache = True  # noqa: SLF001
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # noqa: SLF001
        yield
    finally:
        for layer, state in zip(layers, states, strict=True):
            layer.training, layer.gradient_checkpointing, layer._can_checkpoint_with_cache = state  # noqa: SLF001
