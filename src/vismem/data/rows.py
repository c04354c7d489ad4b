"""What a row is, and how one is made from the dictionary that a file or a dataset holds.

A row follows TRL's conversational layout. Nothing here opens files: images stay as given until `Draft.open`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vismem.data.images import BadImage, open_image

TAKEN = ("prompt", "images", "image", "answer", "completion")
ROLES = ("system", "developer", "user", "assistant", "tool")
_INSIDE = ("image", "path", "url", "base64", "image_url")  # where an image part may hold its image


class BadDataError(ValueError):
    """A source that cannot be used, or one with too many bad rows."""


class BadRow(ValueError):
    """One row that cannot be used; the message says why, not where."""


@dataclass(frozen=True)
class Row:
    """One example.

    Args:
        id: where it came from: "file.jsonl:12" (file and line), or "name[12]" (dataset and index).
        prompt: chat messages; every content is a list of parts, and {"type": "image"} stands where an image goes.
        images: as many RGB pictures as `prompt` has image parts, in their order.
        answer: the reference answer.
        completion: the reference reply, for supervised warm-up; the answer where the source has none.
        columns: all other columns, untouched, for the rewards.
    """

    id: str
    prompt: list[dict[str, Any]]
    images: list[Image.Image]
    answer: str
    completion: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Draft:
    """A row whose images are not opened yet; `sources` are as the row gave them."""

    prompt: list[dict[str, Any]]
    sources: list[Any]
    answer: str
    completion: str
    columns: dict[str, Any]

    def open(self, row_id: str, folder: Path) -> Row:
        """The row with its images; relative paths start from `folder`. Raises BadRow."""
        try:
            images = [open_image(source, folder) for source in self.sources]
        except BadImage as error:
            raise BadRow(str(error)) from error
        return Row(row_id, self.prompt, images, self.answer, self.completion, self.columns)


def read_row(raw: Any) -> Draft:
    """Checks a dictionary and brings it into shape.

    Raises:
        BadRow: if the prompt or the answer is missing or malformed, or images and image parts do not match.
    """
    messages, answer, completion = read_text(raw)
    inside = [part.pop("image") for message in messages for part in message["content"] if part.get("image") is not None]
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    sources = _sources(raw)
    if inside and sources:
        raise BadRow("images stand both in the prompt's parts and in `images`; give them in one place")
    if inside and len(inside) != places:
        raise BadRow(f"{places} image parts in the prompt, but only {len(inside)} of them hold an image")
    sources = inside or sources
    if places and places != len(sources):
        raise BadRow(f"{places} image parts in the prompt, but {len(sources)} images")
    if sources and not places:
        first = next((message for message in messages if message["role"] == "user"), None)
        if first is None:
            raise BadRow("the prompt has no user message to put the images into")
        first["content"] = [{"type": "image"} for _ in sources] + first["content"]
    columns = {name: value for name, value in raw.items() if name not in TAKEN}
    return Draft(messages, sources, answer, completion, columns)


def read_text(raw: Any) -> tuple[list[dict[str, Any]], str, str]:
    """Messages, answer and completion of a dictionary; does not look at `images`. Raises BadRow."""
    if not isinstance(raw, Mapping):
        raise BadRow(f"a row must be an object with `prompt` and `answer`, not {type(raw).__name__}")
    messages = _messages(raw.get("prompt"))
    answer = _answer(raw.get("answer"))
    completion = raw.get("completion")
    return messages, answer, answer if completion is None else _completion(completion)


def _messages(prompt: Any) -> list[dict[str, Any]]:
    if prompt is None:
        raise BadRow("no `prompt`")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, (list, tuple)) or not prompt:
        raise BadRow("`prompt` must be a text or a non-empty list of chat messages")
    messages = []
    for message in prompt:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise BadRow(f"a message of `prompt` must have a `role` among {', '.join(ROLES)}")
        kept = {name: value for name, value in message.items() if value is not None and name != "content"}
        messages.append({**kept, "content": _parts(message.get("content"))})
    if messages[-1]["role"] == "assistant":
        raise BadRow("`prompt` ends with the assistant's message; put a reference reply into `completion`")
    if not any(part["type"] == "image" or part["text"].strip() for one in messages for part in one["content"]):
        raise BadRow("`prompt` is empty")
    return messages


def _parts(content: Any) -> list[dict[str, Any]]:
    """A message's content as parts: {"type": "text", "text": ...} and {"type": "image"}, with "image" if given."""
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise BadRow("a message's `content` must be a text or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind in ("image", "image_url"):
            value = next((part[name] for name in _INSIDE if part.get(name) is not None), None)
            if isinstance(value, Mapping) and "url" in value:  # the OpenAI layout
                value = value["url"]
            if isinstance(value, str) and part.get("base64") is value:
                value = "data:image;base64," + value
            parts.append({"type": "image"} if value is None else {"type": "image", "image": value})
        else:
            raise BadRow(f"a part of a message must be of type 'text' or 'image', not {kind!r}")
    return parts


def _sources(raw: Mapping[str, Any]) -> list[Any]:
    many, one = raw.get("images"), raw.get("image")
    if many is not None and one is not None:
        raise BadRow("both `images` and `image`; give one of them")
    found = one if many is None else many
    if found is None:
        return []
    sources = list(found) if isinstance(found, (list, tuple)) else [found]
    if any(source is None or (isinstance(source, str) and not source) for source in sources):
        raise BadRow("an entry of `images` is empty")
    return sources


def _answer(answer: Any) -> str:
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        raise BadRow("no `answer`")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise BadRow(f"`answer` must be a text or a number, not {type(answer).__name__}")
    if isinstance(answer, float) and answer.is_integer() and abs(answer) < 2**53:
        answer = int(answer)
    if not str(answer).strip():
        raise BadRow("`answer` is empty")
    return str(answer)


def _completion(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        completion = [completion]
    if isinstance(completion, (list, tuple)) and len(completion) == 1 and isinstance(completion[0], Mapping):
        parts = _parts(completion[0].get("content"))
        if completion[0].get("role") == "assistant" and all(part["type"] == "text" for part in parts):
            return "".join(part["text"] for part in parts)
    raise BadRow("`completion` must be a text, or one message of the assistant with text alone")
