"""`vismem eval tables|tasks`: makes the paper's tables; prints the folder of lmms-eval tasks."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path

from vismem.cli.parsing import CommandError, Parser, UsageError, add_step, echo, echo_yaml, log_to_stderr
from vismem.evaluation.settings import load_settings
from vismem.interrupts import advising, termination_interrupts
from vismem.loading import quiet_imports

TABLES = {
    "main": "every method on every benchmark (Tab. 1)",
    "subtasks": "short-term, long-term and both, by sub-task (Tab. 5, 6)",
    "partial": "full and partial training data (Tab. 7)",
    "continual": "training data in successive stages (Tab. 8)",
    "invocation": "policies: none, random, one kind, both; with latency (Tab. 3, 9)",
    "lengths": "lengths of the query and of memories (Tab. 10, 11)",
    "latency": "time per answer (Tab. 12)",
    "when": "how often memory is invoked, and where (Fig. 5, 9)",
}
SETTINGS = """settings (docs/configuration.md lists them all):
  methods, benchmarks          what to compare, on which data
  output_dir                   for answers, tables and plots
  preset=pocket                everything on the model in the package
  seeds, batch_size, max_new_tokens, limit, training, ...
A name may be inside a section: lengths.short_length=[4, 8]
Finished answers are kept: run the command again to resume.

tables:
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "vismem eval",
        "Evaluates: makes the paper's tables for any base and data; runs its benchmarks with lmms-eval.",
        "See `vismem eval STEP --help`. Example:",
        "vismem eval tables main preset=pocket",
    )
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True, title="steps")
    tables = add_step(
        steps,
        "tables",
        "the paper's tables: JSON, Markdown and a plot each",
        "Makes the paper's tables; trains and answers what is missing.\n\n"
        + SETTINGS
        + "\n".join(f"  {name:<12}{what}" for name, what in TABLES.items()),
        "vismem eval tables main my.yaml seeds=[0,1,2]",
    )
    tables.add_argument(
        "tables",
        nargs="+",
        metavar="TABLE|CONFIG.yaml|key=value",
        help="tables (or all), a settings file, changed settings",
    )
    tables.add_argument("--show", action="store_true", help="print the resolved settings and stop")
    add_step(
        steps,
        "tasks",
        "print the folder of task definitions for lmms-eval",
        "Prints the folder of the package's tasks, for lmms-eval's --include_path.",
        'lmms-eval --model vismem --include_path "$(vismem eval tasks)" --tasks vismem_mv_math',
    )
    options = parser.parse_args(arguments)
    if options.step == "tables":
        sort_arguments(options)
    return options


def sort_arguments(options: argparse.Namespace) -> None:
    """Sorts the arguments into tables, a settings file and changed settings."""
    words = options.tables
    options.changes = [word for word in words if "=" in word]
    plain = [word for word in words if "=" not in word]
    options.tables = [word for word in plain if word in TABLES]
    files = [word for word in plain if word not in TABLES and word != "all"]
    if "all" in plain:
        options.tables = list(TABLES)
    if len(files) > 1:
        raise UsageError(f"one settings file at most, got {' and '.join(files)}; tables are {', '.join(TABLES)}, all")
    options.file = files[0] if files else None
    if options.file and not Path(options.file).is_file():
        raise UsageError(f"{options.file} is neither a table nor a settings file; tables are {', '.join(TABLES)}, all")
    if not options.tables:
        raise UsageError(f"no table named; tables are {', '.join(TABLES)}, all")


def run(options: argparse.Namespace) -> int:
    if options.step == "tasks":
        from vismem.evaluation.lmms import tasks_folder

        echo(tasks_folder())
        return 0
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    log_to_stderr(logging.INFO if options.debug else logging.WARNING)
    if not options.debug:
        quiet_imports()
    settings = load_settings(options.file, options.changes)  # before torch is imported
    if options.show:
        echo_yaml(json.loads(json.dumps(dataclasses.asdict(settings))), sort_keys=False)  # without tuples
        return 0
    if not settings.output_dir:
        raise UsageError("no output_dir for answers and tables: set output_dir=results/NAME")
    words = [options.file] if options.file else []
    command = " ".join(["vismem eval tables", "{}", *map(shlex.quote, [*words, *options.changes])])
    try:
        from vismem.evaluation.tables import in_terminal, make
    except ImportError as error:
        raise CommandError(f"evaluation needs more packages: pip install 'vismem[eval]' ({error})") from error
    width = shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None
    advice = f"finished answers are in {settings.output_dir}: run the same command again to resume"
    with termination_interrupts(), advising(lambda: advice, replace=True):
        made = make(options.tables, settings, command, lambda table: echo(f"{in_terminal(table, width)}\n"))
    for path in made:
        echo(path)
    return 0
