"""Runs one stage from settings to saved memory; resumable.

`vismem train` is a thin wrapper around `train`. Each stage has its own folder with checkpoints, logs, sample
completions and finally `memory/`, which the next stage and `VisMem.from_pretrained` load, or a baseline's `adapter/`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import set_seed

from vismem import checkpoint as checkpoint_files
from vismem import files
from vismem.interrupts import advising
from vismem.loading import load_base
from vismem.model import VisMem
from vismem.training import baselines
from vismem.training.arguments import STAGES, MemoryTrainingArguments, arguments_for
from vismem.training.checkpoints import changed, last_checkpoint, newest_checkpoint, step_of
from vismem.training.rewards import load_rewards
from vismem.training.rows import load_rows
from vismem.training.trainer import MemoryTrainer

log = logging.getLogger(__name__)

DONE = "done.json"  # in the folder of a finished stage


def train(stage: str, layers: list[dict[str, Any]], *, resume: bool = False) -> Path:
    """Runs one stage, or with `"all"` the three stages in order, each starting from the previous one's memory.

    Args:
        stage: one of `STAGES`, `"all"`, or one of `BASELINES`.
        layers: settings from `load_settings`.
        resume: continue from the newest intact checkpoints and skip finished stages.

    Returns:
        The folder of the last stage's memory, or of the baseline's adapter.

    Raises:
        ValueError: for invalid settings, rewards or data (with `"all"`, before the first stage starts), or if an
            output folder holds another run and `resume` is false.
        FolderInUseError: if another run writes to the output folder.
        Interrupted: on Ctrl-C; says where `resume` would continue.
    """
    if stage != "all":
        return run_stage(arguments_for(stage, layers), {}, resume=resume)
    first = arguments_for("stage1", layers)
    with locked(first):
        return run_all(first.folder, layers, resume=resume)


def locked(args: MemoryTrainingArguments) -> contextlib.AbstractContextManager[None]:
    """Locks the output folder against other runs; only the main process does so."""
    return files.locked(args.folder) if args.process_index == 0 else contextlib.nullcontext()


def run_all(output: Path, layers: list[dict[str, Any]], *, resume: bool) -> Path:
    """Runs the three stages in order, in folders of `output`; returns the folder of the last memory."""
    planned: dict[str, dict[str, str]] = {}  # by stage, the arguments that follow from the stages before it
    rows: dict[str, Any] = {}
    memory: Path | None = None
    for name in STAGES:  # check every stage before the first one starts
        fixed = {"output_dir": str(output / name), **({"checkpoint": str(memory)} if memory else {})}
        args = arguments_for(name, layers, **fixed)
        if args.max_steps == 0:
            log.info("%s is skipped (max_steps=0)", name)
            continue
        planned[name], memory = fixed, args.result
        if not progress(args, resume=resume)[0]:
            load_checked_rows(args, rows)
    if memory is None:
        raise ValueError(f"nothing to train: max_steps is 0 in each of {', '.join(STAGES)}")
    for name, fixed in planned.items():  # new arguments, because creating them sets environment variables
        run_stage(arguments_for(name, layers, **fixed), rows, resume=resume)
    return memory


def run_stage(args: MemoryTrainingArguments, rows: dict[str, Any], *, resume: bool) -> Path:
    """Trains one stage and returns the folder of its memory or adapter; `rows` are those already loaded."""
    with locked(args), advising(lambda: how_to_resume(args)):
        done, checkpoint = progress(args, resume=resume)
        if done:
            log.info("%s is already done; its %s is in %s", args.stage, args.plan.result, args.result)
            return args.result
        dataset = load_checked_rows(args, rows)
        log.info("%s: %s", args.stage, args.folder)
        set_seed(args.seed)  # for a new memory's initial weights
        model = load_model(args)
        trainer = MemoryTrainer(model, args, dataset)
        with reported_apart(args):
            trainer.train(resume_from_checkpoint=checkpoint or resume)
        trainer.save_result(args.result)
        if args.should_save:
            history = {"stage": args.stage, "seed": args.seed, "log": trainer.state.log_history}
            record = {"stage": args.stage, "steps": trainer.state.global_step, "base": args.base}
            files.write_json(args.folder / "log.json", history, indent=0)
            files.write_json(args.folder / DONE, {**record, "files": checksums(args.result)})
    return args.result


def how_to_resume(args: MemoryTrainingArguments) -> str:
    """What `--resume` would do with a stage interrupted now."""
    newest = newest_checkpoint(args.folder)
    if newest is None:
        return f"{args.stage} has no checkpoint yet, so --resume starts it again"
    return f"--resume continues {args.stage} from step {step_of(newest)} ({newest})"


@contextlib.contextmanager
def reported_apart(args: MemoryTrainingArguments) -> Iterator[None]:
    """Closes the tracker runs that transformers' callbacks open inside the context, so that each stage has its own.

    Weights & Biases and SwanLab otherwise keep a run open until the process ends. A run that was open before stays
    open. `args.project` is Weights & Biases' project too, unless WANDB_PROJECT names one.
    """
    before = open_tracker_runs()
    unnamed = "WANDB_PROJECT" not in os.environ
    if unnamed:
        os.environ["WANDB_PROJECT"] = str(args.project)
    try:
        yield
    finally:
        for name, run in open_tracker_runs().items():
            if run is not None and run is not before[name]:
                sys.modules[name].finish()
        if unnamed:
            del os.environ["WANDB_PROJECT"]


def open_tracker_runs() -> dict[str, Any]:
    """The open run of each tracker, or None."""
    wandb, swanlab = sys.modules.get("wandb"), sys.modules.get("swanlab")
    return {"wandb": getattr(wandb, "run", None), "swanlab": swanlab.get_run() if swanlab is not None else None}


def checksums(result: Path) -> dict[str, str]:
    """Checksums of a stage's result, without files that users may edit."""
    found = [path for path in sorted(result.glob("*")) if path.suffix in (".json", ".safetensors")]
    return {path.name: files.sha256(path) for path in found}


