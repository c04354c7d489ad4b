"""A stage from its settings to its saved memory: loads base, memory and data, trains, and resumes.

`vismem train` is a thin skin over `train`. Each stage has a folder of its own with checkpoints, logs, sample
completions and, at the end, `memory/`, which is what the next stage and `VisMem.from_pretrained` take, or a
baseline's `adapter/`.
"""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import set_seed

from vismem import checkpoint as checkpoint_files
from vismem import files
from vismem.data import load_dataset_rows
from vismem.interrupts import advising
from vismem.loading import load_base
from vismem.model import VisMem
from vismem.training import baselines
from vismem.training.arguments import STAGES, MemoryTrainingArguments, arguments_for
from vismem.training.checkpoints import changed, last_checkpoint, newest_checkpoint, step_of
from vismem.training.reporting import reported_apart
from vismem.training.rewards import load_rewards
from vismem.training.trainer import MemoryTrainer

log = logging.getLogger(__name__)

DONE = "done.json"  # what a finished stage leaves in its folder


def train(stage: str, layers: list[dict[str, Any]], resume: bool = False) -> Path:
    """Runs one stage, or with `"all"` those three after each other, each starting from the one before.

    Args:
        stage: one of `STAGES`, `"all"`, or one of `BASELINES`.
        layers: settings as `load_settings` gives them.
        resume: continue from the newest whole checkpoints; stages that are done are not run again.

    Returns:
        The folder of the last stage's memory, or of the baseline's adapter.

    Raises:
        ValueError: for unusable settings, rewards or data, of `"all"` before the first stage begins, or if an output
            folder holds another run and `resume` is not given.
        FolderInUseError: if another run writes into the output folder.
        Interrupted: at Ctrl-C; says from where `resume` continues.
    """
    if stage != "all":
        return run_stage(arguments_for(stage, layers), resume)
    first = arguments_for("stage1", layers)
    with locked(first):
        return run_all(Path(str(first.output_dir)), layers, resume)


def locked(args: MemoryTrainingArguments) -> contextlib.AbstractContextManager[None]:
    """Keeps other runs out of the output folder; the main process does this for all."""
    return files.locked(str(args.output_dir)) if args.process_index == 0 else contextlib.nullcontext()


def run_all(output: Path, layers: list[dict[str, Any]], resume: bool) -> Path:
    """The three stages one after another, in folders of `output`; returns the folder of the last memory."""
    planned: dict[str, dict[str, str]] = {}  # by stage, what the stages before it say
    read: dict[tuple[Any, ...], Any] = {}
    memory: Path | None = None
    for name in STAGES:  # what a later stage would stop at is found before the first one begins
        fixed = {"output_dir": str(output / name), **({"checkpoint": str(memory)} if memory else {})}
        args = arguments_for(name, layers, **fixed)
        if args.max_steps == 0:
            log.info("%s is left out (max_steps=0)", name)
            continue
        planned[name], memory = fixed, output / name / args.plan.result
        if not progress(args, resume)[0]:
            prepared_rows(args, read)
    if memory is None:
        raise ValueError(f"nothing to train: max_steps is 0 in each of {', '.join(STAGES)}")
    for name, fixed in planned.items():  # arguments anew: what the last ones leave in the environment counts
        run_stage(arguments_for(name, layers, **fixed), resume, read)
    return memory


def run_stage(args: MemoryTrainingArguments, resume: bool, read: dict[tuple[Any, ...], Any] | None = None) -> Path:
    """Trains one stage and returns the folder of its memory or adapter; `read` is that of `prepared_rows`."""
    folder = Path(str(args.output_dir))
    result = folder / args.plan.result
    with locked(args), advising(lambda: how_to_resume(args)):
        done, checkpoint = progress(args, resume)
        if done:
            log.info("%s is done already; its %s is in %s", args.stage, args.plan.result, result)
            return result
        rows = prepared_rows(args, {} if read is None else read)
        log.info("%s: %s", args.stage, folder)
        set_seed(args.seed)  # a new memory's first weights
        model = load_model(args)
        trainer = MemoryTrainer(model, args, rows)
        with reported_apart(args):
            trainer.train(resume_from_checkpoint=checkpoint or resume)
        trainer.save_result(result)
        if args.should_save:
            history = {"stage": args.stage, "seed": args.seed, "log": trainer.state.log_history}
            record = {"stage": args.stage, "steps": trainer.state.global_step, "base": args.base}
            files.write_json(folder / "log.json", history, indent=0)
            files.write_json(folder / DONE, {**record, "files": checksums(result)})
    return result


def how_to_resume(args: MemoryTrainingArguments) -> str:
    """What `--resume` does with a stage that was stopped now."""
    newest = newest_checkpoint(str(args.output_dir))
    if newest is None:
        return f"{args.stage} has saved nothing yet, so --resume begins it again"
    return f"--resume continues {args.stage} from step {step_of(newest)} ({newest})"


def checksums(result: Path) -> dict[str, str]:
    """Checksums of a stage's result, without what people edit."""
    found = [path for path in sorted(result.glob("*")) if path.suffix in (".json", ".safetensors")]
    return {path.name: files.sha256(path) for path in found}


