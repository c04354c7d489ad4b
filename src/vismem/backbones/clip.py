"""Towers with blocks like CLIP's in transformers, such as SigLIP's; each family adds the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vismem.backbones.base import Backbone, Rotary, join_heads, split_heads


class ClipTowerBackbone(Backbone):
    """Parent class: norms before attention and before the MLP, separate projections, learned positions only."""

    @property
    def blocks(self) -> Any:
        return self.tower.encoder.layers

    @property
    def vision_size(self) -> int:
        return self.base.config.vision_config.hidden_size

    def qkv(self, block: Any, hidden: Tensor, _rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        attention, states = block.self_attn, block.layer_norm1(hidden)
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        query, key, value = (split_heads(project(states), attention.head_dim) for project in projections)
        return query, key, value

    def finish(self, block: Any, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + block.self_attn.out_proj(join_heads(attended))
        return hidden + block.mlp(block.layer_norm2(hidden))
