"""LLaVA-OneVision-1.5: a RICE tower with a class token whose rotation is learned, and positions on one axis.

Its code comes with its weights (`trust_remote_code=True`) and does not know `mm_encoder_outputs`, with
which transformers passes encoded images to a model; so this backbone encodes and inserts them itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vismem.backbones.base import Image, Rotation
from vismem.backbones.qwen2_vl import Qwen2VLBackbone


class LlavaOneVision15Backbone(Qwen2VLBackbone):
    """`LLaVAOneVision1_5_ForConditionalGeneration`. The class token stands before the patches of every image."""

    model_types: tuple[str, ...] = ("llavaonevision1_5",)

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        if not isinstance(base, nn.Module):  # a config alone, looked at before weights are read
            return
        first = self.tower.rotary_pos_emb.inv_freq[0]
        if not first.is_meta and first != 1:
            # transformers 5 leaves a buffer that is in no checkpoint uninitialised, unless the code sets it.
            raise ValueError(
                f"the base's visual.rotary_pos_emb.inv_freq starts with {float(first):.3g}, not 1: its code, made for "
                "transformers 4, does not set it when weights are loaded; set it in the code's _init_weights"
            )

    def image_features(self, **vision: Tensor) -> Any:
        visual = self.base.model.get_image_features(**vision)  # of all images in one tensor
        return BaseModelOutputWithPooling(pooler_output=visual.split([i.tokens for i in self.images(**vision)]))

    @torch.no_grad()
    def prepare(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if inputs.get("pixel_values_videos") is not None:
            raise ValueError("the llavaonevision1_5 backbone reads images only; leave pixel_values_videos out")
        inputs = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}  # for M-RoPE
        vision = self.vision_inputs(inputs)
        return {**inputs, "mm_encoder_outputs": {"image": self.image_features(**vision)}} if vision else inputs

    def read(self, cache: Any = None, mm_encoder_outputs: dict[str, Any] | None = None, **inputs: Any) -> Tensor:
        if mm_encoder_outputs:
            embeds = inputs.get("inputs_embeds")
            if embeds is None:
                embeds = self.embeddings(inputs["input_ids"])
            places = embeds == self.embeddings.weight[self.image_token_id]
            visual = torch.cat(mm_encoder_outputs["image"].pooler_output).to(embeds)
            filled = embeds.masked_scatter(places.all(-1, keepdim=True), visual)
            inputs = {k: v for k, v in inputs.items() if k not in ("input_ids", *self.image_inputs)}
            inputs["inputs_embeds"] = filled
        return super().read(cache, **inputs)

    def embed_patches(self, images: list[Image]) -> Tensor:
        # [n, 1 + patches, d_vision]: the class token is one more key for every patch and every memory.
        patches = super().embed_patches(images)
        first = self.tower.class_embedding.to(patches).expand(len(patches), 1, -1)
        return self.tower.pre_layernorm(torch.cat([first, patches], dim=1))

    def to_raster(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return super().to_raster(patches[:, 1:], grid)

    def patch_rotary(self, grid: tuple[int, int]) -> Rotation:
        own = rotation(self.tower.class_pos_emb.float())  # [1, head_dim / 2] angles, not coordinates
        patches = super().patch_rotary(grid)
        return torch.cat([own[0], patches[0]]), torch.cat([own[1], patches[1]])

    def rotary_at(self, coordinates: Tensor) -> Rotation:
        frequencies = self.tower.rotary_pos_emb.inv_freq.to(coordinates.device).float()
        return rotation((coordinates[..., None] * frequencies).flatten(-2))  # rows, then columns


def rotation(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., head_dim] of angles [..., head_dim / 2], the same for both halves of a head."""
    both = torch.cat([angles, angles], dim=-1)
    return both.cos(), both.sin()