def progress(args: MemoryTrainingArguments, *, resume: bool) -> tuple[bool, str | None]:
    """Whether a stage is done, and the checkpoint to continue from.

    A stage is done if `done.json` and the result it names are intact; otherwise training continues, with a warning.

    Raises:
        ValueError: if the folder holds a run of another stage, any run while `resume` is false, or only damaged
            checkpoints.
    """
    folder = args.folder
    done, newest = folder / DONE, newest_checkpoint(folder)
    for record in (done, *([newest / "training_args.json"] if newest else [])):
        if read_stage(record) not in (None, args.stage):
            raise ValueError(f"{folder} holds a run of another stage; choose another output_dir for {args.stage}")
    if not resume and (newest or done.exists()):
        raise ValueError(f"{folder} holds a run already: continue it with --resume, or choose another output_dir")
    if done.exists():
        problem = check_done(done, args.result)
        if problem is None:
            return True, None
        log.warning("%s marks %s as done, but %s; training continues", done, args.stage, problem)
    return False, last_checkpoint(folder)


def read_stage(path: Path) -> str | None:
    """The stage named in a JSON file; None if the file is missing or damaged."""
    try:
        return str(json.loads(path.read_bytes())["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_done(done: Path, result: Path) -> str | None:
    """The problem with a `done.json` or the result it names; None if both are intact."""
    try:
        expected = dict(json.loads(done.read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"it is damaged ({error})"
    wrong = changed(result, expected)
    return f"{wrong or result} is missing or changed" if wrong or not expected else None


def load_checked_rows(args: MemoryTrainingArguments, loaded: dict[str, Any]) -> Any:
    """Loads a stage's rows after checking its rewards, and reads the first row.

    `loaded` are the rows loaded so far, by their settings: stages with the same data share them.
    """
    if not args.plan.supervised:
        load_rewards(args.rewards)
    if not args.data:
        raise ValueError("no data: set data=FILE.jsonl, a folder or a hub name")
    stage = args.stage if args.data.partition(":")[0] == "pocket" else ""
    settings = (args.data, args.split, args.strict, args.max_bad_rows, args.streaming, args.max_rows, args.columns)
    key = str((stage, *settings))
    if key not in loaded:
        rows = load_rows(args)
        next(iter(rows))  # only this opens a stream, or samples the pocket world
        loaded[key] = rows
    return loaded[key]


def load_model(args: MemoryTrainingArguments) -> VisMem:
    """Loads the base with the memory or adapter that the stage starts from."""
    name = args.base
    if not name and args.checkpoint:
        if args.plan.adapts:
            name = str(baselines.read_config(args.checkpoint).base_model_name_or_path or "")
        else:
            folder = checkpoint_files.locate(args.checkpoint)
            name = checkpoint_files.base_location(checkpoint_files.read_record(folder), folder)
    if not name:
        made = "an adapter" if args.plan.adapts else "a memory"
        raise ValueError(f"no base: set base=NAME_OR_FOLDER, or checkpoint=FOLDER of {made} that names its base")
    options: dict[str, Any] = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    base, processor = load_base(
        name, dtype=args.dtype, trust_remote_code=args.trust_remote_code, say=log.info, **options
    )
    if args.checkpoint and not args.plan.adapts:
        return VisMem.from_pretrained(args.checkpoint, base, processor, memory_dtype=torch.float32)
    model = VisMem(base, processor, args.memory_config())  # a baseline never invokes its memory
    if args.checkpoint:
        baselines.load_adapter(model, args.checkpoint)
    return model
