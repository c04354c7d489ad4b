"""Argument parsers, option types, errors and output shared by all commands; does not import torch.

`vismem.cli` turns `UsageError` and `CommandError` into exit codes.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from tqdm import tqdm

from vismem.config import SettingsError
from vismem.decoding.policies import read_policy
from vismem.deprecation import renamed
from vismem.escaping import visible

MAX_TOKENS, MOST_SEED = 1_000_000, 2**63 - 1


class UsageError(Exception):
    """The command line is wrong: exit code 2."""


class CommandError(Exception):
    """The command line is right, but what it names cannot be used: exit code 1."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `UsageError`, and whose help ends with an example.

    Args:
        prog: the words before the options, such as `"vismem ask"`.
        description, details: help before and after the options.
        example: a command line that works.
    """

    def __init__(self, prog: str, description: str, details: str, example: str, **kwargs: Any) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"{details}\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def command_parser(prog: str, description: str, example: str, **kwargs: Any) -> Parser:
    """A command's parser, with the options common to all commands."""
    return _add_debug(Parser(prog, description, "example:", example, **kwargs))


def add_step(steps: Any, name: str, summary: str, description: str, example: str, **kwargs: Any) -> Parser:
    """Adds the parser of a command's step; `steps` is what `add_subparsers` returned."""
    more = {"help": summary, "description": description, "details": "example:", "example": example}
    return _add_debug(steps.add_parser(name, **more, **kwargs))


def _add_debug(parser: Parser) -> Parser:
    parser.add_argument("--debug", action="store_true", help="show warnings, and the traceback of an error")
    return parser


def say(message: str) -> None:
    """Prints one line to stderr, above any progress bar."""
    if sys.stderr is not None:
        tqdm.write(f"vismem: {visible(message)}", file=sys.stderr)
        sys.stderr.flush()


def close_bars() -> None:
    """Ends the lines of progress bars that an error left open."""
    # tqdm has no public list of its bars; tested with tqdm 4.70.1.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


def echo(text: object) -> None:
    """Prints a result; control characters are escaped on a terminal, and kept elsewhere."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    print(visible(str(text), keep="\n\t") if terminal else text, flush=True)


def echo_yaml(values: Mapping[str, Any], *, sort_keys: bool) -> None:
    """Prints settings as YAML."""
    import yaml

    echo(yaml.safe_dump(values, sort_keys=sort_keys, allow_unicode=True).rstrip("\n"))


class StderrHandler(logging.Handler):
    """Writes log records to stderr, above any progress bar, with control characters escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr is not None:
                tqdm.write(visible(self.format(record), keep="\n\t"), file=sys.stderr)
        except Exception:
            self.handleError(record)


def log_to_stderr(level: int, layout: str = "%(message)s") -> None:
    """Logs to stderr, with warnings only from libraries that log much on import or per request."""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter(layout))
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in ("httpx", "accelerate", "absl", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def error_line(error: BaseException, limit: int = 400) -> str:
    """An exception in one line, with its type if its message was not written for users."""
    ours = isinstance(error, (UsageError, CommandError, SettingsError))  # one line; a newline is part of a name
    text = str(error).strip() if ours else " ".join(str(error).split())
    text = text if ours or len(text) <= limit else f"{text[:limit]}..."
    if isinstance(error, (UsageError, CommandError, ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)" if text else f"{type(error).__name__} (see --debug)"


# Option types. argparse turns their ArgumentTypeError into a UsageError that names the option.


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes an integer from `low` to `high`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            rule = f" from {low} to {high}" if high < 2**31 else f", {low} or more"
            raise argparse.ArgumentTypeError(f"must be a whole number{rule}, got {text!r}")
        return value

    return read


def temperature(text: str) -> float:
    """The type of `--temperature`: a finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number, 0 or more, got {text!r}")
    return value


def invocation_policy(text: str) -> str:
    """The type of `--invocation`: only checked here, as the policy needs the seed."""
    try:
        read_policy(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


__getattr__ = renamed(__name__, {"Misuse": "UsageError", "Failure": "CommandError", "one_line": "error_line"})
