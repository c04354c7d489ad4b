"""Chance that belongs to a row: sampling that does not depend on a row's neighbours, its batch or its process."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 64  # uniform numbers drawn from a row's generator at a time


class RowDraws:
    """One stream of uniform numbers for each row, from the row's own seed; token number k of a row uses number k.

    Args:
        seeds: one for each row.
        rows: how many rows there are.
        device: where the probabilities lie.

    Raises:
        ValueError: if there are not as many seeds as rows.
    """

    def __init__(self, seeds: list[int], rows: int, device: torch.device) -> None:
        if len(seeds) != rows:
            raise ValueError(f"seed has {len(seeds)} entries for {rows} rows; give one seed for each output row")
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        self.table = torch.empty(rows, 0, dtype=torch.float64)
        self.used, self.device = [0] * rows, device

    def sample(self, probabilities: Tensor, rows: list[int]) -> Tensor:
        """One token for each row of `probabilities` [B, V] by the inverse of its distribution function.

        Only the rows named in `rows` use up a number; what the others get is not meant to be read.
        """
        if max(self.used) >= self.table.shape[1]:
            more = [torch.rand(BLOCK, generator=generator, dtype=torch.float64) for generator in self.generators]
            self.table = torch.cat([self.table, torch.stack(more)], dim=1)
        index = torch.tensor(self.used)[:, None]
        for row in rows:
            self.used[row] += 1
        uniform = self.table.gather(1, index).to(self.device)
        edges = probabilities.double().cumsum(-1)
        return torch.searchsorted(edges, uniform * edges[:, -1:], right=True).squeeze(1).clamp(max=edges.shape[1] - 1)
