"""Arguments and errors: what every command shares, without torch.

`Misuse` is an error in the command line itself, `Failure` one in what it names; `vismem.cli` gives each its exit code.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tqdm import tqdm

from vismem.config import SettingsError
from vismem.decoding.policies import Policy, read_policy
from vismem.escaping import visible

MOST_TOKENS = 1_000_000


class Misuse(Exception):
    """The command line is wrong: exit code 2."""


class Failure(Exception):
    """The command line is right, and what it names cannot be used: exit code 1."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises `Misuse`, and whose help ends with an example.

    Args:
        prog: the words that lead to the command.
        description, details: help before and after the options.
        example: a command line that works.
    """

    def __init__(self, prog: str, description: str, details: str, example: str, **kwargs) -> None:
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"{details}\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> None:
        raise Misuse(f"{message} (see `{self.prog} --help`)")


def command_parser(prog: str, description: str, example: str, **kwargs) -> Parser:
    """A command's parser, with the options that all commands have."""
    parser = Parser(prog, description, "example:", example, **kwargs)
    add_debug(parser)
    return parser


def add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--debug", action="store_true", help="show warnings and, after an error, the traceback")


def say(message: str) -> None:
    """One line on stderr, past any progress bar."""
    if sys.stderr is not None:
        tqdm.write(f"vismem: {visible(message)}", file=sys.stderr)
        sys.stderr.flush()


def close_bars() -> None:
    """Ends the lines of progress bars that an error left standing."""
    for bar in list(tqdm._instances):
        bar.close()


def echo(text: object) -> None:
    """Prints a result: on a terminal with control characters escaped, elsewhere as it is."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    print(visible(str(text), keep="\n\t") if terminal else text, flush=True)


def echo_yaml(values: Mapping[str, Any], *, sort_keys: bool) -> None:
    """Prints settings as YAML."""
    import yaml

    echo(yaml.safe_dump(values, sort_keys=sort_keys, allow_unicode=True).rstrip("\n"))


class _Lines(logging.StreamHandler):
    """Log records as lines on stderr, past any progress bar, control characters escaped."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if sys.stderr is not None:
                tqdm.write(visible(self.format(record), keep="\n\t"), file=sys.stderr)
        except Exception:
            self.handleError(record)


def log_to_stderr(level: int, layout: str = "%(message)s") -> None:
    """Has the log written to stderr; what torch warns of while libraries are imported is of no interest to a user."""
    handler = _Lines()
    handler.setFormatter(logging.Formatter(layout))
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in ("httpx", "accelerate", "absl", "torch"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def one_line(error: BaseException, limit: int = 400) -> str:
    """An exception as one line; its type is named where the message was not written for a user."""
    ours = isinstance(error, (Misuse, Failure, SettingsError))  # of one line; a newline in it is part of a name
    text = str(error).strip() if ours else " ".join(str(error).split())
    text = text if ours or len(text) <= limit else f"{text[:limit]}..."
    if isinstance(error, (Misuse, Failure, ValueError, OSError)) and text:
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)" if text else f"{type(error).__name__} (see --debug)"


# Types of options: argparse turns their ArgumentTypeError into a Misuse that names the option.


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that takes a whole number in a range."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            rule = f"from {low} to {high}" if high < 2**31 else f"of {low} or more"
            raise argparse.ArgumentTypeError(f"must be a whole number {rule}, got {text!r}")
        return value

    return read


def temperature(text: str) -> float:
    """The type of `--temperature`: a finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of 0 or more, got {text!r}")
    return value


def invocation(text: str) -> str:
    """The type of `--invocation`: checked here, made into a policy by `policy` once the seed is known."""
    policy(text, 0)
    return text


def policy(text: str, seed: int) -> str | Policy:
    """The invocation policy that a string means, as `read_policy` has it. Raises argparse.ArgumentTypeError."""
    try:
        return read_policy(text, seed)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
