"""Answers with markers where memory was invoked, as plain text and as HTML.

Short-term and long-term markers differ in shape and in colour; either is enough to tell them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from vismem.config import KINDS, Kind
from vismem.decoding.detokenizer import Detokenizer

SHAPES: dict[Kind, str] = {"short": "◆", "long": "●"}
INK: dict[Kind, str] = {"short": "#007d8c", "long": "#a0267e"}  # distinct to colour-blind readers too
CSS = "".join(f".memory.{kind} {{ color: {INK[kind]}; font-weight: 600; white-space: nowrap }}\n" for kind in KINDS)


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer: text, or the marker of an invocation.

    Args:
        text: the text; empty for a marker.
        kind: of the invocation; None for text.
        index: of the invocation in the answer; None for text.
    """

    text: str
    kind: Kind | None = None
    index: int | None = None


def pieces(new_tokens: Sequence[int], tokenizer: Any, tokens: Any) -> list[Piece]:
    """An answer's text and markers, in order.

    Args:
        new_tokens: its ids, invocation and end ids among them.
        tokenizer: of the processor.
        tokens: `model.tokens`, which knows invocation and end ids.

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
    """The same pieces, adjacent texts merged."""
    merged: list[Piece] = []
    for piece in found:
        if merged and piece.kind is None and merged[-1].kind is None:
            merged[-1] = Piece(merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return merged


def plain(found: Sequence[Piece]) -> str:
    """Markers as `[◆short]` and `[●long]`."""
    return "".join(piece.text if piece.kind is None else f"[{SHAPES[piece.kind]}{piece.kind}]" for piece in found)


def html(found: Sequence[Piece]) -> str:
    """Markers as `<span class="memory short" data-invocation="0">◆short</span>`; `CSS` has their colours."""

    def one(piece: Piece) -> str:
        if piece.kind is None:
            return escape(piece.text)
        name = f'<span class="memory {piece.kind}" data-invocation="{piece.index}" title="{piece.kind}-term memory">'
        return f"{name}{SHAPES[piece.kind]}{piece.kind}</span>"

    return "".join(map(one, found))
