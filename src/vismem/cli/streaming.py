"""An answer on its way to the terminal: text as soon as it is whole, and a mark where memory was invoked."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from vismem.decoding.detokenizer import Detokenizer
from vismem.decoding.markers import SHAPES
from vismem.escaping import visible

COLOURS = {"short": "1;36", "long": "1;35", "faint": "2"}  # cyan, magenta, dim


class Paper:
    """Where an answer is written: knows whether there is colour, and whether the marks' shapes can be shown.

    Args:
        out: a text stream, stdout by default. Colour needs a terminal, and NO_COLOR turns it off.
    """

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = sys.stdout if out is None else out
        self.terminal = self.out is not None and self.out.isatty()
        self.colour = self.terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self.fresh = True  # at the start of a line

    def write(self, text: str) -> None:
        if text and self.out is not None:
            self.out.write(text)
            self.out.flush()
            self.fresh = text.endswith("\n")

    def text(self, text: str) -> None:
        """Writes the model's words."""
        self.write(visible(text, keep="\n\t") if self.terminal else text)

    def line(self, text: str = "") -> None:
        """Writes a line of our own, on a line of its own."""
        self.write(("" if self.fresh else "\n") + text + "\n")

    def paint(self, text: str, colour: str) -> str:
        return f"\x1b[{COLOURS[colour]}m{text}\x1b[0m" if self.colour else text

    def name(self, kind: str) -> str:
        """A kind with its shape, where the stream can show it: `◆short`."""
        try:
            SHAPES[kind].encode(getattr(self.out, "encoding", None) or "utf-8")
        except UnicodeEncodeError:
            return kind
        return SHAPES[kind] + kind

    def mark(self, kind: str) -> None:
        """Writes the mark of an invocation: `[◆short]` or `[●long]`."""
        self.write(self.paint(f"[{self.name(kind)}]", kind))


class Streamer:
    """A streamer in the sense of transformers' `generate`: writes one row's answer on `paper`, token by token.

    Memory marks are written where they fall between the words.

    Args:
        tokenizer: of the processor.
        tokens: `model.tokens`, which tells invocation and end ids.
        paper: where to write.
    """

    def __init__(self, tokenizer, tokens, paper: Paper) -> None:
        self.words, self.paper = Detokenizer(tokenizer), paper
        self.kind_of, self.silent = tokens.kind_of, frozenset(tokens.end_ids.values())

    def put(self, value) -> None:
        """Takes the prompt [1, L], which is left out, then the new tokens [1] one by one."""
        if value.dim() > 1:
            return
        for token in value.tolist():
            if token in self.kind_of:
                self.paper.mark(self.kind_of[token])
            elif token not in self.silent:
                self.paper.text(self.words.put(token))

    def end(self) -> None:
        self.paper.text(self.words.end())
