"""Makes untrusted text (answers, file names, settings, messages) safe to print on a terminal."""

from __future__ import annotations

import re

# C0 and C1 controls, bidirectional controls, line separators, and surrogates.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    r"""Escapes control characters as in Python string literals.

    Args:
        text: any text.
        keep: control characters to leave alone, such as a newline.

    Example:
        >>> visible("\x1b[31m.png")
        '\\x1b[31m.png'
    """
    return _CONTROL.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text
    )
