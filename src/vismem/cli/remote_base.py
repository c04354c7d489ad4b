"""The layers of LLaVA-OneVision-1.5, only to be counted: its code is not in transformers, so nothing here runs.

A RICE vision tower with its merger, and a Qwen3 language model, named as in the published code.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from vismem.estimates import read_language

MODEL_TYPE = "llavaonevision1_5"


class RemoteBase(nn.Module):
    """The layers that a config describes; it has the fields of the published `config.json` as attributes."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        # Either of the two levels may have the field.
        tied = getattr(config, "tie_word_embeddings", getattr(config.text_config, "tie_word_embeddings", False))
        numbers = read_language(config.text_config)
        text = Qwen3Config(
            hidden_size=numbers.hidden,
            intermediate_size=numbers.inner,
            num_hidden_layers=numbers.layers,
            num_attention_heads=numbers.heads,
            num_key_value_heads=numbers.kv_heads,
            head_dim=numbers.head_dim,
            vocab_size=numbers.vocabulary,
            tie_word_embeddings=bool(tied),
        )
        language = Qwen3ForCausalLM(text)
        self.config = SimpleNamespace(
            model_type=MODEL_TYPE,
            text_config=text,
            vision_config=config.vision_config,
            get_text_config=lambda: text,
        )
        self.model = nn.ModuleDict({"visual": Rice(config.vision_config, text), "language_model": language.model})
        self.lm_head = language.lm_head

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_submodule("language_model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class Rice(nn.Module):
    """The vision tower: a class token with its own rotation, a norm before the blocks, and the merger."""

    def __init__(self, vision: Any, text: Any) -> None:
        super().__init__()
        width, inner, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
        angles = width // vision.num_heads // 2
        self.spatial_merge_size = vision.spatial_merge_size
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch, bias=False)})
        self.rotary_pos_emb = nn.Module()
        self.rotary_pos_emb.register_buffer("inv_freq", torch.ones(angles), persistent=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.class_pos_emb = nn.Parameter(torch.empty(1, angles))
        self.pre_layernorm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(block(width, inner) for _ in range(vision.depth))
        wide = width * vision.spatial_merge_size**2
        merger = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, text.hidden_size))
        self.merger = nn.ModuleDict({"ln_q": nn.LayerNorm(width), "mlp": merger})


def block(width: int, inner: int) -> nn.ModuleDict:
    attention = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
    mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
    return nn.ModuleDict({"norm1": nn.LayerNorm(width), "norm2": nn.LayerNorm(width), "attn": attention, "mlp": mlp})
