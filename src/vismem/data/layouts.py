"""The field's layouts of a row: where each keeps its messages, its images and its reference answers.

Reads TRL's, LLaVA's and ShareGPT's, verl's and EasyR1's, LLaMA-Factory's and ms-swift's columns, and those of question
answering sets. Works on plain values; `rows.py` makes a row of what is found here.
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

IMAGE_MARK = "<image>"
CONVERSATIONS = ("messages", "conversations", "conversation", "texts")  # these may end with the reply
QUESTIONS = ("problem", "question", "query", "instruction", "text")
PROMPTS = ("prompt", *CONVERSATIONS, *QUESTIONS)
ANSWERS = ("answer", "answers", "references", "ground_truth", "solution")
LABELS = ("label", "labels", "target")  # answers where a row has no reference reply
REPLIES = {"query": "response", "instruction": "output"}  # reference replies, by the prompt's column
TAKEN = ("prompt", "images", "image", "answer", "references", "completion")
ROLES = ("system", "developer", "user", "assistant", "tool")
ROLE_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "observation": "tool"}
# Texts that some family's tokenizer or processor takes for an image, a video or a memory.
MARKS = re.compile(
    r"<(?:image|video|audio|image_soft_token|start_of_image|end_of_image|fake_token_around_image|global-img|IMG_CONTEXT"
    r"|\|(?:image_pad|video_pad|vision_pad|vision_start|vision_end)\||m[sl]_[IE])>"
)
_MEMORY_MARK = re.compile("<m[sl]_[IE]>")
_INSIDE = ("image", "path", "url", "base64", "image_url")  # where an image part may hold its image
_LIKELY = {  # names that people give to columns
    "prompt": (*PROMPTS, "input", "user", "request", "q"),
    "answer": ("gt", "gold", *ANSWERS, *LABELS, "output", "response", "reply", "caption", "chosen", "ans", "a"),
    "images": ("images", "image", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "image_path", "file"),
}


class BadRow(ValueError):
    """One row that cannot be used; the message says why in one line, not where."""

    def __init__(self, message: str) -> None:
        line = " ".join(message.split())
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line))


def check_columns(columns: Any) -> None:
    """Raises ValueError if a setting `columns` is neither None nor a mapping of texts to texts."""
    texts = columns.items() if isinstance(columns, Mapping) else () if columns is None else [(columns, None)]
    if not all(isinstance(text, str) and text for pair in texts for text in pair):
        raise ValueError(f"columns must map our names to the data's, as {{prompt: question}}, got {columns!r}")


def renamed(raw: Mapping[str, Any], columns: Mapping[str, str] | None) -> Mapping[str, Any]:
    """The row with its columns under our names.

    Args:
        raw: the row.
        columns: from our names to the row's.

    Raises:
        BadRow: if the row lacks one of them.
    """
    if not columns:
        return raw
    for ours, theirs in columns.items():
        if theirs not in raw:
            raise BadRow(f"no column `{theirs}`, which `columns` names for {ours}; {listed(raw)}")
    hidden = {*columns, *columns.values()} | ({"image", "images"} if {"image", "images"} & {*columns} else set())
    rest = {name: value for name, value in raw.items() if name not in hidden}
    return {**{ours: raw[theirs] for ours, theirs in columns.items()}, **rest}


def missing(what: str, names: Iterable[Any]) -> str:
    """Says that a row has no prompt or no answer, what it has, and how to name the column."""
    names = [str(name) for name in names]
    near = nearest(what, names)
    hint = f"; if `{near}` is it: columns={{{what}: {near}}}" if near else f"; name it: columns={{{what}: NAME}}"
    return f"no `{what}`; {listed(names)}" + (hint if names else "")


def listed(names: Iterable[Any]) -> str:
    """A row's columns, for messages."""
    found = [f"`{str(name)[:40]}`" for name in names]
    more = f" and {len(found) - 12} more" if len(found) > 12 else ""
    return f"the row has {', '.join(found[:12])}{more}" if found else "the row has no columns"


