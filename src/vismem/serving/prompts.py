"""Prompts of conversations: their tensors, how many tokens they may have, and which texts are the model's own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vismem.model import VisMem
from vismem.tokens import END_TOKENS, INVOCATION_TOKENS


def inputs_of(
    model: VisMem,
    messages: list[dict[str, Any]],
    processor: Any = None,
    *,
    opens_turn: bool = True,
    continues: bool = False,
) -> dict[str, Tensor]:
    """The processor's tensors for one conversation, on the model's device, as `generate` and `Request` take them.

    Args:
        model: the model.
        messages: its turns, with pictures in their places.
        processor: the model's by default; a copy of it where another thread uses that.
        opens_turn: end with the beginning of an assistant's turn.
        continues: end within the last turn, after its last word.

    Raises:
        Exception: whatever a template or a processor raises for messages that it does not take.
    """
    inputs = (processor or model.processor).apply_chat_template(
        messages,
        add_generation_prompt=opens_turn,
        continue_final_message=continues,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return dict(inputs.to(model.device, dtype=model.dtype))


def placeholders_of(model: VisMem) -> list[str]:
    """Texts that stand for images, videos and memory in a prompt, which no message may have in its words."""
    processor = model.processor
    image = processor.tokenizer.convert_ids_to_tokens(model.backbone.image_token_id)
    marks = [image, *(getattr(processor, name, None) for name in ("image_token", "video_token"))]
    memory = [table[kind] for table in (INVOCATION_TOKENS, END_TOKENS) for kind in table]
    return list(dict.fromkeys(mark for mark in [*marks, *memory] if isinstance(mark, str) and mark))
