"""Token ids as text, token by token: what has become whole comes out, what is half a character waits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids that are left out of a text (`skip_special_tokens`): those with a role, and all others marked as special."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {index for index, token in added.items() if token.special}


class Detokenizer:
    """Turns the words of one answer into text while it is written.

    Decodes from the last place where the text was whole, so that a character of several tokens comes out at once, and
    an answer of n tokens costs n short decodings. Invocation and end tokens are not words; leave them out.

    Args:
        tokenizer: of the processor.
        before: tokens that the text continues; they are not given out.

    Example:
        >>> words = Detokenizer(processor.tokenizer)
        >>> "".join([*map(words.put, ids), words.end()])
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before)
        self.start, self.read = 0, len(self.ids)  # decoded from `start`; given out up to `read`

    def put(self, token: int) -> str:
        """Takes the next word's id and returns the text that is whole now."""
        self.ids.append(token)
        return self._advance()

    def end(self) -> str:
        """Returns all that is left, whole or not."""
        return self._advance(last=True)

    def _advance(self, last: bool = False) -> str:
        written = len(self._decode(self.ids[self.start : self.read]))
        text = self._decode(self.ids[self.start :])
        if len(text) > written and (last or not text.endswith("\ufffd")):
            self.start, self.read = self.read, len(self.ids)
            return text[written:]
        return ""

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)