def nearest(what: str, names: Sequence[str]) -> str | None:
    """The column that is most likely meant by `what`, or None."""
    others = {name for key, likely in _LIKELY.items() if key != what for name in likely}
    free = {name.casefold(): name for name in names if name.casefold() not in others}
    for likely in _LIKELY[what]:
        if likely in free:
            return free[likely]
    for likely in (one for one in _LIKELY[what] if len(one) > 2):
        part = next((name for key, name in free.items() if likely in key), None)
        if part is not None:
            return part
    close = [found for key in free for found in difflib.get_close_matches(key, _LIKELY[what], 1, 0.75) if found]
    return next((free[key] for key in free if difflib.get_close_matches(key, close, 1, 0.75)), None)


def absent(value: Any) -> bool:
    """Whether a column holds nothing: None, or the nan that tables have in its place."""
    return value is None or (isinstance(value, Real) and value != value)


def _filled(row: Mapping[str, Any]) -> list[str]:
    """The columns that hold something."""
    return [name for name, value in row.items() if not absent(value)]


def plain(value: Any) -> Any:
    """Arrays and their numbers as Python's own lists and numbers; anything else as it is."""
    if type(value).__module__ == "numpy" and (value.dtype.kind == "O" or value.ndim < 2):
        return [plain(one) for one in value.tolist()] if value.ndim else value.item()
    return value


def check_unicode(value: Any) -> None:
    """Raises BadRow for a text, at any depth, that cannot be written as UTF-8."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            half = value[error.start]
            raise BadRow(f"a text holds {half!r}, half of a surrogate pair, which is no character") from error
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            check_unicode(name)
            check_unicode(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_unicode(inner)


# Prompts and replies.


def read_conversation(row: Mapping[str, Any]) -> tuple[list[dict[str, Any]], str | None]:
    """The messages of a row's prompt, their contents as lists of parts, and the reference reply if it has one.

    A conversation's last assistant message is its reply; what comes before it is the prompt.

    Raises:
        BadRow: if there is no prompt, or it is not one.
    """
    name = next((name for name in PROMPTS if not absent(row.get(name))), None)
    if name is None:
        raise BadRow(missing("prompt", _filled(row)))
    messages = read_messages(row[name], name)
    if name == "instruction" and not absent(row.get("input")):
        if not isinstance(row["input"], str):
            raise BadRow(f"`input` must be a text, not {type(row['input']).__name__}")
        if row["input"].strip():
            messages[-1]["content"].append({"type": "text", "text": "\n" + row["input"]})
    if name in REPLIES:
        messages = [*_history(row.get("history")), *messages]
    system = row.get("system") if name in (*CONVERSATIONS, *REPLIES) else None
    if not absent(system) and system != "":
        if not isinstance(system, str):
            raise BadRow(f"`system` must be a text, not {type(system).__name__}")
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    reply = None
    if messages[-1]["role"] == "assistant":
        if name not in CONVERSATIONS:
            raise BadRow(f"`{name}` ends with the assistant's message; put a reference reply into `completion`")
        reply = _text_of(messages.pop(), name)
    given = next((one for one in ("completion", REPLIES.get(name)) if one and not absent(row.get(one))), None)
    if given is not None:
        reply = read_reply(row[given], given)
    if not any(part["type"] == "image" or part["text"].strip() for one in messages for part in one["content"]):
        raise BadRow(f"`{name}` is empty" + (" before the assistant's message" if reply is not None else ""))
    if not any(message["role"] == "user" for message in messages):
        raise BadRow(f"`{name}` has no user message")
    return messages, reply


def read_messages(value: Any, name: str) -> list[dict[str, Any]]:
    """Chat messages from a text, from messages, or from turns as LLaVA, ShareGPT and the Cauldron have them."""
    value = plain(value)
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if isinstance(value, Mapping):
        columns = [plain(column) for column in value.values()]
        if columns and all(isinstance(column, list) for column in columns):
            value = [dict(zip(value, turn, strict=False)) for turn in zip(*columns, strict=False)]
    if not isinstance(value, (list, tuple)) or not value:
        raise BadRow(f"`{name}` must be a text or a non-empty list of chat messages")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping):
            raise BadRow(f"a message of `{name}` must have a `role` and a `content`, got {type(turn).__name__}")
        if all(isinstance(turn.get(role), str) for role in ("user", "assistant")):
            messages += [{"role": role, "content": read_parts(turn[role])} for role in ("user", "assistant")]
            continue
        role = turn.get("from") if turn.get("role") is None else turn.get("role")
        role = ROLE_NAMES.get(role, role) if isinstance(role, str) else None
        if role not in ROLES:
            raise BadRow(f"a message of `{name}` must have a `role` among {', '.join(ROLES)} (or human, gpt)")
        kept = {key: inner for key, inner in turn.items() if inner is not None and key in ("name", "tool_calls")}
        content = turn.get("value") if turn.get("content") is None else turn.get("content")
        messages.append({"role": role, **kept, "content": read_parts(content)})
    return messages


def _history(history: Any) -> list[dict[str, Any]]:
    """Earlier turns, as pairs of a query and its response."""
    history = plain(history)
    if absent(history):
        return []
    if not isinstance(history, (list, tuple)):
        raise BadRow("`history` must be a list of pairs of texts")
    found = []
    for pair in map(plain, history):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow("`history` must be a list of pairs of texts")
        found += [{"role": r, "content": read_parts(t)} for r, t in zip(("user", "assistant"), pair, strict=True)]
    return found


def read_parts(content: Any) -> list[dict[str, Any]]:
    """A message's content as parts: {"type": "text", "text": ...} and {"type": "image"}, with "image" if given."""
    content = plain(content)
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)):
        raise BadRow("a message's content must be a text or a list of parts")
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind is None and isinstance(part, Mapping):  # parts without a type, as Qwen's own examples have them
            kind = next((one for one in ("image", "text") if part.get(one) is not None), None)
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif isinstance(kind, str) and kind in ("image", "image_url"):
            value = next((part[name] for name in _INSIDE if part.get(name) is not None), None)
            if isinstance(value, Mapping) and "url" in value:  # the OpenAI layout
                value = value["url"]
            if isinstance(value, str) and part.get("base64") is value:
                value = "data:image;base64," + value
            parts.append({"type": "image"} if value is None else {"type": "image", "image": value})
        else:
            raise BadRow(f"a part of a message must be of type 'text' or 'image', not {str(kind)[:40]!r}")
    return parts


