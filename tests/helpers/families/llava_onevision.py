"""LLaVA-OneVision: a SigLIP tower read to its end, tiles for a picture alone in its prompt, a Qwen2 text model."""

from __future__ import annotations

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from families.llava import finished, text, vision
from families.llava_next import projected
from families.words import tokenizer

__all__ = ["build", "processor", "projected"]

PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64], [96, 96]]
MOST = "anyres_max_3"  # tokens of three tiles: two by two of them are thinned out


def processor() -> LlavaOnevisionProcessor:
    words = tokenizer(["<image>", "<video>"], "<image>", image_token="<image>", video_token="<video>")
    size = {"height": 32, "width": 32}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=PINPOINTS),
        tokenizer=words,
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=words.chat_template,
        vision_aspect_ratio=MOST,
    )


def build(seed: int = 0, tied: bool = True) -> LlavaOnevisionForConditionalGeneration:
    """Two layers of text and three of vision, all in use; 16 patches in each view."""
    words = processor().tokenizer
    torch.manual_seed(seed)
    config = LlavaOnevisionConfig(
        vision_config=vision("siglip_vision_model"),
        text_config=text(words, "qwen2", tied),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=MOST,
        tie_word_embeddings=tied,
    )
    return finished(LlavaOnevisionForConditionalGeneration(config), words)
