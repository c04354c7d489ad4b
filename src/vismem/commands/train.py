"""`vismem train warmup|stage1|stage2|all|sft|grpo`: trains a memory, or a baseline, by a YAML file and `key=value`."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

from vismem.commands.parsing import Failure, Misuse, command_parser
from vismem.interrupts import advising, termination_interrupts

EXTRA = ("yaml", "tqdm")
STEPS = ("warmup", "stage1", "stage2", "all", "sft", "grpo")
SETTINGS = """settings (docs/configuration.md lists them all):
  base, data, output_dir       what is trained, on what, and where it goes
  checkpoint                   the memory, or the baseline's adapter, to start from
  rewards                      exact, choice, numeric, ... or module:function
  preset                       paper (default) or pocket
  group_size, learning_rate, max_steps, per_device_train_batch_size, ...
                               every field of transformers' TrainingArguments works too
A key may name its stage: stage2.learning_rate=1e-5.
sft and grpo train no memory but a LoRA adapter of the base's language model, to compare with (docs/baselines.md).
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "vismem train",
        "Trains a memory: an optional supervised warm-up, stage I (what memory holds) and stage II (when to invoke it)."
        "\nOr a baseline on the same data: supervised fine-tuning (sft) or GRPO (grpo) of a LoRA adapter."
        f"\n\n{SETTINGS}",
        "vismem train all preset=pocket output_dir=runs/pocket\n"
        "  vismem train stage1 my.yaml learning_rate=1e-4 --resume\n"
        "  vismem train sft preset=pocket output_dir=runs/sft",
    )
    parser.add_argument("stage", choices=STEPS, help="what to train")
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml|key=value", help="a file of settings, and changes")
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    parser.add_argument("--show", action="store_true", help="print the resolved settings and stop")
    options = parser.parse_intermixed_args(arguments)
    files = [text for text in options.settings if "=" not in text]
    if len(files) > 1:
        raise Misuse(f"one settings file at most, got {' and '.join(files)} (changes are written key=value)")
    options.file = files[0] if files else None
    options.changes = [text for text in options.settings if "=" in text]
    if options.file and not Path(options.file).is_file():
        raise Misuse(f"no settings file {options.file}")
    return options


def run(options: argparse.Namespace) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "accelerate", "absl"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        from vismem.training.arguments import SECTIONS, STAGES, arguments_for, load_settings
        from vismem.training.run import train
    except ImportError as error:
        raise Failure(f"training needs more packages: pip install 'vismem[train]' ({error})") from error

    layers = load_settings(options.file, options.changes)
    if options.show:
        import yaml

        for stage in STAGES if options.stage == "all" else (options.stage,):
            values = arguments_for(stage, layers).to_dict()
            values = {name: value for name, value in values.items() if value is not None}
            print(yaml.safe_dump({stage: values}, sort_keys=True, allow_unicode=True), end="")
        return 0
    sections = [section for layer in layers for section in (layer, *(layer.get(stage) or {} for stage in SECTIONS))]
    if not any("output_dir" in section for section in sections):
        raise Misuse("no output_dir: where should checkpoints and the memory go? (output_dir=runs/NAME)")
    with termination_interrupts(), advising(lambda: "training has not begun, so run the same command again"):
        folder = train(options.stage, layers, options.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        print(folder)
    return 0