def _text_of(message: Mapping[str, Any], name: str) -> str:
    if not message["content"] or any(part["type"] != "text" for part in message["content"]):
        raise BadRow(f"the assistant's last message of `{name}` must be a text")
    return "".join(part["text"] for part in message["content"])


def read_reply(value: Any, name: str) -> str:
    """A reference reply: a text, or one message of the assistant."""
    value = plain(value)
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, (list, tuple)) and len(value) == 1:
        message = read_messages(value, name)[0]
        if message["role"] == "assistant":
            return _text_of(message, name)
    raise BadRow(f"`{name}` must be a text, or one message of the assistant with text alone")


# Images.


def read_images(row: Mapping[str, Any]) -> list[Any]:
    """What `images` or `image` holds, as a list."""
    many, one = (
        [] if absent(found) else list(found) if isinstance(found, (list, tuple)) else [found]
        for found in (plain(row.get("images")), plain(row.get("image")))
    )
    if many and one:
        raise BadRow("both `images` and `image`; give one of them")
    sources = many or one
    if any(absent(source) or (isinstance(source, str) and not source) for source in sources):
        raise BadRow("an entry of `images` is empty")
    for name in ("videos", "audios", "video", "audio"):
        value = plain(row.get(name))
        unread = isinstance(value, (str, bytes, list, tuple, Mapping)) and len(value) > 0
        if unread and (name in ("videos", "audios") or not sources):
            raise BadRow(f"`{name}` cannot be read: VisMem takes images and text")
    return sources


