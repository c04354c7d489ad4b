"""Answers with marks where memory was invoked: as plain text, as the terminal prints them, and as HTML.

Short and long are told apart by shape and by colour, so that either is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vismem.config import KINDS, Kind
from vismem.decoding.detokenizer import Detokenizer

SHAPES: dict[Kind, str] = {"short": "◆", "long": "●"}
INK: dict[Kind, str] = {"short": "#007d8c", "long": "#a0267e"}  # also apart for those who see red and green alike
CSS = "".join(f".memory.{kind} {{ color: {INK[kind]}; font-weight: 600; white-space: nowrap }}\n" for kind in KINDS)


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: words, or the mark of an invocation.

    Args:
        text: the words; empty for a mark.
        kind: of the invocation; None for words.
        index: of the invocation in the answer; None for words.
    """

    text: str
    kind: Kind | None = None
    index: int | None = None


def pieces(new_tokens: Sequence[int], tokenizer: Any, tokens: Any) -> list[Piece]:
    """An answer's words and marks, in order.

    Args:
        new_tokens: its ids, invocation and end ids among them.
        tokenizer: of the processor.
        tokens: `model.tokens`, which tells invocation and end ids.

    Example:
        >>> pieces([...], processor.tokenizer, model.tokens)
        [Piece('Row 2', None, None), Piece('', 'short', 0), Piece(' red.', None, None)]
    """
    found: list[Piece] = []
    words, count, ends = Detokenizer(tokenizer), 0, set(tokens.end_ids.values())
    for token in new_tokens:
        if token in tokens.kind_of:
            found.append(Piece("", tokens.kind_of[token], count))
            count += 1
        elif token not in ends and (text := words.put(token)):
            found.append(Piece(text))
    if text := words.end():
        found.append(Piece(text))
    return joined(found)


def joined(found: Sequence[Piece]) -> list[Piece]:
    """The same pieces, words that follow each other as one."""
    merged: list[Piece] = []
    for piece in found:
        if merged and piece.kind is None and merged[-1].kind is None:
            merged[-1] = Piece(merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return merged


def plain(found: Sequence[Piece]) -> str:
    """Marks as `[◆short]` and `[●long]`."""
    return "".join(piece.text if piece.kind is None else f"[{SHAPES[piece.kind]}{piece.kind}]" for piece in found)


def html(found: Sequence[Piece]) -> str:
    """Marks as `<span class="memory short" data-invocation="0">◆short</span>`; `CSS` has their colours."""

    def one(piece: Piece) -> str:
        if piece.kind is None:
            return escape(piece.text)
        name = f'<span class="memory {piece.kind}" data-invocation="{piece.index}" title="{piece.kind}-term memory">'
        return f"{name}{SHAPES[piece.kind]}{piece.kind}</span>"

    return "".join(map(one, found))
