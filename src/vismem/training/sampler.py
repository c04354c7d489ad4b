"""The order of prompts: fixed by the seed, on any number of processes and after any resume."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from torch.utils.data import Sampler


class PromptSampler(Sampler[int]):
    """Row indices in an order that depends on seed and epoch alone; each chunk of `chunk` rows comes `repeats` times.

    A chunk is what all processes read for one update; it is repeated for inner iterations. The last chunk is filled up
    from the start of the order, so that every update has whole batches on any number of processes.
    """

    def __init__(self, length: int, chunk: int, repeats: int, seed: int, *, shuffle: bool = True) -> None:
        self.length, self.chunk, self.repeats, self.seed, self.shuffle = length, chunk, repeats, seed, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.length // self.chunk) * self.chunk * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        if self.shuffle:
            Random(f"{self.seed}-{self.epoch}").shuffle(order)
        for start in range(0, self.length, self.chunk):
            for _ in range(self.repeats):
                yield from (order[index % self.length] for index in range(start, start + self.chunk))
