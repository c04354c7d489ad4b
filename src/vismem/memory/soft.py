"""Soft prompts instead of memories (`content="soft"`), a baseline: learned constants that depend on nothing.

Same tokens, positions, lengths and training stages as memory, but no builder, no adapters and no second look.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vismem.backbones import Backbone, Image
from vismem.config import Kind, VisMemConfig
from vismem.memory.observation import Formed, Observation


class SoftVectors(nn.Module):
    """N learned vectors of one kind, initialised with embeddings of random words, as in prompt tuning.

    Stored in units of the embedding table's RMS, times a gain stored as its logarithm: norms of visual and token
    embeddings can differ fifty-fold.
    """

    table_rms: Tensor

    def __init__(self, backbone: Backbone, length: int) -> None:
        super().__init__()
        table = backbone.embeddings.weight.detach()
        words = table[torch.randint(len(table), (length,), device=table.device)].float() * backbone.embedding_scale
        rms = table.float().pow(2).mean().sqrt() * backbone.embedding_scale
        self.register_buffer("table_rms", rms, persistent=False)
        self.vectors = nn.Parameter(words / rms)
        self.log_gain = nn.Parameter(torch.zeros(()))
        self.checkpointing = False  # there are no activations to recompute

    def forward(self, count: int) -> Tensor:
        """The same vectors for `count` invocations: [count, N, d]."""
        vectors = self.vectors * (self.table_rms * self.log_gain.float().exp()).to(self.vectors.dtype)
        return vectors.expand(count, -1, -1)

    def encode(self, images: list[Image]) -> list[Any]:
        """None for each image."""
        return [None] * len(images)


class SoftMemory(nn.Module):
    """Stands in for `Memory`: the same interface, but the vectors depend on the kind alone."""

    def __init__(self, backbone: Backbone, config: VisMemConfig) -> None:
        super().__init__()
        self.builder = nn.Identity()  # a part without parameters
        self.short = SoftVectors(backbone, config.short_length)
        self.long = SoftVectors(backbone, config.long_length)
        weight = backbone.embeddings.weight
        self.to(device=weight.device, dtype=weight.dtype)

    def form(self, kind: Kind, observations: list[Observation]) -> Formed:
        """The vectors of `kind`, the same for every observation."""
        vectors = (self.short if kind == "short" else self.long)(len(observations))
        return Formed(vectors, [None] * len(observations))
