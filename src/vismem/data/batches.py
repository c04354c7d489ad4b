"""From prompts to tensors, for training, evaluation, `ask`, the server and the viewer; and columns for the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vismem.data.rows import BadRowError, Row
from vismem.deprecation import renamed
from vismem.tokens import END_TOKENS, INVOCATION_TOKENS

if TYPE_CHECKING:
    from vismem.model import VisMem

_PLACEHOLDERS = ("image_token", "video_token", "boi_token", "fake_image_token", "audio_token")  # processor attributes


def prompt_inputs(processor: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Encodes the rows' prompts, padded on the left, ready for `generate`.

    Args:
        processor: of a vision-language model, with a chat template and a pad token. Its settings do not change.
        rows: at least one. Rows with and without images may be mixed if the processor supports it.

    Returns:
        The processor's output: "input_ids" and "attention_mask" [rows, longest prompt], and its image tensors.

    Raises:
        ValueError: if `rows` is empty, the chat template or pad token is missing, a text contains the processor's
            image token, or the processor rejects the batch. The message names the rows.

    Example:
        >>> inputs = prompt_inputs(processor, [rows[0], rows[1]])  # doctest: +SKIP
    """
    if not rows:
        raise ValueError("prompt_inputs needs at least one row")
    conversations = []
    for row in rows:
        try:
            conversations.append(row_messages(row, processor))
        except BadRowError as error:
            raise ValueError(f"{row.id}: {error}") from error
    try:
        return encode(processor, conversations)
    except BadRowError as error:
        names = ", ".join(row.id for row in rows)
        mixed = len({bool(row.images) for row in rows}) == 2
        hint = "; the batch has mixed rows with and without images, so try them in separate batches" if mixed else ""
        raise ValueError(f"{names}: {error}{hint}") from error


def row_inputs(processor: Any, row: Row, context: int | None = None) -> dict[str, Tensor]:
    """Encodes one row's prompt.

    Args:
        processor: as for `prompt_inputs`.
        row: the row.
        context: the model's context length in tokens, including the first token of the reply; None for no limit.

    Raises:
        BadRowError: if the processor rejects the row, or the prompt is too long. The message does not name the row.
        ValueError: if the processor has no chat template.
    """
    inputs = encode(processor, [row_messages(row, processor)])
    length = inputs["input_ids"].shape[1]
    if context is not None and length >= context:
        raise BadRowError(f"the prompt has {length:,} tokens, and the model takes {context:,}, reply included")
    return inputs


def chat_inputs(
    model: VisMem,
    messages: list[dict[str, Any]],
    processor: Any = None,
    *,
    opens_turn: bool = True,
    continues: bool = False,
) -> dict[str, Tensor]:
    """Encodes one conversation; the tensors are on the model's device, as `generate` and `Request` take them.

    Args:
        model: the model.
        messages: chat messages, with PIL images.
        processor: a copy of the model's, if another thread is using that one.
        opens_turn: append the start of an assistant message.
        continues: leave the last message open, so that it is continued.

    Raises:
        BadRowError: if the chat template or the processor rejects the messages.
        ValueError: if there is no chat template.
    """
    template = {"add_generation_prompt": opens_turn, "continue_final_message": continues}
    return model.move_inputs(encode(processor or model.processor, [messages], **template))


def encode(processor: Any, conversations: list[list[dict[str, Any]]], **template: bool) -> dict[str, Tensor]:
    """Encodes conversations with the processor's chat template, padded on the left.

    Args:
        processor: the processor.
        conversations: chat messages of each, with PIL images.
        **template: options of `apply_chat_template`; by default, an assistant message is opened.

    Raises:
        BadRowError: if the processor rejects them.
        ValueError: if it has no chat template, or no pad token for several conversations.
    """
    tokenizer, several = processor.tokenizer, len(conversations) > 1
    if several and getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError(
            "the processor's tokenizer has no pad token, so prompts of different lengths cannot be batched"
        )
    if not (getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)):
        raise ValueError("the processor has no chat template, so it cannot format messages; use an instruct model's")
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        inputs = processor.apply_chat_template(
            conversations,
            **{"add_generation_prompt": True, **template},
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": several},
        )
    except MemoryError:
        raise
    except Exception as error:  # processors raise any type
        raise BadRowError(f"{type(processor).__name__} cannot encode it: {error or type(error).__name__}") from error
    finally:
        tokenizer.padding_side = side
    return dict(inputs)


def placeholders_of(processor: Any) -> list[str]:
    """The processor's placeholder tokens for images, videos and audio."""
    tokens = (getattr(processor, name, None) for name in _PLACEHOLDERS)
    return list(dict.fromkeys(token for token in tokens if isinstance(token, str) and token))


def reserved_texts(model: VisMem) -> list[str]:
    """Special tokens that stand for images, videos and memory, and must not appear in a message's text."""
    image = model.processor.tokenizer.convert_ids_to_tokens(model.backbone.image_token_id)
    texts = [image, *placeholders_of(model.processor), *INVOCATION_TOKENS.values(), *END_TOKENS.values()]
    return list(dict.fromkeys(texts))


def row_messages(row: Row, processor: Any = None) -> list[dict[str, Any]]:
    """The row's messages with its images filled in.

    Raises:
        BadRowError: if a text contains one of the processor's placeholder tokens.
    """
    placeholders = placeholders_of(processor)
    images = iter(row.images)
    messages = []
    for message in row.prompt:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                part = {"type": "image", "image": next(images)}
            elif found := [token for token in placeholders if token in part["text"]]:
                raise BadRowError(
                    f"the prompt's text contains the processor's image token {found[0]}; "
                    "write an image part there instead, or remove it"
                )
            parts.append(part)
        messages.append({**message, "content": parts})
    return messages


def reward_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The columns passed to rewards: id, answer, references and all others; None where a row lacks a column.

    `answer` holds one string per row, `references` the list of all its reference answers. A dataset's own `id` column
    takes precedence.
    """
    names = dict.fromkeys(name for row in rows for name in row.columns)
    columns: dict[str, list[Any]] = {"id": [row.id for row in rows], "answer": [row.answer for row in rows]}
    columns["references"] = [row.references or [row.answer] for row in rows]
    return {**columns, **{name: [row.columns.get(name) for row in rows] for name in names}}


__getattr__ = renamed(__name__, {"conversation": "row_messages", "encoded": "encode", "marks_of": "placeholders_of"})
