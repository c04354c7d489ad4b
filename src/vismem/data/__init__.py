"""Training rows: a prompt with images, a reference answer and the columns that the rewards need.

`load_dataset_rows` reads files, folders, hub datasets and lists; `prompt_inputs` turns rows into a batch of tensors.
"""

from __future__ import annotations

from vismem.data.batches import prompt_inputs, reward_columns, row_inputs
from vismem.data.dataset import Rows, StreamingRows, load_dataset_rows
from vismem.data.rows import BadDataError, BadRowError, Row
from vismem.deprecation import renamed

__all__ = [
    "BadDataError",
    "BadRowError",
    "Row",
    "Rows",
    "StreamingRows",
    "load_dataset_rows",
    "prompt_inputs",
    "reward_columns",
    "row_inputs",
]

__getattr__ = renamed(__name__, {"BadRow": "BadRowError"})
