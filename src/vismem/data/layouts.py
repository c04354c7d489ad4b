"""Dataset layouts: where each keeps its messages, images and reference answers.

Supports the columns of TRL, LLaVA and ShareGPT, verl and EasyR1, LLaMA-Factory, ms-swift, and common question
answering datasets. Whatever cannot be read raises BadRowError. `rows.py` builds rows from the result.
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from PIL import Image

from vismem.deprecation import renamed

IMAGE_PLACEHOLDER = "<image>"
CONVERSATIONS = ("messages", "conversations", "conversation", "texts")  # may end with the reply
QUESTIONS = ("problem", "question", "query", "instruction", "text")
PROMPTS = ("prompt", *CONVERSATIONS, *QUESTIONS)
ANSWERS = ("answer", "answers", "references", "ground_truth", "solution")
LABELS = ("label", "labels", "target")  # answers of rows without a reference reply
REPLIES = {"query": "response", "instruction": "output"}  # prompt column -> reply column
OWN_COLUMNS = ("prompt", "images", "image", "answer", "references", "completion")
ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool"}
# Text that some model's tokenizer or processor reads as an image, a video or a memory.
PLACEHOLDERS = re.compile(
    r"<(?:image|video|audio|image_soft_token|start_of_image|end_of_image|fake_token_around_image|global-img|IMG_CONTEXT"
    r"|\|(?:image_pad|video_pad|vision_pad|vision_start|vision_end)\||m[sl]_[IE])>"
)
_MEMORY_TOKEN = re.compile("<m[sl]_[IE]>")
_IMAGE_KEYS = ("image", "path", "url", "base64", "image_url")  # of an image part
_LIKELY = {  # common column names
    "prompt": (*PROMPTS, "input", "user", "request", "q"),
    "answer": ("gt", "gold", *ANSWERS, *LABELS, "output", "response", "reply", "caption", "chosen", "ans", "a"),
    "images": ("images", "image", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "image_path", "file"),
}


class BadRowError(ValueError):
    """The row cannot be used; the message gives the reason in one line, without the row's id."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def check_columns(columns: Any) -> None:
    """Raises ValueError unless `columns` is None or maps non-empty strings to non-empty strings."""
    if columns is None:
        return
    names = [name for pair in columns.items() for name in pair] if isinstance(columns, Mapping) else [None]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"columns must map our names to the data's, as {{prompt: question}}, got {columns!r}")


