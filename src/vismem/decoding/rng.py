"""Random numbers that belong to a row: its samples do not depend on its neighbours, its batch or its process."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # uniform numbers drawn from the generator at a time


class RowRng:
    """A row's stream of uniform numbers from its own seed; sampled token number k uses number k."""

    def __init__(self, seed: int) -> None:
        self.seed = int(seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.numbers: list[float] = []

    def __getitem__(self, token: int) -> float:
        while token >= len(self.numbers):
            self.numbers += torch.rand(BLOCK, generator=self.generator, dtype=torch.float64).tolist()
        return self.numbers[token]

    def of_invocation(self, index: int) -> torch.Generator:
        """The generator of invocation number `index`, apart from that of the tokens."""
        return torch.Generator().manual_seed((self.seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**63)


def inverse_transform(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Samples one token [n] per row of `probabilities` [n, V] by inverse transform sampling at `uniform` [n].

    A row of NaN or zeros gives an arbitrary token of the vocabulary, never an error.
    """
    edges = probabilities.double().cumsum(-1)
    places = torch.searchsorted(edges, uniform[:, None].to(edges) * edges[:, -1:], right=True)
    return places.squeeze(1).clamp(max=edges.shape[1] - 1)
