"""Rows for training: prompts with images, reference answers and whatever else the rewards need.

`load_dataset_rows` reads files, folders, hub datasets and lists; `prompt_inputs` makes a batch of them for a processor.
"""

from __future__ import annotations

from vismem.data.batches import prompt_inputs, reward_columns, row_inputs
from vismem.data.dataset import Rows, StreamingRows, load_dataset_rows
from vismem.data.rows import BadDataError, BadRow, Row

__all__ = [
    "BadDataError",
    "BadRow",
    "Row",
    "Rows",
    "StreamingRows",
    "load_dataset_rows",
    "prompt_inputs",
    "reward_columns",
    "row_inputs",
]
