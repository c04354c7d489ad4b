"""Streams an answer to the terminal: text as soon as its characters are complete, a marker at each invocation."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any, TextIO

from vismem.config import Kind
from vismem.decoding.detokenizer import Detokenizer
from vismem.decoding.markers import SHAPES
from vismem.deprecation import renamed
from vismem.escaping import visible

if TYPE_CHECKING:
    from torch import Tensor

COLOURS = {"short": "1;36", "long": "1;35", "faint": "2"}  # cyan, magenta, dim


class TerminalWriter:
    """Writes text and markers to a stream, stdout by default. Colour needs a terminal, and NO_COLOR turns it off."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.terminal = self.out is not None and self.out.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.at_line_start = True

    def write(self, text: str) -> None:
        if text and self.out is not None:
            self.out.write(text)
            self.out.flush()
            self.at_line_start = text.endswith("\n")

    def text(self, text: str) -> None:
        """Writes the model's words, with control characters escaped on a terminal."""
        self.write(visible(text, keep="\n\t") if self.terminal else text)

    def line(self, text: str = "") -> None:
        """Writes a line, after a line break if one is needed."""
        self.write(("" if self.at_line_start else "\n") + text + "\n")

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if self.colour else text

    def name(self, kind: Kind) -> str:
        """A kind with its shape, if the stream's encoding has it: `◆short`."""
        try:
            SHAPES[kind].encode(getattr(self.out, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return kind
        return SHAPES[kind] + kind

    def marker(self, kind: Kind) -> None:
        """Writes an invocation's marker: `[◆short]` or `[●long]`."""
        self.write(self.paint(f"[{self.name(kind)}]", kind))


class Streamer:
    """A streamer for `generate` that writes one row's answer token by token; `tokens` is the model's `tokens`."""

    def __init__(self, tokenizer: Any, tokens: Any, out: TerminalWriter) -> None:
        self.detokenizer, self.out = Detokenizer(tokenizer), out
        self.kind_of, self.ends = tokens.kind_of, frozenset(tokens.end_ids.values())

    def put(self, value: Tensor) -> None:
        """Takes the prompt [1, L], which is skipped, then new tokens [1] one by one."""
        if value.dim() > 1:
            return
        for token in value.tolist():
            if token in self.kind_of:
                self.out.marker(self.kind_of[token])
            elif token not in self.ends:
                self.out.text(self.detokenizer.put(token))

    def end(self) -> None:
        self.out.text(self.detokenizer.end())


__getattr__ = renamed(__name__, {"Paper": "TerminalWriter"})
