"""Gemma 3: a SigLIP tower averaged 2 x 2, one layer with a window and one without, scaled embeddings, a tied head."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

from families.words import tokenizer


def processor() -> Gemma3Processor:
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    words = tokenizer(list(named.values()), "<start_of_image>", **named)
    images = Gemma3ImageProcessor(size={"height": 32, "width": 32})
    return Gemma3Processor(images, words, chat_template=words.chat_template, image_seq_length=4)


def build(seed: int = 0, sliding_window: int = 12, tied: bool = True) -> Gemma3ForConditionalGeneration:
    """Two layers of text and three of vision; images of 32 px in patches of 8, averaged to four visual tokens."""
    words = processor().tokenizer
    torch.manual_seed(seed)
    config = Gemma3Config(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "vision_use_head": False,
            "initializer_range": 0.2,
        },
        text_config={
            "model_type": "gemma3_text",
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": sliding_window,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "vocab_size": len(words),
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
            "pad_token_id": words.pad_token_id,
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
        },
        mm_tokens_per_image=4,
        boi_token_index=words.boi_token_id,
        eoi_token_index=words.eoi_token_id,
        image_token_index=words.image_token_id,
        tie_word_embeddings=tied,
        initializer_range=0.2,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():  # transformers starts these at zero
        nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.2)
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight") and "language_model" in name:
                # What a layer adds outweighs the scaled words, or the tied head would repeat the last one for ever.
                nn.init.uniform_(parameter, 2.0, 4.0) if "post_" in name else nn.init.uniform_(parameter, -0.5, 0.5)
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model