def unread_image(columns: Mapping[str, Any]) -> str | None:
    """The name of a column that looks like an image, among those that are not read as one; or None."""
    for name, value in columns.items():
        first = value[0] if isinstance(value, list) and value else value
        named = isinstance(first, str) and first.lower().endswith((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"))
        if named or isinstance(first, (bytes, Image.Image)) or (isinstance(first, Mapping) and "bytes" in first):
            return name
    return None


def place_images(messages: list[dict[str, Any]], count: int) -> None:
    """Puts an image part in the place of each `<image>`, or all of them before the first user text without any.

    Args:
        messages: of the prompt, one of them the user's; changed in place.
        count: images of the row.

    Raises:
        BadRow: if there are not as many places as images, or a text holds another mark.
    """
    places = sum(part["type"] == "image" for message in messages for part in message["content"])
    marks = sum(part.get("text", "").count(IMAGE_MARK) for message in messages for part in message["content"])
    if marks and places:
        raise BadRow(f"the prompt has both image parts and the text {IMAGE_MARK}; take the text out")
    if marks and marks != count:
        raise BadRow(f"{IMAGE_MARK} stands in the prompt {_times(marks)}, but the row has {_images(count)}")
    if places and places != count:
        raise BadRow(f"{places} image parts in the prompt, but {_images(count)}")
    if marks:
        for message in messages:
            parts = [split_marks(part["text"]) if part["type"] == "text" else [part] for part in message["content"]]
            message["content"] = [part for several in parts for part in several]
    elif count and not places:
        first = next(message for message in messages if message["role"] == "user")
        first["content"] = [{"type": "image"} for _ in range(count)] + first["content"]
    for message in messages:
        for part in message["content"]:
            check_marks(part.get("text", ""), "prompt")


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def split_marks(text: str) -> list[dict[str, Any]]:
    """A text as parts, image parts in the place of `<image>`, without the line break that follows one."""
    first, *rest = text.split(IMAGE_MARK)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}] if first.strip() or not rest else []
    for piece in rest:
        parts.append({"type": "image"})
        piece = piece.removeprefix("\r").removeprefix("\n")
        if piece.strip():
            parts.append({"type": "text", "text": piece})
    return parts


def check_marks(text: str, where: str) -> None:
    """Raises BadRow if a text holds what a model takes for an image, a video or, in a prompt, a memory."""
    for found in MARKS.findall(text):
        if found in ("<video>", "<audio>"):
            raise BadRow(f"the {where} has {found}: VisMem takes images and text, no video and no audio")
        if where == "prompt" or not _MEMORY_MARK.fullmatch(found):  # replies may name their invocations
            raise BadRow(f"the {where}'s text holds {found}, which models take for something else than text")


# Answers.


def read_references(row: Mapping[str, Any], reply: str | None) -> tuple[str, list[str]]:
    """The reference answer and all reference answers: of several the most frequent one, and each of them once.

    Raises:
        BadRow: if there is none, or it is neither a text nor a number.
    """
    for name in (*ANSWERS, *(LABELS if reply is None else ())):
        if not absent(row.get(name)):
            found = _references(row[name], name)
            if name == "answer" and not absent(row.get("references")):
                return found[0], list(dict.fromkeys(_references(row["references"], "references")))
            return Counter(found).most_common(1)[0][0], list(dict.fromkeys(found))
        if name == "ground_truth" and isinstance(row.get("reward_model"), Mapping):
            truth = row["reward_model"].get("ground_truth")
            if not absent(truth):
                found = _references(truth, "reward_model.ground_truth")
                return Counter(found).most_common(1)[0][0], list(dict.fromkeys(found))
    if reply is None and not absent(row.get("response")):
        reply = read_reply(row["response"], "response")
    if reply is None:
        raise BadRow(missing("answer", _filled(row)))
    if not reply.strip():
        raise BadRow("the reference reply is empty")
    return reply, [reply]


def _references(value: Any, name: str) -> list[str]:
    value = plain(value)
    if isinstance(value, Mapping):  # an annotator's answer as VQA has it, or SQuAD's list of texts
        inside = next((key for key in ("answer", "text", "target") if not absent(value.get(key))), None)
        if inside is None:
            raise BadRow(f"`{name}` must be a text, a number or a list of them, not an object without `answer`")
        return _references(value[inside], name)
    if isinstance(value, (list, tuple)):
        given = [inner for inner in value if not absent(inner) and not (isinstance(inner, str) and not inner.strip())]
        found = [one for inner in given for one in _references(inner, name)]
        if not found:
            raise BadRow(f"`{name}` is empty")
        return found
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow(f"`{name}` must be a text or a number, or a list of them, not {type(value).__name__}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise BadRow(f"`{name}` must be a finite number, not {value}")
        value = int(value) if value.is_integer() and abs(value) < 2**53 else value
    try:
        text = str(value)
    except ValueError as error:  # Python's limit on the digits of an integer
        raise BadRow(f"`{name}` has too many digits") from error
    if not text.strip():
        raise BadRow(f"`{name}` is empty")
    return [text]
