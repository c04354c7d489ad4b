"""Qwen3-VL, dense and mixture-of-experts: Qwen2-VL's tower with learned positions too, and deepstack."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from vismem.backbones.base import Image
from vismem.backbones.qwen2_vl import Qwen2VLBackbone


class Qwen3VLBackbone(Qwen2VLBackbone):
    """`Qwen3VLForConditionalGeneration` and `Qwen3VLMoeForConditionalGeneration`.

    Deepstack adds the output of some of the tower's blocks to the first language layers, at an image's tokens. It
    comes with the image's features wherever the base reads the prompt. Memory takes no part in it: its vectors enter as
    input embeddings only, because short memory has no image tokens in the prompt and long memory never passes
    through the tower. So visual states are the projector's outputs alone, too.
    """

    model_types: tuple[str, ...] = ("qwen3_vl", "qwen3_vl_moe")

    def embed_patches(self, images: list[Image]) -> Tensor:
        embedded = super().embed_patches(images)
        return embedded + self._positions(images[0].grid).to(embedded.dtype)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """The learned position embeddings interpolated to a grid: [patches, d_vision], in block order."""
        tower = self.tower
        cells, weights = get_vision_interpolation_indices_and_weights(
            torch.tensor([[1, *grid]], device=tower.pos_embed.weight.device),
            tower.num_grid_per_side,
            tower.interpolation_mode,
            tower.interpolation_align_corners,
            self.merge,
        )  # [patches, taps] each
        return (tower.pos_embed(cells) * weights[..., None]).sum(1)
