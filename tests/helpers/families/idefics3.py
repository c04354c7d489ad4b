"""Idefics3: a SigLIP tower and a pixel shuffle of two by two."""

from __future__ import annotations

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
)

from families.words import tokenizer


def processor() -> Idefics3Processor:
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    images = Idefics3ImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    words = tokenizer(marks, "<image>")
    return Idefics3Processor(images, words, image_seq_len=4, chat_template=words.chat_template)


def build(
    seed: int = 0, sliding_window: int | None = None, tied: bool = True, layers: int = 2
) -> Idefics3ForConditionalGeneration:
    """Two layers each side; images of 32 px in patches of 8, merged 2 x 2: four visual tokens."""
    words = processor().tokenizer
    torch.manual_seed(seed)
    text = {
        "model_type": "mistral" if sliding_window else "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(words),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "pad_token_id": words.pad_token_id,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
    }
    if sliding_window:
        text["sliding_window"] = sliding_window
    config = Idefics3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.2,
        },
        text_config=text,
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=tied,
    )
    model = Idefics3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model
