"""`vismem bench NAME ...`: runs `benchmarks/NAME.py` of the source checkout with the rest of the command line."""

from __future__ import annotations

import argparse
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from vismem.cli.checkout import checkout_folder, importable
from vismem.cli.parsing import Parser, UsageError, command_parser


def folder() -> Path:
    return checkout_folder("benchmarks")


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.py") if "def main(" in path.read_text(encoding="utf-8"))


def parser() -> Parser:
    found = command_parser(
        "vismem bench",
        "Measures speed with the benchmarks of a source checkout; everything after the name goes to the benchmark.",
        "vismem bench decode --help",
        usage="vismem bench [--help] [--debug] NAME ...",
    )
    found.add_argument("name", metavar="NAME", help=f"here: {', '.join(names()) or 'none, this is no checkout'}")
    found.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of the benchmark")
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    return parser().parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    importable(folder(), "benchmarks need")
    if options.name not in names():
        raise UsageError(f"no benchmark {options.name!r}; there are {', '.join(names())}")
    path = folder() / f"{options.name}.py"
    spec = spec_from_file_location(f"vismem_benchmarks_{options.name}", path)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module.main(options.arguments) or 0
