"""The pocket VLM's shape: Idefics3 with a small SigLIP-like tower and a Mistral text model with local attention.

The sliding window makes an image fade from a long conversation: a token sees only the last `WINDOW` positions, so
older evidence must be carried from layer to layer, or shown again.
"""

from __future__ import annotations

WINDOW = 48


def build_model(tokenizer):
    """A fresh `Idefics3ForConditionalGeneration` of about 3.4 M parameters, random weights."""
    from transformers import (
        GenerationConfig,
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3VisionConfig,
        MistralConfig,
    )

    from pocket_base.tokenizer import END, IMAGE, PAD

    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (PAD, END, IMAGE)}
    text = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        sliding_window=WINDOW,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=ids[PAD],
        bos_token_id=None,
        eos_token_id=ids[END],
    )
    vision = Idefics3VisionConfig(
        image_size=64,
        patch_size=8,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="gelu_pytorch_tanh",
    )
    config = Idefics3Config(
        vision_config=vision,
        text_config=text,
        scale_factor=2,
        image_token_id=ids[IMAGE],
        pad_token_id=ids[PAD],
        tie_word_embeddings=True,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=ids[END], pad_token_id=ids[PAD], do_sample=False, max_new_tokens=128
    )
    return model
