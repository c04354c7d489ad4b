"""The prompts of a stage: its rows, checked against the base's processor, and the order in which they are read.

A row that the processor refuses is a bad row, like one that cannot be read: it is reported, counted, and replaced by
the next one. Rows and order depend on data and seed alone, so resumed runs and runs on more processes read the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from torch.utils.data import Sampler

from vismem.data import BadRowError, Row, Rows, StreamingRows, load_dataset_rows, row_inputs
from vismem.data.batches import placeholders_of
from vismem.training.arguments import MemoryTrainingArguments


def load_rows(args: MemoryTrainingArguments, source: Any = None) -> Rows | StreamingRows:
    """The rows of `source`, by default `args.data`: `"pocket"`, or anything that `load_dataset_rows` takes.

    Raises:
        ValueError: if a pocket mixture is unknown.
        BadDataError: if the source cannot be read, has no good row, or more bad ones than allowed.
    """
    source = args.data if source is None else source
    if isinstance(source, str) and source.partition(":")[0] == "pocket":
        from vismem.pocket.practice import PocketRows

        seed = args.seed if args.data_seed is None else args.data_seed
        source = PocketRows(args.stage, seed, args.max_rows, source.partition(":")[2])
    return load_dataset_rows(
        source,
        args.split,
        strict=args.strict,
        max_bad_rows=args.max_bad_rows,
        streaming=args.streaming,
        limit=args.max_rows,
        columns=args.columns,
    )


def check_row(processor: Any, context: int, row: Row, *, supervised: bool) -> None:
    """Raises BadRowError if the processor rejects the row, the prompt is too long, or the reply has an image token."""
    row_inputs(processor, row, context)
    if supervised:
        for token in placeholders_of(processor):
            if token in row.completion:
                raise BadRowError(f"the reply contains the processor's image token {token}; remove it")


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
