"""Task files for lmms-eval, as a user would write them, on questions of easy-VQA and of the pocket world."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import lmms_eval.tasks
import pytest
from datasets import Dataset, Features, Image, List, Value
from lmms_eval.tasks import TaskManager

from vismem.data import Row

UTILS = """
import json

from vismem.training.rewards.answers import normalise


def to_messages(doc):
    images, messages = iter(doc["images"]), []
    for message in json.loads(doc["prompt"]):
        parts = [{"type": "image", "url": next(images)} if p["type"] == "image" else p for p in message["content"]]
        messages.append({"role": message["role"], "content": parts})
    return messages


def results(doc, replies):
    said = normalise(replies[0])
    return {"right": float(said == normalise(doc["answer"]) or said.split(" ")[-1] == normalise(doc["answer"]))}
"""
TASK = """
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {name}.parquet}}}}
test_split: test
output_type: generate_until
doc_to_text: a question with pictures
doc_to_target: answer
doc_to_messages: !function utils.to_messages
process_results: !function utils.results
generation_kwargs: {{max_new_tokens: 24, do_sample: false}}
metric_list: [{{metric: right, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """A task with its data: a parquet file with a list of pictures, a YAML file and its functions."""
    folder.mkdir(parents=True, exist_ok=True)
    docs = [
        {"images": row.images, "prompt": json.dumps(row.prompt), "answer": row.answer, "cell": row.columns["cell"]}
        for row in rows
    ]
    text = Value("string")
    features = Features({"images": List(Image()), "prompt": text, "answer": text, "cell": text})
    Dataset.from_list(docs, features=features).to_parquet(str(folder / f"{name}.parquet"))
    (folder / f"{name}.yaml").write_text(TASK.format(name=name))
    (folder / "utils.py").write_text(UTILS)


OWN_TASKS = Path(lmms_eval.tasks.__file__).parent
read_index = TaskManager._get_task_and_group


@cache
def own_index() -> dict[str, Any]:
    """lmms-eval's index of its own tasks, some 2,000 files."""
    return read_index(TaskManager("ERROR", include_defaults=False), f"{OWN_TASKS}/")


def keep_own_index(patch: pytest.MonkeyPatch) -> None:
    """Reads the index of lmms-eval's own tasks only once; otherwise every run would take three seconds to read it."""

    def kept(manager: TaskManager, folder: str) -> dict[str, Any]:
        return deepcopy(own_index()) if Path(folder) == OWN_TASKS else read_index(manager, folder)

    patch.setattr(TaskManager, "_get_task_and_group", kept)
