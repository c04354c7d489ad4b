"""Qwen3-VL: a rotary tower with learned positions too, deepstack after two of its blocks, interleaved M-RoPE."""

from __future__ import annotations

import torch
from transformers import (
    PreTrainedModel,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from families.words import tokenizer


def processor() -> Qwen3VLProcessor:
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer(marks, "<|vision_start|><|image_pad|><|vision_end|>")
    sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 64 * 64}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=words,
        video_processor=Qwen3VLVideoProcessor(patch_size=4, merge_size=2),
        chat_template=words.chat_template,
    )


def settings(tied: bool, **text) -> dict:
    """What a config of either model says; `text` is added to the text model's part."""
    words = processor().tokenizer
    return {
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "num_position_embeddings": 25,  # a square of 5, which no image's grid is
            "deepstack_visual_indexes": [0, 1],
            "out_hidden_size": 48,
            "initializer_range": 0.2,
        },
        "text_config": {
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "vocab_size": len(words) + 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 2, 2],
                "mrope_interleaved": True,
            },
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
            **text,
        },
        "image_token_id": words.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": words.convert_tokens_to_ids("<|video_pad|>"),
        "vision_start_token_id": words.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": words.convert_tokens_to_ids("<|vision_end|>"),
        "tie_word_embeddings": tied,
    }


def finished(model: PreTrainedModel) -> PreTrainedModel:
    """A model without constant vision biases and norms, and with its tokenizer's end and pad tokens."""
    with torch.no_grad():  # transformers starts biases at zero and norms at one
        for parameter in model.model.visual.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    words = processor().tokenizer
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model.eval()


def build(seed: int = 0, tied: bool = False) -> Qwen3VLForConditionalGeneration:
    """Two layers of text and three of vision; what the first two of these saw is added after both text layers."""
    torch.manual_seed(seed)
    return finished(Qwen3VLForConditionalGeneration(Qwen3VLConfig(**settings(tied))))
