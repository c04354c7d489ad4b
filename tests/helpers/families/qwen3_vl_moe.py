"""Qwen3-VL with a mixture of experts: Qwen3-VL's tower and processor, two of four experts for each token."""

from __future__ import annotations

import torch
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from families.qwen3_vl import finished, processor, settings


def build(seed: int = 0, tied: bool = False) -> Qwen3VLMoeForConditionalGeneration:
    """As the dense one; both text layers are mixtures."""
    torch.manual_seed(seed)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return finished(Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**settings(tied, **experts))))


__all__ = ["build", "processor"]
