"""`vismem train warmup|stage1|stage2|all|sft|grpo`: trains a memory or a baseline from YAML and `key=value`."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vismem.cli.parsing import CommandError, UsageError, command_parser, echo, echo_yaml, log_to_stderr
from vismem.interrupts import advising, termination_interrupts
from vismem.loading import quiet_imports
from vismem.training.settings import load_settings, values_for
from vismem.training.stages import STAGES

STEPS = ("warmup", "stage1", "stage2", "all", "sft", "grpo")
SETTINGS = """settings (docs/configuration.md lists them all):
  base, data, output_dir       the model, the data, and a folder for results
  checkpoint                   the memory, or the baseline's adapter, to start from
  rewards                      exact, choice, numeric, ... or module:function
  preset                       paper (default) or pocket
  group_size, learning_rate, max_steps, per_device_train_batch_size, ...
                               every field of transformers' TrainingArguments works too
A key may name its stage: stage2.learning_rate=1e-5.
sft and grpo train a LoRA adapter of the base's language model instead of a memory, as baselines (docs/training.md).
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "vismem train",
        "Trains a memory: an optional supervised warm-up, stage I (what memory holds) and stage II (when to invoke it)."
        "\nOr a baseline on the same data: a LoRA adapter, by supervised fine-tuning (sft) or GRPO (grpo)."
        f"\n\n{SETTINGS}",
        "vismem train all preset=pocket output_dir=runs/pocket\n"
        "  vismem train stage1 my.yaml learning_rate=1e-4 --resume\n"
        "  vismem train sft preset=pocket output_dir=runs/sft",
    )
    parser.add_argument("stage", choices=STEPS, help="what to train")
    parser.add_argument(
        "settings", nargs="*", metavar="CONFIG.yaml|key=value", help="a settings file, changed settings"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    parser.add_argument("--show", action="store_true", help="print the resolved settings and stop")
    options = parser.parse_intermixed_args(arguments)
    files = [text for text in options.settings if "=" not in text]
    if len(files) > 1:
        raise UsageError(f"one settings file at most, got {' and '.join(files)} (changes are written key=value)")
    options.file = files[0] if files else None
    options.changes = [text for text in options.settings if "=" in text]
    if options.file and not Path(options.file).is_file():
        raise UsageError(f"no settings file {options.file}")
    return options


def run(options: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log_to_stderr(logging.INFO)
    if not options.debug:
        quiet_imports()
    layers = load_settings(options.file, options.changes)  # before torch is imported
    stages = STAGES if options.stage == "all" else (options.stage,)
    values = {stage: values_for(stage, layers) for stage in stages}
    if not options.show:
        check_needs(values)
    try:
        from vismem.training.arguments import arguments_for
        from vismem.training.run import train
    except ImportError as error:
        raise CommandError(f"training needs more packages: pip install 'vismem[train]' ({error})") from error

    if options.show:
        for stage in stages:
            shown = arguments_for(stage, layers).to_dict()
            echo_yaml({stage: {name: value for name, value in shown.items() if value is not None}}, sort_keys=True)
        return 0
    with termination_interrupts(), advising(lambda: "training has not started: run the same command again"):
        folder = train(options.stage, layers, resume=options.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        echo(folder)
    return 0


def check_needs(values: Mapping[str, Mapping[str, Any]]) -> None:
    """Checks the settings of each stage. Raises UsageError if something is missing."""
    trained = {stage: own for stage, own in values.items() if own.get("max_steps") != 0}
    for number, own in enumerate((trained or values).values()):
        if not own.get("output_dir"):
            raise UsageError("no output_dir for checkpoints and the memory: set output_dir=runs/NAME")
        if number == 0 and not own.get("base") and not own.get("checkpoint"):
            raise UsageError(
                "no base: set base=NAME_OR_FOLDER, or checkpoint=FOLDER of what a run made, which names its base"
            )
        if not own.get("data"):
            raise UsageError("no data: set data=FILE.jsonl, a folder or a hub name")
