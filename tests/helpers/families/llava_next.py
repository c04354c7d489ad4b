"""LLaVA-NeXT: LLaVA's tower; a picture whole and in tiles of 32 px, newlines after the rows, a Mistral text model."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
)

from families.llava import finished, text, vision
from families.words import tokenizer

PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64], [32, 96]]


def processor() -> LlavaNextProcessor:
    words = tokenizer(["<image>"], "<image>", image_token="<image>")
    size = {"height": 32, "width": 32}
    images = LlavaNextImageProcessor(size=size, crop_size=size, image_grid_pinpoints=PINPOINTS)
    return LlavaNextProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=words.chat_template,
        num_additional_image_tokens=1,
    )


def build(seed: int = 0, tied: bool = False) -> LlavaNextForConditionalGeneration:
    """Two layers of text and three of vision, two of them in use; 16 visual tokens for each view."""
    words = processor().tokenizer
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=vision(),
        text_config=text(words, "mistral", tied),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=tied,
    )
    return finished(LlavaNextForConditionalGeneration(config), words)


def projected(base, inputs: dict) -> Tensor:
    """The projector's outputs view by view, padding included, before the base lays tiles side by side: [t, d]."""
    with patch.object(base.model, "pack_image_features", lambda features, *_, **__: (features, None)):
        return torch.cat([*base.get_image_features(**inputs).pooler_output]).flatten(0, 1)
