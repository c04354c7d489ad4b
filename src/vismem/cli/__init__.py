"""The command line: finds the command, runs it, and turns what goes wrong into one line and an exit code.

Exit codes: 0 done; 1 failed - what was named cannot be used (a broken, unreadable or too large image, a damaged or
unknown checkpoint, a device that is not here); 2 misuse - the command line or a setting is wrong (an unknown command,
option or setting, a value out of range, an empty question, an image path that is not a file); 130 interrupted with
Ctrl-C; 143 a long run was terminated; 141 the reader of the output went away. Errors are one line on stderr,
`vismem: error: ...`, with control characters escaped; `--debug` shows the traceback.

Each command is a file of this folder: `parse(arguments)` reads its options, `run(options)` runs it. torch and
transformers are imported inside `run`, so that help and misuse are answered at once.
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
from vismem.cli.parsing import Failure, Misuse, Parser, close_bars, one_line, say
from vismem.config import SettingsError
from vismem.escaping import visible

COMMANDS = {
    "ask": "answer a question about images, and show where memory was invoked",
    "app": "ask in the browser, and look into each invocation",
    "info": "what a base and its memory are made of",
    "train": "train a memory: warm-up, stage I, stage II",
    "eval": "the paper's tables, one command each; tasks for lmms-eval",
    "audit": "is memory really used? replaced, probed and watched, with a report",
    "serve": "serve a model as OpenAI's chat completions are served",
    "pocket": "make, sample and evaluate the small model that comes with the package",
    "bench": "measure speed (needs a source checkout)",
}

FAILED, MISUSE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141


def overview() -> Parser:
    """The parser of `vismem` itself, which knows the commands' names only."""
    lines = [f"  {name:<8}{summary}" for name, summary in COMMANDS.items()]
    parser = Parser(
        "vismem",
        "Short-term and long-term latent vision memory for vision-language models.",
        "\n".join(["commands:", *lines, "", "`vismem COMMAND --help` says more. Example:"]),
        'vismem ask shelf.png "Which price is lowest?"',
        usage="vismem COMMAND ... | --help | --version",
    )
    parser.add_argument("--version", action="version", version=f"vismem {__version__}")
    return parser


def dispatch(arguments: list[str], debug: list[bool]) -> int:
    """Parses, and runs the command; notes in `debug` that the user asked for tracebacks."""
    if not arguments or arguments[0].startswith("-"):
        overview().parse_args(arguments)
        raise Misuse("no command given (see `vismem --help`)")
    name, *rest = arguments
    if name not in COMMANDS:
        raise Misuse(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    command = import_module(f"vismem.cli.{name}")
    options = command.parse(rest)
    if options.debug:
        debug.append(True)
    else:
        warnings.simplefilter("ignore")
    try:
        return command.run(options) or 0
    except SystemExit as stop:
        if name == "bench":  # whose programs end so
            raise
        raise Failure(f"{ended_by(stop)} ended the program with sys.exit({stop.code!r})") from stop


def ended_by(stop: SystemExit) -> str:
    """Where foreign code - a model's, a plug-in's - ended the program."""
    last = traceback.extract_tb(stop.__traceback__)[-1]
    return f"{last.filename}, line {last.lineno},"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; the entry point of `vismem`.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Example:
        >>> main(["--version"])
        vismem 0.1.0
        0
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug: list[bool] = []
    with contextlib.suppress(AttributeError):  # a character that the terminal cannot show is no reason to stop
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        with warnings.catch_warnings():
            code = dispatch(arguments, debug)
            if sys.stdout is not None:
                sys.stdout.flush()
        return code
    except SystemExit as stop:  # argparse's --help and --version, and benchmarks
        if isinstance(stop.code, str):
            close_bars()
            return report(stop.code, FAILED)
        return flushed(stop.code or 0)
    except KeyboardInterrupt as stop:
        close_bars()
        say(str(stop) or "interrupted")
        return flushed(getattr(stop, "code", INTERRUPTED))
    except BrokenPipeError:
        silence_stdout()
        return PIPE_CLOSED
    except Exception as error:
        close_bars()
        if debug and sys.stderr is not None:
            sys.stderr.write(visible(traceback.format_exc(), keep="\n\t"))
        return flushed(report(one_line(error), MISUSE if isinstance(error, (Misuse, SettingsError)) else FAILED))


def report(message: str, code: int) -> int:
    """Says what went wrong on stderr, and passes the exit code on."""
    say(f"error: {message}")
    return code


def flushed(code: int) -> int:
    """Flushes stdout, whose reader may be gone by now, and passes the exit code on."""
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
    """Points stdout at nothing, so that Python's own flush at exit does not complain a second time."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
