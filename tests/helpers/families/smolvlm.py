"""SmolVLM: Idefics3's layout in classes of its own; here a picture of 64 px comes in four tiles, the whole last."""

from __future__ import annotations

import torch
from transformers import (
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)
from transformers.models.smolvlm import processing_smolvlm

from families.words import tokenizer

if processing_smolvlm.num2words is None:  # the processor wants it, for the lengths of videos only
    processing_smolvlm.num2words = str


def processor() -> SmolVLMProcessor:
    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
        "video_token": "<video>",
    }
    words = tokenizer(list(named.values()), "<image>", **named)
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**sizes),
        tokenizer=words,
        video_processor=SmolVLMVideoProcessor(**sizes),
        image_seq_len=16,
        chat_template=words.chat_template,
    )


def build(seed: int = 0, tied: bool = True) -> SmolVLMForConditionalGeneration:
    """Two layers of text and three of vision; tiles of 32 px in patches of 4, merged 2 x 2: 16 visual tokens."""
    words = processor().tokenizer
    torch.manual_seed(seed + 1)
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 4,
            "initializer_range": 0.2,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(words),
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
            "pad_token_id": words.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
        },
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
    )
    model = SmolVLMForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model
