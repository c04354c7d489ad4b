"""`vismem eval tables|tasks`: the paper's tables from one command each, and the folder of tasks for lmms-eval."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path

from vismem.cli.parsing import Failure, Misuse, Parser, add_debug, echo, echo_yaml, log_to_stderr
from vismem.evaluation.settings import load_settings
from vismem.interrupts import advising, termination_interrupts
from vismem.loading import quiet_imports

NAMES = {
    "main": "every method on every benchmark (Tab. 1)",
    "subtasks": "short-term, long-term, both, by sub-task (Tab. 5, 6)",
    "partial": "full against partial training data (Tab. 7)",
    "continual": "stages of data one after another (Tab. 8)",
    "invocation": "who invokes: nobody, chance, one kind, both; with time (Tab. 3, 9)",
    "lengths": "lengths of query and memories (Tab. 10, 11)",
    "latency": "what an answer takes (Tab. 12)",
    "when": "how often memory is invoked, and where (Fig. 5, 9)",
}
SETTINGS = """settings (docs/configuration.md lists them all):
  methods, benchmarks          what is compared, on what
  output_dir                   where answers, tables and plots go
  preset=pocket                all of it on the model in the package
  seeds, batch_size, max_new_tokens, limit, training, ...
A name may be inside a section: lengths.short_length=[4, 8]
What is there already is kept: run the command again to go on.

tables:
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        "vismem eval",
        "Evaluates: the paper's tables for any base and data, and its benchmarks through lmms-eval.",
        "`vismem eval STEP --help` says more. Example:",
        "vismem eval tables main preset=pocket",
    )
    steps = parser.add_subparsers(dest="step", metavar="STEP", required=True, title="steps")
    tables = steps.add_parser(
        "tables",
        help="the paper's tables: JSON, Markdown and a plot each",
        description="Makes tables of the paper; trains and answers what is missing.\n\n"
        + SETTINGS
        + "\n".join(f"  {name:<12}{what}" for name, what in NAMES.items()),
        details="example:",
        example="vismem eval tables main my.yaml seeds=[0,1,2]",
    )
    tables.add_argument(
        "tables", nargs="+", metavar="TABLE|CONFIG.yaml|key=value", help="tables (or all), a file, changes"
    )
    tables.add_argument("--show", action="store_true", help="print the resolved settings and stop")
    add_debug(tables)
    tasks = steps.add_parser(
        "tasks",
        help="print the folder of task definitions for lmms-eval",
        description="Prints the folder of the tasks that come with the package, for lmms-eval's --include_path.",
        details="example:",
        example='lmms-eval --model vismem --include_path "$(vismem eval tasks)" --tasks vismem_mv_math',
    )
    add_debug(tasks)
    options = parser.parse_args(arguments)
    if options.step == "tables":
        sort_out(options)
    return options


def sort_out(options: argparse.Namespace) -> None:
    """Tells tables, a settings file and changes apart."""
    words = options.tables
    options.changes = [word for word in words if "=" in word]
    plain = [word for word in words if "=" not in word]
    options.tables = [word for word in plain if word in NAMES]
    files = [word for word in plain if word not in NAMES and word != "all"]
    if "all" in plain:
        options.tables = list(NAMES)
    if len(files) > 1:
        raise Misuse(f"one settings file at most, got {' and '.join(files)}; tables are {', '.join(NAMES)}, all")
    options.file = files[0] if files else None
    if options.file and not Path(options.file).is_file():
        raise Misuse(f"{options.file} is neither a table nor a settings file; tables are {', '.join(NAMES)}, all")
    if not options.tables:
        raise Misuse(f"no table named; there are {', '.join(NAMES)}, all")


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
        echo_yaml(plain(dataclasses.asdict(settings)), sort_keys=False)
        return 0
    if not settings.output_dir:
        raise Misuse("no output_dir: where should answers and tables go? (output_dir=results/NAME)")
    words = [options.file] if options.file else []
    command = " ".join(["vismem eval tables", "{}", *map(shlex.quote, [*words, *options.changes])])
    try:
        from vismem.evaluation.tables import in_terminal, make
    except ImportError as error:
        raise Failure(f"evaluation needs more packages: pip install 'vismem[eval]' ({error})") from error
    width = shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None
    advice = f"what is answered is kept in {settings.output_dir}: run the same command again to continue"
    with termination_interrupts(), advising(lambda: advice, replace=True):
        made = make(options.tables, settings, command, lambda table: echo(f"{in_terminal(table, width)}\n"))
    for path in made:
        echo(path)
    return 0


def plain(value):
    """Settings as YAML has them: lists for tuples."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
