"""A base's latent memory: the builder and the two formers, and the one call that forms memories (Eq. 5-6)."""

from __future__ import annotations

from torch import Tensor, nn

from vismem.backbones import Backbone
from vismem.config import Kind, VisMemConfig
from vismem.memory.builder import QueryBuilder
from vismem.memory.choice import Choice, block_tokens
from vismem.memory.long_term import LongTermFormer
from vismem.memory.observation import Formed, Observation
from vismem.memory.short_term import ShortTermFormer
from vismem.memory.soft import SoftMemory


class Memory(nn.Module):
    """Query builder, short-term former and long-term former; its parameters are what stage I trains."""

    def __init__(self, backbone: Backbone, config: VisMemConfig) -> None:
        super().__init__()
        weight = backbone.embeddings.weight
        width = config.inner_width(backbone.hidden_size)
        scale = float(weight.detach().float().pow(2).mean().sqrt()) if weight.device.type != "meta" else 1.0
        scale *= backbone.embedding_scale
        self.builder = QueryBuilder(
            backbone.hidden_size,
            config.query_length,
            config.builder_layers,
            config.builder_heads,
            width,
            scale,
            from_segment=config.memory_init == "attended",
        )
        self.short = ShortTermFormer(backbone, config)
        self.long = LongTermFormer(backbone, config)
        self.to(device=weight.device, dtype=weight.dtype)

    def form(self, kind: Kind, observations: list[Observation]) -> Formed:
        """Forms one memory of `kind` for each observation, in one batch."""
        query = self.builder([o.visual for o in observations], [o.states for o in observations])
        if kind == "long":
            return Formed(self.long(query, [o.segment for o in observations]), [None] * len(observations))
        patches = [o.patches for o in observations]
        if self.short.choice is None:
            return Formed(self.short(query, patches), [None] * len(observations))
        choices = self.choose(query, observations)
        return Formed(self.short(query, patches, [choice.blocks for choice in choices]), list(choices))

    def choose(self, query: Tensor, observations: list[Observation]) -> list[Choice]:
        """The blocks that each observation's short memory starts from, given the queries [n, K, d]."""
        assert self.short.choice is not None
        found, grids, states = [], [], []
        for seen in observations:
            states.append(seen.visual[block_tokens(seen.patches).to(seen.visual.device)])
            grids.append([(image.blocks.shape[0], image.blocks.shape[1]) for image in seen.patches])
        for seen, scores, grid in zip(observations, self.short.choice(query, states), grids, strict=True):
            blocks = seen.blocks
            if blocks is None:
                blocks = scores.argmax(-1) if seen.sampler is None else seen.sampler(scores)
            found.append(Choice(scores, blocks.to(scores.device), grid))
        return found


def memory_of(backbone: Backbone, config: VisMemConfig) -> Memory | SoftMemory:
    """A new memory with the configured content: formed, or the soft prompts it is compared with."""
    return (SoftMemory if config.content == "soft" else Memory)(backbone, config)


__all__ = [
    "Choice",
    "Formed",
    "LongTermFormer",
    "Memory",
    "Observation",
    "QueryBuilder",
    "ShortTermFormer",
    "SoftMemory",
    "memory_of",
]
