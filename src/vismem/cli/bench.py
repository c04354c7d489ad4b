"""`vismem bench NAME ...`: runs `benchmarks/NAME.py` of the source checkout with the rest of the command line."""

from __future__ import annotations

import argparse

from vismem.cli import checkout
from vismem.cli.parsing import UsageError, command_parser


def names() -> list[str]:
    files = (checkout.CHECKOUT / "benchmarks").glob("*.py")
    return sorted(path.stem for path in files if "def main(" in path.read_text(encoding="utf-8"))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = command_parser(
        "vismem bench",
        "Measures speed with the benchmarks of a source checkout; everything after the name goes to the benchmark.",
        "vismem bench decode --help",
        usage="vismem bench [--help] [--debug] NAME ...",
    )
    parser.add_argument("name", metavar="NAME", help=f"here: {', '.join(names()) or 'none, this is no checkout'}")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="options of the benchmark")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    if names() and options.name not in names():
        raise UsageError(f"no benchmark {options.name!r}; there are {', '.join(names())}")
    return checkout.import_from("benchmarks", options.name, "benchmarks need").main(options.arguments) or 0