def rename_columns(raw: Mapping[str, Any], columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    """Renames a row's columns; `columns` maps our names to the row's. Raises BadRowError if one is missing."""
    if not columns:
        return raw
    for ours, theirs in columns.items():
        if theirs not in raw:
            raise BadRowError(f"no column `{theirs}`, which `columns` names for {ours}; {describe_columns(raw)}")
    hidden = {*columns, *columns.values()} | ({"image", "images"} if {"image", "images"} & {*columns} else set())
    rest = {name: value for name, value in raw.items() if name not in hidden}
    return {**{ours: raw[theirs] for ours, theirs in columns.items()}, **rest}


def missing(what: str, names: Iterable[Any]) -> str:
    """The message for a row without prompt or answer: which columns it has, and how to name the right one."""
    names = [str(name) for name in names]
    near = nearest(what, names)
    hint = f"; if `{near}` is it: columns={{{what}: {near}}}" if near else f"; name it: columns={{{what}: NAME}}"
    return f"no `{what}`; {describe_columns(names)}" + (hint if names else "")


def describe_columns(names: Iterable[Any]) -> str:
    """A row's columns, for messages."""
    quoted = [f"`{str(name)[:40]}`" for name in names]
    more = f" and {len(quoted) - 12} more" if len(quoted) > 12 else ""
    return f"the row has {', '.join(quoted[:12])}{more}" if quoted else "the row has no columns"


def nearest(what: str, names: Sequence[str]) -> str | None:
    """The column most likely to be `what`, or None: by its whole name, a part of it, or a similar spelling."""
    likely, others = _LIKELY[what], {name for key in _LIKELY if key != what for name in _LIKELY[key]}
    free = {name.casefold(): name for name in names if name.casefold() not in others}
    found = [
        *(free[one] for one in likely if one in free),
        *(name for one in likely if len(one) > 2 for key, name in free.items() if one in key),
        *(name for key, name in free.items() if difflib.get_close_matches(key, likely, 1, 0.75)),
    ]
    return found[0] if found else None


def is_missing(value: Any) -> bool:
    """Whether a value is None, or the NaN that tables use for it."""
    return value is None or (isinstance(value, Real) and value != value)


def _filled(row: Mapping[str, Any]) -> list[str]:
    """The columns with a value."""
    return [name for name, value in row.items() if not is_missing(value)]


def plain(value: Any) -> Any:
    """Converts NumPy arrays and scalars to Python lists and numbers; returns anything else unchanged."""
    if type(value).__module__ == "numpy" and (value.dtype.kind == "O" or value.ndim < 2):
        return [plain(one) for one in value.tolist()] if value.ndim else value.item()
    return value


def check_unicode(value: Any) -> None:
    """Raises BadRowError if a string, at any depth, cannot be encoded as UTF-8."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise BadRowError(f"a string contains {half!r}, half of a surrogate pair") from error
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            check_unicode(name)
            check_unicode(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_unicode(inner)


# Prompts and replies.


def read_conversation(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """Reads the prompt's messages, with contents as lists of parts, and the reference reply if there is one.

    In a conversation, the last assistant message is the reply and everything before it is the prompt.
    """
    name = next((name for name in PROMPTS if not is_missing(row.get(name))), None)
    if name is None:
        raise BadRowError(missing("prompt", _filled(row)))
    messages = read_messages(row[name], name)
    if name == "instruction" and not is_missing(row.get("input")):
        if not isinstance(row["input"], str):
            raise BadRowError(f"`input` must be a string, not {type(row['input']).__name__}")
        if row["input"].strip():
            messages[-1]["content"].append({"type": "text", "text": "\n" + row["input"]})
    if name in REPLIES:
        messages = [*_history(row.get("history")), *messages]
    system = row.get("system") if name in (*CONVERSATIONS, *REPLIES) else None
    if isinstance(system, str):
        if system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    elif not is_missing(system):
        raise BadRowError(f"`system` must be a string, not {type(system).__name__}")
    reply = None
    if messages[-1]["role"] == "assistant":
        if name not in CONVERSATIONS:
            raise BadRowError(f"`{name}` ends with an assistant message; put a reference reply into `completion`")
        reply = _text_of(messages.pop(), name)
    given = next((one for one in ("completion", REPLIES.get(name)) if one and not is_missing(row.get(one))), None)
    if given is not None:
        reply = read_reply(row[given], given)
    if not any(part["type"] == "image" or part["text"].strip() for one in messages for part in one["content"]):
        raise BadRowError(f"`{name}` is empty" + (" before the assistant message" if reply is not None else ""))
    if not any(message["role"] == "user" for message in messages):
        raise BadRowError(f"`{name}` has no user message")
    return messages, reply


def read_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Reads chat messages from a string, a list of messages, or turns as in LLaVA, ShareGPT and the Cauldron."""
    value = plain(value)
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        columns = [plain(column) for column in value.values()]
        if columns and all(isinstance(column, list) for column in columns):
            value = [dict(zip(value, turn, strict=False)) for turn in zip(*columns, strict=False)]
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRowError(f"`{name}` must be a string or a non-empty list of chat messages")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise BadRowError(f"a message of `{name}` must have a `role` and a `content`, got {type(turn).__name__}")
        if all(isinstance(turn.get(role), str) for role in ("user", "assistant")):
            messages += [{"role": role, "content": read_parts(turn[role])} for role in ("user", "assistant")]
            continue
        role = turn.get("from") if turn.get("role") is None else turn.get("role")
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else None
        if role not in ROLES:
            raise BadRowError(f"a message of `{name}` must have a `role` among {', '.join(ROLES)} (or human, gpt)")
        kept = {key: inner for key, inner in turn.items() if inner is not None and key in ("name", "tool_calls")}
        content = turn.get("value") if turn.get("content") is None else turn.get("content")
        messages.append({"role": role, **kept, "content": read_parts(content)})
    return messages


def _history(history: Any) -> list[dict[str, Any]]:
    """Reads earlier turns from (query, response) pairs."""
    if is_missing(pairs := plain(history)):
        return []
    pairs = [plain(pair) for pair in pairs] if isinstance(pairs, (list, tuple)) else [None]
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRowError("`history` must be a list of pairs of strings")
    turns = [{"user": query, "assistant": response} for query, response in pairs]
    return read_messages(turns, "history") if turns else []


def read_parts(content: Any) -> list[dict[str, Any]]:
    """Reads message content as parts: {"type": "text", "text": ...} and {"type": "image"}, with "image" if given."""
    content = plain(content)
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise BadRowError("a message's content must be a string or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind is None and isinstance(part, Mapping):  # parts without a type, as in Qwen's examples
            kind = next((one for one in ("image", "text") if part.get(one) is not None), None)
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif isinstance(kind, str) and kind in ("image", "image_url"):
            value = next((part[name] for name in _IMAGE_KEYS if part.get(name) is not None), None)
            if isinstance(value, Mapping) and "url" in value:  # the OpenAI layout
                value = value["url"]
            if isinstance(value, str) and part.get("base64") is value:
                value = "data:image;base64," + value
            parts.append({"type": "image"} if value is None else {"type": "image", "image": value})
        else:
            raise BadRowError(f"a part of a message must be of type 'text' or 'image', not {str(kind)[:40]!r}")
    return parts


def _text_of(message: Mapping[str, Any], name: str) -> str:
    if not message["content"] or any(part["type"] != "text" for part in message["content"]):
        raise BadRowError(f"the assistant's last message of `{name}` must be text")
    return "".join(part["text"] for part in message["content"])


def read_reply(value: Any, name: str) -> str:
    """Reads a reference reply: a string, or one assistant message."""
    value = plain(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, (list, tuple)) and len(value) == 1:
        message = read_messages(value, name)[0]
        if message["role"] == "assistant":
            return _text_of(message, name)
    raise BadRowError(f"`{name}` must be a string, or one assistant message with text only")


# Images.


def read_images(row: Mapping[str, Any]) -> list[Any]:
    """The value of `images` or `image`, as a list."""
    many, one = (
        [] if is_missing(found) else list(found) if isinstance(found, (list, tuple)) else [found]
        for found in (plain(row.get("images")), plain(row.get("image")))
    )
    if many and one:
        raise BadRowError("both `images` and `image` are given; keep one of them")
    sources = many or one
    if any(is_missing(source) or (isinstance(source, str) and not source) for source in sources):
        raise BadRowError("an entry of `images` is empty")
    for name in ("videos", "audios", "video", "audio"):
        value = plain(row.get(name))
        unread = isinstance(value, (str, bytes, list, tuple, Mapping)) and len(value) > 0
        if unread and (name in ("videos", "audios") or not sources):
            raise BadRowError(f"`{name}` cannot be read: VisMem takes images and text only")
    return sources


def unread_image(columns: Mapping[str, Any]) -> str | None:
    """The name of the first unread column that looks like an image, or None."""
    for name, value in columns.items():
        first = value[0] if isinstance(value, list) and value else value
        named = isinstance(first, str) and first.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"))
        if named or isinstance(first, (bytes, Image.Image)) or (isinstance(first, Mapping) and "bytes" in first):
            return name
    return None


def place_images(messages: list[dict[str, Any]], images: list[Any]) -> list[Any]:
    """Replaces each `<image>` with an image part; without any, puts all images first in the first user message.

    Modifies the messages in place; at least one must be a user's, and image parts may hold their image. Returns the
    images in the order of their parts. Raises BadRowError if the numbers of placeholders and images differ, or a text
    contains another placeholder.
    """
    contents = [part for message in messages for part in message["content"]]
    inline = [part.pop("image") for part in contents if part.get("image") is not None]
    parts = sum(part["type"] == "image" for part in contents)
    if inline and images:
        raise BadRowError("images are both in the prompt's parts and in `images`; give them in one place")
    if inline and len(inline) != parts:
        raise BadRowError(f"{parts} image parts in the prompt, but only {len(inline)} of them hold an image")
    images = inline or images
    placeholders = sum(part.get("text", "").count(IMAGE_PLACEHOLDER) for part in contents)
    count = "1 image" if len(images) == 1 else f"{len(images)} images"
    if placeholders and parts:
        raise BadRowError(f"the prompt has both image parts and the text {IMAGE_PLACEHOLDER}; remove the text")
    if placeholders and placeholders != len(images):
        times = {1: "once", 2: "twice"}.get(placeholders, f"{placeholders} times")
        raise BadRowError(f"the prompt contains {IMAGE_PLACEHOLDER} {times}, but the row has {count}")
    if parts and parts != len(images):
        raise BadRowError(f"{parts} image parts in the prompt, but {count}")
    if placeholders:
        for message in messages:
            split = (split_placeholders(part["text"]) for part in message["content"])  # all are texts
            message["content"] = [part for found in split for part in found]
    elif not parts:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [*({"type": "image"} for _ in images), *first["content"]]
    for message in messages:
        for part in message["content"]:
            check_placeholders(part.get("text", ""), "prompt")
    return images


def split_placeholders(text: str) -> list[dict[str, Any]]:
    """Splits text into parts, replacing each `<image>` and the line break after it with an image part."""
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first.strip() or not rest else []
    for piece in rest:
        parts.append({"type": "image"})
        piece = piece.removeprefix("\r").removeprefix("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def check_placeholders(text: str, where: str) -> None:
    """Raises BadRowError if a text contains a placeholder for images or videos or, in a prompt, a memory token."""
    for found in PLACEHOLDERS.findall(text):
        if found in ("<video>", "<audio>"):
            raise BadRowError(f"the {where} has {found}: VisMem takes images and text, not video or audio")
        if where == "prompt" or not _MEMORY_TOKEN.fullmatch(found):  # replies may contain invocations
            raise BadRowError(f"the {where}'s text contains {found}, which models do not read as text")


# Answers.


def read_references(row: Mapping[str, Any], reply: str | None) -> tuple[str, list[str]]:
    """Reads the reference answer (the most frequent one of several) and the list of distinct reference answers."""
    for name in (*ANSWERS, *(LABELS if reply is None else ())):
        value, where = row.get(name), name
        if name == "ground_truth" and is_missing(value) and isinstance(row.get("reward_model"), Mapping):
            value, where = row["reward_model"].get("ground_truth"), "reward_model.ground_truth"
        if is_missing(value):
            continue
        found = _references(value, where)
        if name == "answer" and not is_missing(row.get("references")):
            return found[0], list(dict.fromkeys(_references(row["references"], "references")))
        return Counter(found).most_common(1)[0][0], list(dict.fromkeys(found))
    if reply is None and not is_missing(row.get("response")):
        reply = read_reply(row["response"], "response")
    if reply is None:
        raise BadRowError(missing("answer", _filled(row)))
    if not reply.strip():
        raise BadRowError("the reference reply is empty")
    return reply, [reply]


def _references(value: Any, name: str) -> list[str]:
    value = plain(value)
    if isinstance(value, Mapping):  # an annotator's answer as in VQA, or SQuAD's list of texts
        inside = next((key for key in ("answer", "text", "target") if not is_missing(value.get(key))), None)
        if inside is None:
            raise BadRowError(f"`{name}` must be a string, a number or a list of them, not an object without `answer`")
        return _references(value[inside], name)
    if isinstance(value, (list, tuple)):
        given = [
            inner for inner in value if not is_missing(inner) and not (isinstance(inner, str) and not inner.strip())
        ]
        found = [one for inner in given for one in _references(inner, name)]
        if not found:
            raise BadRowError(f"`{name}` is empty")
        return found
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRowError(f"`{name}` must be a string or a number, or a list of them, not {type(value).__name__}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRowError(f"`{name}` must be a finite number, not {value}")
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    try:
        text = str(value)
    except ValueError as error:  # Python limits the digits of an integer
        raise BadRowError(f"`{name}` has too many digits") from error
    if not text.strip():
        raise BadRowError(f"`{name}` is empty")
    return [text]


__getattr__ = renamed(__name__, {"BadRow": "BadRowError"})
