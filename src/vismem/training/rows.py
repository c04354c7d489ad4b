"""The rows of a stage, each checked against the base's processor.

A row that the processor refuses is a bad row, like one that cannot be read: it is reported, counted, and replaced by
the next one. Whether a row is bad depends on the row alone, so resumed runs and runs on more processes use the same
rows.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from vismem.data import BadRowError, Row, Rows, StreamingRows, load_dataset_rows, row_inputs
from vismem.data.batches import placeholders_of
from vismem.model import VisMem
from vismem.training.arguments import MemoryTrainingArguments


def training_rows(source: Any, args: MemoryTrainingArguments, model: VisMem) -> Rows | StreamingRows:
    """The rows of a stage.

    Args:
        source: anything that `load_dataset_rows` takes.
        args: of the stage.
        model: its processor checks the rows.

    Raises:
        ValueError: if there is no source.
        BadDataError: if it cannot be read, has no good row, or more bad ones than allowed.
    """
    if source is None:
        raise ValueError("MemoryTrainer needs a train_dataset: a file's name, a datasets.Dataset, a list, or rows")
    rows = load_dataset_rows(
        source,
        args.split,
        strict=args.strict,
        max_bad_rows=args.max_bad_rows,
        streaming=args.streaming,
        limit=args.max_rows,
        columns=args.columns,
    )
    return rows.checked(partial(check_row, model.processor, context_of(model), supervised=args.plan.supervised))


def check_row(processor: Any, context: int | None, row: Row, *, supervised: bool) -> None:
    """Raises BadRowError if the processor rejects the row, the prompt is too long, or the reply has an image token."""
    row_inputs(processor, row, context)
    if supervised:
        for token in placeholders_of(processor):
            if token in row.completion:
                raise BadRowError(f"the reply contains the processor's image token {token}; remove it")


def context_of(model: VisMem) -> int | None:
    """The base's maximum number of positions; None if its config does not say."""
    return getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
