"""Soft prompts in the places of memories: as many vectors of each kind, but learned constants, formed from nothing.

What memory is compared with (`content="soft"`): the same tokens, places, lengths and stages, no builder, no adapters,
and no image read again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from vismem.backbones import Backbone, Image
from vismem.config import Kind, VisMemConfig

if TYPE_CHECKING:
    from vismem.memory import Observation


class SoftVectors(nn.Module):
    """N learned vectors of one kind; they start as the embeddings of random words, as in prompt tuning.

    They are kept in units of the embedding table's RMS, times a gain kept as its logarithm: visual and token embeddings
    can differ fifty-fold in norm.
    """

    def __init__(self, backbone: Backbone, length: int) -> None:
        super().__init__()
        table = backbone.embeddings.weight.detach()
        words = table[torch.randint(len(table), (length,), device=table.device)].float() * backbone.embedding_scale
        rms = table.float().pow(2).mean().sqrt() * backbone.embedding_scale
        self.register_buffer("table_rms", rms, persistent=False)
        self.vectors = nn.Parameter(words / rms)
        self.log_gain = nn.Parameter(torch.zeros(()))
        self.checkpointing = False  # there are no activations to spare

    def forward(self, count: int) -> Tensor:
        """The same vectors for `count` invocations: [count, N, d]."""
        vectors = self.vectors * (self.table_rms * self.log_gain.float().exp()).to(self.vectors.dtype)
        return vectors.expand(count, -1, -1)

    def encode(self, images: list[Image]) -> list[None]:
        """Nothing for each image: none is looked at."""
        return [None] * len(images)


class SoftMemory(nn.Module):
    """In the place of `Memory`: the same call, whose answer depends on the kind alone."""

    def __init__(self, backbone: Backbone, config: VisMemConfig) -> None:
        super().__init__()
        self.builder = nn.Identity()  # a part without parameters
        self.short = SoftVectors(backbone, config.short_length)
        self.long = SoftVectors(backbone, config.long_length)
        weight = backbone.embeddings.weight
        self.to(device=weight.device, dtype=weight.dtype)

    def form(self, kind: Kind, observations: list[Observation]) -> Tensor:
        """The vectors of `kind` for each observation, whatever it is: [n, N, d]."""
        return (self.short if kind == "short" else self.long)(len(observations))
