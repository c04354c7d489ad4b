"""LLaVA-1.5: a CLIP (or SigLIP) tower read before its end, and an MLP that turns each patch into one token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vismem.backbones.base import Image
from vismem.backbones.clip import ClipTowerBackbone

CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0}  # for each kind of tower, before its patches


class LlavaBackbone(ClipTowerBackbone):
    """`LlavaForConditionalGeneration`.

    Features come from `vision_feature_layer`, by default the last block but one, and no norm follows. Blocks after
    it are not run, neither by patches nor by memory, and carry no adapter. CLIP's class token stands before the
    patches: memory looks at it as patches do, but it has no place in the image and is not pooled.
    """

    model_types: tuple[str, ...] = ("llava",)
    image_inputs: tuple[str, ...] = ("pixel_values",)

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        config = base.config
        kind, layer = config.vision_config.model_type, config.vision_feature_layer
        strategy, count = config.vision_feature_select_strategy, config.vision_config.num_hidden_layers
        if kind not in CLASS_TOKENS:
            raise ValueError(
                f"the {config.model_type} backbone knows the towers {', '.join(CLASS_TOKENS)}; this base's "
                f"vision_config is a {kind!r}: write a backbone for it (docs/extend.md)"
            )
        self.class_tokens = CLASS_TOKENS[kind]
        if not isinstance(layer, int) or layer == 0 or not -count <= layer <= count:
            raise ValueError(
                f"the {config.model_type} backbone reads one layer of the tower, after one of its {count} blocks; this "
                f"base's config has vision_feature_layer={layer!r}: write a backbone for it (docs/extend.md)"
            )
        if strategy == "default" and not self.class_tokens:
            raise ValueError(
                f"vision_feature_select_strategy='default' drops the class token, and a {kind} has none: the "
                f"{config.model_type} backbone would lose a patch; set it to 'full' in the base's config"
            )
        self.depth = layer if layer > 0 else count + 1 + layer  # as transformers counts: 0 is before the first block

    @property
    def tower(self) -> Any:
        return self.base.model.vision_tower

    @property
    def tower_targets(self) -> tuple[str, ...]:  # type: ignore[override]  # of the blocks in use only: the others would never learn
        names = "self_attn.q_proj", "self_attn.v_proj"
        return tuple(f"encoder.layers.{index}.{name}" for index in range(self.depth) for name in names)

    @property
    def blocks(self) -> Any:
        return self.tower.encoder.layers[: self.depth]

    @property
    def language_model(self) -> Any:
        return self.base.model.language_model

    @property
    def merge(self) -> int:
        return 1

    def images(self, pixel_values: Tensor | None = None, **_: Tensor) -> list[Image]:
        """One `Image` for each picture in `pixel_values` [images, 3, H, W]; with strategy "full" the class token is
        one more visual token."""
        if pixel_values is None:
            return []
        patch = self.base.config.vision_config.patch_size
        grid = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        kept = self.class_tokens if self.base.config.vision_feature_select_strategy == "full" else 0
        blocks = kept + torch.arange(grid[0] * grid[1]).view(grid)
        return [Image(pixels, grid, grid[0] * grid[1] + kept, blocks=blocks) for pixels in pixel_values]

    def embed_patches(self, images: list[Image]) -> Tensor:
        # [n, class tokens + patches, d_vision]
        embedded = self.tower.embeddings(torch.stack([image.pixels for image in images]))
        return self.tower.pre_layrnorm(embedded) if self.class_tokens else embedded

    def to_raster(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        return patches[:, self.class_tokens :].unflatten(1, grid)

    def project(self, hidden: Tensor) -> Tensor:
        return self.base.model.multi_modal_projector(hidden)
