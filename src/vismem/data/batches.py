"""Rows as a batch: a processor's tensors for their prompts, and columns for the rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vismem.data.rows import Row


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
    tokenizer = processor.tokenizer
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise ValueError(
            "the processor's tokenizer has no pad token, so prompts of different lengths cannot be batched"
        )
    if not (getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)):
        raise ValueError("the processor has no chat template, so it cannot format messages; take an instruct model's")
    mark = getattr(processor, "image_token", None)
    conversations = [conversation(row, mark) for row in rows]
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
    except Exception as error:  # processors raise what they like
        names = ", ".join(row.id for row in rows)
        mixed = len({bool(row.images) for row in rows}) == 2
        hint = "; rows with and without images are mixed here: try them in separate batches" if mixed else ""
        raise ValueError(f"{type(processor).__name__} cannot encode the prompts of {names}: {error}{hint}") from error
    finally:
        tokenizer.padding_side = side
    return dict(found)


def conversation(row: Row, mark: str | None = None) -> list[dict[str, Any]]:
    """The row's messages with its pictures in their parts. Raises ValueError if a text holds the image mark."""
    pictures = iter(row.images)
    messages = []
    for message in row.prompt:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                part = {"type": "image", "image": next(pictures)}
            elif mark and mark in part["text"]:
                raise ValueError(
                    f"{row.id}: the prompt's text holds the processor's image mark {mark}; "
                    "write an image part there instead, or take it out"
                )
            parts.append(part)
        messages.append({**message, "content": parts})
    return messages


def reward_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """The columns that rewards are called with: id, answer and every other column, None where a row has it not.

    A dataset's own `id` column stays as it is.
    """
    names = dict.fromkeys(name for row in rows for name in row.columns)
    columns: dict[str, list[Any]] = {"id": [row.id for row in rows], "answer": [row.answer for row in rows]}
    return {**columns, **{name: [row.columns.get(name) for row in rows] for name in names}}
