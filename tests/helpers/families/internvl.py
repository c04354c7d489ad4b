"""InternVL: a tower with a class token and layer scale, tiles of 32 px and a thumbnail, a Qwen text model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
)

from families.words import tokenizer

VARIANTS = [{"qk_norm": True, "mean_pooling": False}]  # the 6B tower: normed queries and keys, RMS norms, a last norm


def processor() -> InternVLProcessor:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer(list(named.values()), "<IMG_CONTEXT>", **named)
    size = {"height": 32, "width": 32}
    return InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=6),
        tokenizer=words,
        video_processor=InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=words.chat_template,
    )


def build(
    seed: int = 0, text: str = "qwen2", qk_norm: bool = False, mean_pooling: bool = True, tied: bool = False
) -> InternVLForConditionalGeneration:
    """Two layers of text and three of vision; tiles of 32 px in patches of 8, merged 2 x 2: four visual tokens each.

    `text` is the text model's type: `"qwen2"`, `"qwen3"` or `"qwen3_moe"`.
    """
    words = processor().tokenizer
    torch.manual_seed(seed)
    text_config = {
        "model_type": text,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "vocab_size": len(words),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "initializer_range": 0.2,
        "pad_token_id": words.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
    }
    if text == "qwen3_moe":
        text_config |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "attention_bias": not qk_norm,
            "use_qk_norm": qk_norm,
            "norm_type": "rms_norm" if qk_norm else "layer_norm",
            "use_mean_pooling": mean_pooling,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.2,
        },
        text_config=text_config,
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
    )
    model = InternVLForConditionalGeneration(config).eval()
    with torch.no_grad():  # transformers starts these at zero, or all alike
        for name, parameter in model.model.vision_tower.named_parameters():
            if name.endswith(("cls_token", "position_embeddings")):
                nn.init.normal_(parameter, std=0.2)
            elif "lambda_" in name or "_norm" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model