def progress(args: MemoryTrainingArguments, resume: bool) -> tuple[bool, str | None]:
    """Whether a stage is done already, and the checkpoint that it continues from.

    A stage is done if `done.json` and the result that it names are whole; otherwise it continues, with a warning.

    Raises:
        ValueError: if its folder holds a run of another stage, any run and `resume` is not given, or checkpoints that
            are all damaged.
    """
    folder = Path(str(args.output_dir))
    done, newest = folder / DONE, newest_checkpoint(folder)
    for earlier in (done, *([newest / "training_args.json"] if newest else [])):
        if read_stage(earlier) not in (None, args.stage):
            raise ValueError(f"{folder} holds a run of another stage; choose another output_dir for {args.stage}")
    if not resume and (newest or done.exists()):
        raise ValueError(f"{folder} holds a run already: continue it with --resume, or choose another output_dir")
    if done.exists():
        lacking = unfinished(done, folder / args.plan.result)
        if lacking is None:
            return True, None
        log.warning("%s says that %s is done, but %s; training continues", done, args.stage, lacking)
    return False, last_checkpoint(folder)


def read_stage(path: Path) -> str | None:
    """The stage that a JSON file names; None if it is missing or damaged."""
    try:
        return str(json.loads(path.read_bytes())["stage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def unfinished(done: Path, result: Path) -> str | None:
    """What is wrong with a `done.json` and the result that it names; None if both are whole."""
    try:
        record = json.loads(done.read_bytes())
        named = record.get("files") or named_before(result)
        wrong = changed(result, dict(named))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        return f"it is damaged ({error})"
    if read_stage(done) is None:
        return "it names no stage"
    if not result.is_dir():
        return f"there is no {result}"
    return f"{result / wrong} is missing or was changed" if wrong else None


def named_before(result: Path) -> dict[str, str]:
    """What a `done.json` of earlier versions, which has no checksums, stands for: the memory as its record has it."""
    found = checksums(result)
    if checkpoint_files.CONFIG_FILE in found:
        found[checkpoint_files.WEIGHTS_FILE] = checkpoint_files.read_record(result).sha256
    elif len(found) < 2:
        raise ValueError(f"{result} is not whole")
    return found


def prepared_rows(args: MemoryTrainingArguments, read: dict[tuple[Any, ...], Any]) -> Any:
    """The rows of a stage, after a look at what it needs besides a base: its rewards, and that its data can be read.

    Args:
        args: of the stage.
        read: rows by the settings that they were read with; stages that read alike share them.

    Raises:
        ValueError: if a reward is unknown or lacks a package, or the data cannot be read or has no good row.
    """
    if not args.plan.supervised:
        load_rewards(args.rewards)
    key: tuple[Any, ...] = (args.data, args.split, args.strict, args.max_bad_rows, args.streaming, args.max_rows)
    key = (*key, str(args.columns))
    if args.data.partition(":")[0] == "pocket":
        key = (*key, args.stage)
    if key not in read:
        rows = load_rows(args)
        next(iter(rows))  # a stream is opened, the pocket world drawn from, only here
        read[key] = rows
    return read[key]


def load_model(args: MemoryTrainingArguments) -> VisMem:
    """The base with the memory, or the adapter, that the stage starts from."""
    name = args.base
    if not name and args.checkpoint:
        if args.plan.adapts:
            name = baselines.base_name(args.checkpoint)
        else:
            folder = checkpoint_files.locate(args.checkpoint)
            name = checkpoint_files.base_location(checkpoint_files.read_record(folder), folder)
    if not name:
        made = "an adapter" if args.plan.adapts else "a memory"
        raise ValueError(f"no base: set base=NAME_OR_FOLDER, or checkpoint=FOLDER of {made} that names its own")
    options: dict[str, Any] = {}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    base, processor = load_base(
        name, dtype=args.dtype, trust_remote_code=args.trust_remote_code, say=log.info, **options
    )
    if args.checkpoint and not args.plan.adapts:
        return VisMem.from_pretrained(args.checkpoint, base, processor, memory_dtype=torch.float32)
    model = VisMem(base, processor, args.memory_config())  # a baseline never invokes its memory
    if args.checkpoint:
        baselines.load_adapter(model, args.checkpoint)
    return model


def load_rows(args: MemoryTrainingArguments) -> Any:
    """The rows that the stage reads."""
    if not args.data:
        raise ValueError("no data: set data=FILE.jsonl, a folder or a hub name")
    if args.data.partition(":")[0] == "pocket":
        from vismem.pocket.practice import PocketRows

        seed = args.seed if args.data_seed is None else args.data_seed
        return PocketRows(args.stage, seed, args.max_rows, args.data.partition(":")[2])
    return load_dataset_rows(
        args.data,
        split=args.split,
        strict=args.strict,
        max_bad_rows=args.max_bad_rows,
        streaming=args.streaming,
        limit=args.max_rows,
        columns=args.columns,
    )
