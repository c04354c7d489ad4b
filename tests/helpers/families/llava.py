"""LLaVA-1.5: a CLIP tower with a class token and a block that is not used, a projector without merging."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from families.words import tokenizer

SIGLIP = {"tower": "siglip_vision_model", "layer": -1, "strategy": "full"}  # as LLaVA-Interleave has it
VARIANTS = [SIGLIP, {"layer": 1}]


def processor() -> LlavaProcessor:
    words = tokenizer(["<image>"], "<image>", image_token="<image>")
    size = {"height": 32, "width": 32}
    images = CLIPImageProcessor(size=size, crop_size=size)
    return LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        chat_template=words.chat_template,
        num_additional_image_tokens=1,
    )


def vision(tower: str = "clip_vision_model") -> dict:
    """Three blocks of CLIP or SigLIP, images of 32 px in patches of 8."""
    config = {
        "model_type": tower,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "initializer_range": 0.2,
    }
    return config | ({"vision_use_head": False} if tower == "siglip_vision_model" else {"projection_dim": 32})


def text(words, model_type: str = "llama", tied: bool = False) -> dict:
    """Two layers of a plain text model."""
    return {
        "model_type": model_type,
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
    }


def finished(model: nn.Module, words) -> nn.Module:
    """The model with random weights in its tower and projector, and its tokenizer's end and pad tokens."""
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "vision_tower" in name and "norm" in name and name.endswith("weight"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif "vision_tower" in name or "multi_modal_projector" in name:
                nn.init.normal_(parameter, std=0.2)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model.eval()


def build(
    seed: int = 0,
    tied: bool = False,
    tower: str = "clip_vision_model",
    layer: int | list[int] = -2,
    strategy: str = "default",
) -> LlavaForConditionalGeneration:
    """Two layers of text and three of vision, two of them in use; 16 visual tokens for an image."""
    words = processor().tokenizer
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=vision(tower),
        text_config=text(words, tied=tied),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=tied,
    )
    return finished(LlavaForConditionalGeneration(config), words)
