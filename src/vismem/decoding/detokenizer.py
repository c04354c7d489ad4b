"""Token ids to text while an answer is written: whole characters come out, partial ones wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids left out of text (`skip_special_tokens`): tokens with a role, and all others marked as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}


class Detokenizer:
    """Turns the tokens of one answer into text while it is written.

    Decodes from the last position at which the text was whole, so a character of several tokens comes out at once, and
    an answer of n tokens costs n short decodings. Leave out invocation and end tokens.

    Args:
        tokenizer: of the processor.
        before: tokens that the text continues; their text is not returned.

    Example:
        >>> words = Detokenizer(processor.tokenizer)
        >>> "".join([*map(words.put, ids), words.end()])
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before)
        self.start, self.read = 0, len(self.ids)  # decoded from `start`; given out up to `read`

    def put(self, token: int) -> str:
        """Takes the next token and returns the text that is now whole."""
        self.ids.append(token)
        return self._advance()

    def end(self) -> str:
        """Returns the rest, whole or not."""
        return self._advance(last=True)

    def _advance(self, *, last: bool = False) -> str:
        written = len(self._decode(self.ids[self.start : self.read]))
        text = self._decode(self.ids[self.start :])
        if len(text) > written and (last or not text.endswith("\ufffd")):
            self.start, self.read = self.read, len(self.ids)
            return text[written:]
        return ""

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
