"""Runs a task of lmms-eval from Python on a loaded model; returns a record for each sample and the task's metrics.

Questions, scores and metrics are lmms-eval's own.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vismem.evaluation.lmms import tasks_folder
from vismem.evaluation.records import Record
from vismem.model import VisMem

SCORE_KEYS = ("score", "correct", "is_correct", "true_false", "overall", "acc", "accuracy")
LONGEST_COLUMN = 200  # characters; longer values of a sample do not become columns
THINKING = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'  # lmms-eval's default for --reasoning_tags


@dataclass(frozen=True)
class TaskRun:
    """The results of a task.

    Args:
        records: one for each sample, in the task's order; for a group, task by task.
        metrics: lmms-eval's metrics, by task or group and by name.
    """

    records: list[Record]
    metrics: dict[str, dict[str, float]]


def task_records(model: VisMem, task: str, **settings: Any) -> list[Record]:
    """The records of `run_task`, with the same settings."""
    return run_task(model, task, **settings).records


def run_task(
    model: VisMem,
    task: str,
    *,
    limit: int | None = None,
    invocation: str = "learned",
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    seed: int = 0,
    output_path: str | Path | None = None,
    include_path: str | Path | Sequence[str | Path] = (),
    log: bool = False,
) -> TaskRun:
    """Runs a task, group or tag of lmms-eval, or a packaged task.

    A record's score is the sample's value of the task's first metric: the number itself, the number in it (under the
    task's `score_key` or one of `SCORE_KEYS`), or the metric aggregated over this sample alone. Its columns are the
    sample's plain values, and `lmms_task`, the name of its task.

    Args:
        model: the model; it stays usable.
        task: name.
        limit: use only the first `limit` samples.
        invocation: see `vismem ask --invocation`.
        batch_size: rows decoded together.
        max_new_tokens: sampled tokens per answer, if the task does not set it.
        seed: of sampling and random invocation.
        output_path: folder for lmms-eval's own files of results and samples, and for the judges' files.
        include_path: folders with further tasks.
        log: show lmms-eval's full log and its tables.

    Returns:
        A `TaskRun`.

    Raises:
        ValueError: if there is no such task, a sample cannot be read, or a score is not a number.
        RuntimeError: if it runs in several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            "run_task works in one process; for several, use lmms-eval's command line (docs/evaluation.md)"
        )
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.loggers import EvaluationTracker

    from vismem.evaluation.lmms.model import VisMemChat

    extra = [include_path] if isinstance(include_path, (str, Path)) else include_path
    with quiet(log=log), tempfile.TemporaryDirectory() as scratch:
        place = str(scratch if output_path is None else output_path)
        manager = find_task(task, extra)
        tracker = EvaluationTracker(output_path=place)
        lm = VisMemChat(model, invocation, batch_size, max_new_tokens or 1024, seed)
        found = simple_evaluate(
            lm,
            tasks=[task],
            batch_size=batch_size,
            limit=limit,
            bootstrap_iters=0,
            task_manager=manager,
            evaluation_tracker=tracker,
            cli_args=Namespace(output_path=place, process_with_media=False, reasoning_tags=THINKING),
        )
        samples, records = found.pop("samples"), []
        for name, entries in samples.items():
            score = scorer(manager.task_index[name]["yaml_path"], name)
            records += records_of(name, entries, score, lm.written)
        if output_path is not None:
            from lmms_eval.utils import get_datetime_str

            tracker.save_results_aggregated(found, samples, get_datetime_str())
            for name, entries in samples.items():
                tracker.save_results_samples(name, entries)
    return TaskRun(records, {name: numbers(values) for name, values in found["results"].items()})


def find_task(task: str, more: Iterable[str | Path] = ()) -> Any:
    """An index of the packaged tasks and those in `more` folders; includes lmms-eval's own if the task needs them.

    Raises:
        ValueError: if there is no task with this name.
    """
    from lmms_eval.tasks import TaskManager

    folders = [str(folder) for folder in (tasks_folder(), *more)]
    manager = TaskManager("ERROR", include_path=folders, include_defaults=False, model_name="vismem")
    if not complete(task, manager):
        manager = TaskManager("ERROR", include_path=folders, model_name="vismem")
    if task not in manager.all_tasks:
        raise ValueError(
            f"no task {task!r} in lmms-eval or in {', '.join(folders)}; `lmms-eval tasks list` has the names"
        )
    return manager


def complete(task: str, manager: Any) -> bool:
    """Whether an index has a task and, for a group, all its members."""
    from lmms_eval.utils import load_yaml_config

    if task not in manager.all_tasks or manager.task_index[task]["type"] != "group":
        return task in manager.all_tasks
    members = load_yaml_config(manager.task_index[task]["yaml_path"], mode="simple")["task"]
    return all(isinstance(member, str) and complete(member, manager) for member in members)


@contextlib.contextmanager
def quiet(*, log: bool = False) -> Iterator[None]:
    """Hides lmms-eval's log and tables, except progress bars, warnings and errors; with `log`, hides nothing.

    Replaces loguru's default sink by one for warnings; other sinks stay.
    """
    from loguru import logger

    if log:
        yield
        return
    with contextlib.suppress(ValueError):  # the default sink was removed before
        logger.remove(0)
        logger.add(lambda text: print(text, end="", file=sys.stderr), level="WARNING", format="{message}")
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def scorer(path: str, name: str) -> Callable[[Mapping[str, Any]], float]:
    """A function that returns the score of a logged sample of a task."""
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(path, mode="full")
    metrics = config.get("metric_list") or []
    own = (config.get("score_key"), *SCORE_KEYS)

    def score(sample: Mapping[str, Any]) -> float:
        present = [entry for entry in metrics if entry["metric"] in sample]
        if not present:
            raise ValueError(f"{name}: its samples have none of its metrics, so there is no score per sample")
        metric, aggregation = present[0]["metric"], present[0].get("aggregation")
        value = sample[metric]
        if isinstance(value, Mapping):
            inside = [value[key] for key in own if key in value]
            if inside:
                value = inside[0]
            elif callable(aggregation) and "args" not in inspect.signature(aggregation).parameters:
                value = aggregation([value])  # over this sample alone
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise ValueError(f"{name}: its metric {metric!r} gives no number for a single sample")
        return found

    return score


def records_of(
    name: str, samples: Sequence[Mapping[str, Any]], score: Callable[..., Any], written: Mapping[tuple[str, int], Any]
) -> list[Record]:
    """Records of a task's logged samples; with several filters, scored by the first."""
    found: dict[int, Record] = {}
    for sample in samples:
        number = sample["doc_id"]
        if number in found:
            continue
        answer, columns = written[name, number], sample["doc"].items()
        trace = answer.token_counts
        short = {k: v for k, v in columns if isinstance(v, (str, int, float)) and len(str(v)) <= LONGEST_COLUMN}
        found[number] = Record(
            id=f"{name}/{number}",
            score=0.0 if trace.error else score(sample),  # some metrics give an empty answer a point
            reply=answer.text,
            tokens=trace.output_tokens,
            sampled=trace.sampled_tokens,
            delimiters=trace.delimiters,
            invocations=trace.invocations,
            finish=trace.finish,
            error=trace.error,
            columns={**short, "lmms_task": name},
        )
    return list(found.values())


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """The numeric metrics, by name without the filter's suffix."""
    return {
        key.removesuffix(",none"): float(value)
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
