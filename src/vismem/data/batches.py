"""Rows as a batch: a processor's tensors for their prompts, and columns for the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vismem.data.rows import BadRow, Row

_MARKS = ("image_token", "video_token", "boi_token", "fake_image_token", "audio_token")  # attributes of processors


def prompt_inputs(processor: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The tensors of the rows' prompts, padded on the left, ready for `generate`.

    Args:
        processor: of a vision-language model, with a chat template and a pad token. Its settings are left as they were.
        rows: at least one; rows with and without images can be mixed where the processor can.

    Returns:
        what the processor makes: "input_ids" and "attention_mask" [rows, longest prompt], and its image tensors.

    Raises:
        ValueError: if there is no row, no chat template or no pad token, or a text holds the processor's own image
            mark, or the processor refuses the batch; the message names the rows.

    Example:
        >>> inputs = prompt_inputs(processor, [rows[0], rows[1]])  # doctest: +SKIP
    """
    if not rows:
        raise ValueError("prompt_inputs needs at least one row")
    conversations = []
    for row in rows:
        try:
            conversations.append(conversation(row, processor))
        except BadRow as error:
            raise ValueError(f"{row.id}: {error}") from error
    try:
        return encoded(processor, conversations)
    except BadRow as error:
        names = ", ".join(row.id for row in rows)
        mixed = len({bool(row.images) for row in rows}) == 2
        hint = "; rows with and without images are mixed here: try them in separate batches" if mixed else ""
        raise ValueError(f"{names}: {error}{hint}") from error


def row_inputs(processor: Any, row: Row, context: int | None = None) -> dict[str, Tensor]:
    """The tensors of one row's prompt.

    Args:
        processor: as for `prompt_inputs`.
        row: the row.
        context: tokens that the model takes at most, the first one of its reply included; None for any number.

    Raises:
        BadRow: if the processor refuses the row, or its prompt is too long; says why, not which row.
        ValueError: if the processor has no chat template or no pad token.
    """
    inputs = encoded(processor, [conversation(row, processor)])
    length = inputs["input_ids"].shape[1]
    if context is not None and length >= context:
        raise BadRow(f"the prompt has {length:,} tokens, and the model takes {context:,} with its reply")
    return inputs


def encoded(processor: Any, conversations: list[list[dict[str, Any]]]) -> dict[str, Tensor]:
    """The processor's tensors for some conversations, padded on the left.

    Raises:
        BadRow: if the processor refuses them.
        ValueError: if it has no chat template or no pad token.
    """
    tokenizer = processor.tokenizer
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError(
            "the processor's tokenizer has no pad token, so prompts of different lengths cannot be batched"
        )
    if not (getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)):
        raise ValueError("the processor has no chat template, so it cannot format messages; use an instruct model's")
    side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        found = processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    except MemoryError:
        raise
    except Exception as error:  # processors raise what they like
        raise BadRow(f"{type(processor).__name__} cannot encode it: {error or type(error).__name__}") from error
    finally:
        tokenizer.padding_side = side
    return dict(found)


def marks_of(processor: Any) -> list[str]:
    """The texts that a processor takes for images, videos or sounds."""
    found = (getattr(processor, name, None) for name in _MARKS)
    return list(dict.fromkeys(mark for mark in found if isinstance(mark, str) and mark))


def conversation(row: Row, processor: Any = None) -> list[dict[str, Any]]:
    """The row's messages with its pictures in their parts.

    Raises:
        BadRow: if a text holds one of the processor's own marks.
    """
    marks = marks_of(processor)
    pictures = iter(row.images)
    messages = []
    for message in row.prompt:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                part = {"type": "image", "image": next(pictures)}
            elif found := [mark for mark in marks if mark in part["text"]]:
                raise BadRow(
                    f"the prompt's text holds the processor's image mark {found[0]}; "
                    "write an image part there instead, or take it out"
                )
            parts.append(part)
        messages.append({**message, "content": parts})
    return messages


def reward_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The columns that rewards are called with: id, answer and every other column, None where a row has it not.

    `answer` is one text for each row, `references` a list of all its reference answers. A dataset's own `id` column
    stays as it is.
    """
    names = dict.fromkeys(name for row in rows for name in row.columns)
    columns: dict[str, list[Any]] = {"id": [row.id for row in rows], "answer": [row.answer for row in rows]}
    columns["references"] = [row.references or [row.answer] for row in rows]
    return {**columns, **{name: [row.columns.get(name) for row in rows] for name in names}}
