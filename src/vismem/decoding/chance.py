"""Chance that belongs to a row: sampling that does not depend on a row's neighbours, its batch or its process."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # uniform numbers drawn from the generator at a time


class Draws:
    """One row's stream of uniform numbers from its own seed; token number k of the row uses number k."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(int(seed))
        self.numbers: list[float] = []

    def __getitem__(self, token: int) -> float:
        while token >= len(self.numbers):
            self.numbers += torch.rand(BLOCK, generator=self.generator, dtype=torch.float64).tolist()
        return self.numbers[token]


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token [n] for each row of `probabilities` [n, V] by the inverse of its distribution function at `uniform`.

    Raises:
        RuntimeError: where a row's probabilities are no numbers; on a GPU, at the next thing that waits for it.
    """
    edges = probabilities.double().cumsum(-1)
    torch._assert_async((edges[:, -1] > 0).all(), "probabilities to sample from are NaN or all 0")
    places = torch.searchsorted(edges, uniform[:, None].to(edges) * edges[:, -1:], right=True)
    return places.squeeze(1).clamp(max=edges.shape[1] - 1)
