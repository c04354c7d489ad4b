"""A base's latent memory: the builder and the two formers, and the one call that forms memories (Eq. 5-6)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vismem.backbones import Backbone, Patches
from vismem.config import Kind, VisMemConfig
from vismem.memory.builder import QueryBuilder
from vismem.memory.long_term import LongTermFormer
from vismem.memory.short_term import ShortTermFormer
from vismem.memory.soft import SoftMemory


@dataclass
class Observation:
    """What a memory is formed from: what one row observes when it invokes memory, without gradient.

    Args:
        visual: visual states [y, d] of the row's images.
        states: last-layer states [z, d] that produced the segment's tokens, the invocation token included.
        segment: input embeddings [z, d] of those tokens.
        patches: the row's images as the short former encoded them; empty without images.
        origin: the tag of the row's request and the index of the invocation, for analysis; None outside decoding.
    """

    visual: Tensor
    states: Tensor
    segment: Tensor
    patches: list[Patches] = field(default_factory=list)
    origin: tuple[Any, int] | None = None


class Memory(nn.Module):
    """Query builder, short-term former and long-term former; its parameters are what stage I trains."""

    def __init__(self, backbone: Backbone, config: VisMemConfig) -> None:
        super().__init__()
        weight = backbone.embeddings.weight
        width = config.inner_width(backbone.hidden_size)
        scale = float(weight.detach().float().pow(2).mean().sqrt()) if weight.device.type != "meta" else 1.0
        scale *= backbone.embedding_scale
        self.builder = QueryBuilder(
            backbone.hidden_size, config.query_length, config.builder_layers, config.builder_heads, width, scale
        )
        self.short = ShortTermFormer(backbone, config)
        self.long = LongTermFormer(backbone, config)
        self.to(device=weight.device, dtype=weight.dtype)

    def form(self, kind: Kind, observations: list[Observation]) -> Tensor:
        """Forms one memory of `kind` for each observation, in one batch: [n, N, d]."""
        query = self.builder([o.visual for o in observations], [o.states for o in observations])
        if kind == "short":
            return self.short(query, [o.patches for o in observations])
        return self.long(query, [o.segment for o in observations])


def memory_of(backbone: Backbone, config: VisMemConfig) -> Memory | SoftMemory:
    """A new memory with the configured content: formed, or the soft prompts it is compared with."""
    return (SoftMemory if config.content == "soft" else Memory)(backbone, config)


__all__ = ["LongTermFormer", "Memory", "Observation", "QueryBuilder", "ShortTermFormer", "SoftMemory", "memory_of"]
