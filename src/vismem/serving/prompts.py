"""What a model's prompts may have in them: how many tokens, and which texts are the model's own."""

from __future__ import annotations

from vismem.model import VisMem
from vismem.tokens import END_TOKENS, INVOCATION_TOKENS


def context_of(model: VisMem) -> int:
    """How many tokens the base was made for; a number beyond all use where its config does not say."""
    return getattr(model.base.config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1


def marks_of(model: VisMem) -> list[str]:
    """Texts that stand for images, videos and memory in a prompt, which no message may have in its words."""
    processor = model.processor
    image = processor.tokenizer.convert_ids_to_tokens(model.backbone.image_token_id)
    marks = [image, *(getattr(processor, name, None) for name in ("image_token", "video_token"))]
    memory = [table[kind] for table in (INVOCATION_TOKENS, END_TOKENS) for kind in table]
    return list(dict.fromkeys(mark for mark in [*marks, *memory] if isinstance(mark, str) and mark))
