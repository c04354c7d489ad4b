"""The command line: runs a command and turns errors into one line and an exit code.

Exit codes:
    0: success.
    1: something named cannot be used: a broken or too large image, a damaged checkpoint, a device this machine lacks.
    2: the command line or a setting is wrong: an unknown option, a value out of range, an image path without a file.
    130, 143: interrupted with Ctrl-C; a long run was terminated.
    141: the reader of the output closed the pipe.

An error is one line on stderr, `vismem: error: ...`, with control characters escaped; `--debug` shows the traceback.

Each command is a module of this package with `parse(arguments)` and `run(options)`. torch and transformers are imported
in `run`, so that help and usage errors are instant.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module

from vismem import __version__
from vismem.cli.parsing import CommandError, Parser, UsageError, close_bars, error_line, say
from vismem.config import SettingsError
from vismem.escaping import visible
from vismem.interrupts import CTRL_C

COMMANDS = {
    "ask": "answer a question about images and show where memory was invoked",
    "app": "ask in the browser and inspect each invocation",
    "info": "show the parts and sizes of a base and its memory",
    "train": "train a memory: warm-up, stage I, stage II",
    "eval": "make the paper's tables; tasks for lmms-eval",
    "audit": "test whether memory is used: replace, probe and trace it",
    "serve": "serve a model with OpenAI's chat completions API",
    "pocket": "build, sample and evaluate the small model in the package",
    "bench": "measure speed (needs a source checkout)",
}

FAILED, USAGE, PIPE_CLOSED = 1, 2, 141


def overview() -> Parser:
    """The parser of `vismem` itself, which only lists the commands."""
    lines = [f"  {name:<8}{summary}" for name, summary in COMMANDS.items()]
    parser = Parser(
        "vismem",
        "Short-term and long-term latent vision memory for vision-language models.",
        "\n".join(["commands:", *lines, "", "See `vismem COMMAND --help`. Example:"]),
        'vismem ask shelf.png "Which price is lowest?"',
        usage="vismem COMMAND ... | --help | --version",
    )
    parser.add_argument("--version", action="version", version=f"vismem {__version__}")
    return parser


def dispatch(arguments: list[str]) -> int:
    """Parses and runs a command."""
    if not arguments or arguments[0].startswith("-"):
        overview().parse_args(arguments)
        raise UsageError("no command given (see `vismem --help`)")
    name, *rest = arguments
    if name not in COMMANDS:
        raise UsageError(f"unknown command {name!r}; commands are {', '.join(COMMANDS)}")
    command = import_module(f"vismem.cli.{name}")
    options = command.parse(rest)
    if not options.debug:
        warnings.simplefilter("ignore")
    try:
        return command.run(options) or 0
    except SystemExit as stop:
        if name == "bench":  # benchmarks may call sys.exit
            raise
        last = traceback.extract_tb(stop.__traceback__)[-1]  # foreign code, such as a model's or a plug-in's
        raise CommandError(f"{last.filename}, line {last.lineno}, called sys.exit({stop.code!r})") from stop


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; the entry point of `vismem`.

    Args:
        argv: the arguments after the program's name; by default the process's.

    Example:
        >>> main(["--version"])
        vismem 0.1.0
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    with contextlib.suppress(AttributeError):  # print `?` for characters the terminal lacks
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            code = dispatch(arguments)
            if sys.stdout is not None:
                sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse's --help and --version, and benchmarks
        if isinstance(stop.code, str):
            close_bars()
            say(f"error: {stop.code}")
            return FAILED
        return flushed(stop.code or 0)
    except KeyboardInterrupt as stop:
        close_bars()
        say(str(stop) or "interrupted")
        return flushed(getattr(stop, "code", CTRL_C))
    except BrokenPipeError:
        silence_stdout()
        return PIPE_CLOSED
    except Exception as error:
        close_bars()
        if "--debug" in arguments and sys.stderr is not None:
            sys.stderr.write(visible(traceback.format_exc(), keep="\n\t"))
        say(f"error: {error_line(error)}")
        return flushed(USAGE if isinstance(error, (UsageError, SettingsError)) else FAILED)


def flushed(code: int) -> int:
    """Flushes stdout, whose reader may be gone; returns the exit code."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
        return PIPE_CLOSED
    except OSError:
        silence_stdout()
    return code


def silence_stdout() -> None:
    """Redirects stdout to the null device, so that Python's flush at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
