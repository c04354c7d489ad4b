"""Prompt tensors of a conversation, and the texts that no message may contain."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vismem.deprecation import renamed
from vismem.model import VisMem
from vismem.tokens import END_TOKENS, INVOCATION_TOKENS


def chat_inputs(
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
        messages: chat messages, with PIL images.
        processor: a copy of the model's, if another thread is using that one.
        opens_turn: append the start of an assistant message.
        continues: leave the last message open, so that it is continued.

    Raises:
        Exception: whatever the chat template or processor raises for messages that it does not support.
    """
    inputs = (processor or model.processor).apply_chat_template(
        messages,
        add_generation_prompt=opens_turn,
        continue_final_message=continues,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    return model.move_inputs(inputs)


def reserved_texts(model: VisMem) -> list[str]:
    """Special tokens that stand for images, videos and memory, and must not appear in a message's text."""
    processor = model.processor
    image = processor.tokenizer.convert_ids_to_tokens(model.backbone.image_token_id)
    vision = [image, *(getattr(processor, name, None) for name in ("image_token", "video_token"))]
    texts = [*vision, *INVOCATION_TOKENS.values(), *END_TOKENS.values()]
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text))


__getattr__ = renamed(__name__, {"inputs_of": "chat_inputs", "marks_of": "reserved_texts"})
