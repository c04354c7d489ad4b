"""Converts a task's chat messages to a row with text and images in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vismem.data.images import BadImageError, open_image
from vismem.data.rows import Row


def row_of(name: str, messages: Sequence[dict[str, Any]], mark: str | None = None) -> Row:
    """The row of one sample.

    Args:
        name: of the sample, for error messages.
        messages: from a task's `doc_to_messages`: `role` and `content`, a text or a list of text and image parts. An
            image's `url` is a picture, a path, bytes, or a dictionary with bytes or a path.
        mark: the processor's image placeholder. It is removed from the text, where some tasks write "<image>" although
            the image has its own part.

    Raises:
        ValueError: if there are no messages, a part is neither text nor image, or an image cannot be read.

    Example:
        >>> row_of("toy, sample 0", [{"role": "user", "content": "Which colour?"}]).prompt[0]["content"]
        [{'type': 'text', 'text': 'Which colour?'}]
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"{name}: the task gave no messages to answer")
    prompt: list[dict[str, Any]] = []
    images: list[Any] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        kept = []
        for part in parts:
            kind = part.get("type")
            if kind == "text":
                text = str(part["text"])
                kept.append({"type": "text", "text": text.replace(mark, "") if mark else text})
            elif kind == "image":
                images.append(_picture(name, len(images) + 1, part.get("url", part.get("image"))))
                kept.append({"type": "image"})
            else:
                raise ValueError(f"{name}: the task has a part of type {kind!r}; this model reads images and text")
        prompt.append({"role": message["role"], "content": kept})
    return Row(name, prompt, images, "", "", {})


def _picture(name: str, number: int, value: Any) -> Any:
    try:
        return open_image(value)
    except BadImageError as error:
        raise ValueError(f"{name}, image {number}: {error}") from error
