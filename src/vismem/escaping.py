"""Text from elsewhere - answers, file names, settings, messages - made safe to print on a terminal."""

from __future__ import annotations

import re

# C0 and C1 control characters, what turns the direction of writing, separators of lines, and halves of characters.
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str, keep: str = "") -> str:
    r"""`text` with control characters shown as Python writes them, so that a terminal does not obey them.

    Args:
        text: from anywhere.
        keep: control characters that stay, such as a newline.

    Example:
        >>> visible("\x1b[31m.png")
        '\\x1b[31m.png'
    """
    return _CONTROL.sub(
        lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text
    )
