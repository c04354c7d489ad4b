"""How much a memory adds to a base of real size, counted on shapes alone (no weights are made)."""

from __future__ import annotations

import tiny
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import vismem

SEVEN_BILLION = {
    "text_config": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": None,
        "eos_token_id": 1,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


def test_memory_of_a_seven_billion_base_is_below_one_percent():
    with torch.device("meta"):
        base = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**SEVEN_BILLION))
        model = vismem.VisMem(base, tiny.FAMILIES["qwen2_5_vl"].processor(), vismem.VisMemConfig())
    total = sum(p.numel() for p in base.parameters())
    parts = {part: sum(p.numel() for p in model.parameters_of(part)) for part in ("builder", "short", "long", "tokens")}
    assert total == 8_292_166_656
    assert parts == {"builder": 32_557_568, "short": 6_596_096, "long": 5_103_617, "tokens": 28_672}
    assert sum(parts.values()) / total < 0.01
