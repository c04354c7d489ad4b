"""The bytes that each token of a vocabulary stands for, also where they are a part of a character only."""

from __future__ import annotations

import json
import re
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # one byte, in vocabularies of SentencePiece
BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of each letter in byte-level vocabularies
ANCHOR = "a"  # a text to decode a token after, as the first one of a text may lose its leading space


class TokenBytes:
    """Gives each token's bytes; those of a text's tokens in a row are the text's.

    Args:
        tokenizer: of the processor.

    Example:
        >>> spell = TokenBytes(processor.tokenizer)
        >>> b"".join(spell(token, first=at == 0) for at, token in enumerate(ids)).decode()
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.added = set(getattr(tokenizer, "added_tokens_decoder", ()))
        self.byte_level = "ByteLevel" in decoders_of(tokenizer)
        self.anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)[-1:]
        self.anchored = tokenizer.decode(self.anchor)

    def __call__(self, token: int, *, first: bool = False) -> bytes | None:
        """The token's bytes, or None where they cannot be known.

        Args:
            token: its id.
            first: whether it is the first of its text, where some vocabularies drop a leading space.
        """
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # rows of embeddings beyond the vocabulary
            return b""
        if token not in self.added:
            if self.byte_level and all(letter in BYTE_OF for letter in piece):
                return bytes(BYTE_OF[letter] for letter in piece)
            if not self.byte_level and (byte := BYTE.fullmatch(piece)):
                return bytes([int(byte[1], 16)])
        text = self._text(token, first)
        return None if "\ufffd" in text and "\ufffd" not in piece else text.encode()

    def _text(self, token: int, first: bool) -> str:
        if not first:
            both = self.tokenizer.decode([*self.anchor, token])
            if both.startswith(self.anchored):
                return both[len(self.anchored) :]
        return self.tokenizer.decode([token])


def decoders_of(tokenizer: Any) -> set[str]:
    """The names of the steps in which a tokenizer decodes, as the tokenizers library calls them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    state = json.loads(decoder.__getstate__()) if decoder is not None else {}
    return {step["type"] for step in (state, *state.get("decoders", ())) if "type" in step}
