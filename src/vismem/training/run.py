"""A stage from its settings to its saved memory: loads base, memory and data, trains, and can be gone on with.

`vismem train` is a thin skin over `train`. Each stage has a folder of its own with checkpoints, logs, sample
completions and, at the end, `memory/`, which is what the next stage and `VisMem.from_pretrained` take, or a
baseline's `adapter/`.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import set_seed

from vismem.backbones import backbone_of
from vismem.config import VisMemConfig
from vismem.data import load_dataset_rows
from vismem.model import VisMem
from vismem.training import baselines
from vismem.training.arguments import STAGES, MemoryTrainingArguments, arguments_for
from vismem.training.checkpoints import last_checkpoint
from vismem.training.rewards import load_rewards
from vismem.training.trainer import MemoryTrainer

log = logging.getLogger(__name__)

DONE = "done.json"  # what a finished stage leaves in its folder


def train(stage: str, layers: list[dict[str, Any]], resume: bool = False) -> Path:
    """Runs one stage, or with `"all"` those three after each other, each starting from the one before.

    Args:
        stage: one of `STAGES`, `"all"`, or one of `BASELINES`.
        layers: settings as `load_settings` gives them.
        resume: go on from the newest checkpoints; stages that are done are not run again.

    Returns:
        The folder of the last stage's memory, or of the baseline's adapter.

    Raises:
        ValueError: for unusable settings, rewards or data, of `"all"` before the first stage begins, or if an output
            folder holds another run and `resume` is not given.
    """
    if stage != "all":
        return run_stage(arguments_for(stage, layers), resume)
    output = Path(str(arguments_for("stage1", layers).output_dir))
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
    done, checkpoint = progress(args, resume)
    if done:
        log.info("%s is done already; its %s is in %s", args.stage, args.plan.result, result)
        return result
    rows = prepared_rows(args, {} if read is None else read)
    log.info("%s: %s", args.stage, folder)
    set_seed(args.seed)  # a new memory's first weights
    model = load_model(args)
    trainer = MemoryTrainer(model, args, rows)
    trainer.train(resume_from_checkpoint=checkpoint or resume)
    trainer.save_result(result)
    if args.should_save:
        history = {"stage": args.stage, "seed": args.seed, "log": trainer.state.log_history}
        (folder / "log.json").write_text(json.dumps(history, indent=0) + "\n", encoding="utf-8")
        record = {"stage": args.stage, "steps": trainer.state.global_step, "base": args.base}
        (folder / DONE).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return result


def progress(args: MemoryTrainingArguments, resume: bool) -> tuple[bool, str | None]:
    """Whether a stage is done already, and the checkpoint that it goes on from.

    Raises:
        ValueError: if its folder holds a run of another stage, or any run and `resume` is not given.
    """
    folder = Path(str(args.output_dir))
    done, checkpoint = folder / DONE, last_checkpoint(folder)
    for earlier in (done, *([Path(checkpoint) / "training_args.json"] if checkpoint else [])):
        if earlier.is_file() and json.loads(earlier.read_text(encoding="utf-8"))["stage"] != args.stage:
            raise ValueError(f"{folder} holds a run of another stage; choose another output_dir for {args.stage}")
    if not resume and (checkpoint or done.is_file()):
        raise ValueError(f"{folder} holds a run already: go on with --resume, or choose another output_dir")
    return done.is_file(), checkpoint


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
    options: dict[str, Any] = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    if args.plan.adapts:
        name = args.base or (baselines.base_name(args.checkpoint) if args.checkpoint else "")
        if not name:
            raise ValueError("no base: set base=NAME_OR_FOLDER, or checkpoint=FOLDER of an adapter that names its own")
        model = VisMem(*load_base(name, options), args.memory_config())  # for its trainer; nobody invokes its memory
        if args.checkpoint:
            baselines.load_adapter(model, args.checkpoint)
        return model
    if args.checkpoint:
        given: dict[str, Any] = (
            {} if not args.base else dict(zip(("base", "processor"), load_base(args.base, options), strict=True))
        )
        options = {} if given else options
        return VisMem.from_pretrained(args.checkpoint, memory_dtype=torch.float32, **given, **options)
    if not args.base:
        raise ValueError("no base: set base=NAME_OR_FOLDER, or checkpoint=FOLDER of a memory that names its own")
    base, processor = load_base(args.base, options)
    config: VisMemConfig = args.memory_config()
    return VisMem(base, processor, config)


def load_base(name: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """A base and its processor by name; `"pocket"` is the packaged one."""
    if name == "pocket":
        from vismem.pocket import BASE_PATH

        name = str(BASE_PATH)
    trusted = {"trust_remote_code": options["trust_remote_code"]}
    try:
        backbone_of(SimpleNamespace(config=AutoConfig.from_pretrained(name, **trusted)))  # before weights are read
        base = AutoModelForImageTextToText.from_pretrained(name, **options)
        processor = AutoProcessor.from_pretrained(name, **trusted)
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"base {name!r} cannot be loaded: {first}") from error
    return base, processor


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
