"""Which families of base models are supported; one line each."""

from __future__ import annotations

from torch import nn

from vismem.backbones.base import Backbone, Image, Patches
from vismem.backbones.idefics3 import Idefics3Backbone
from vismem.backbones.qwen2_5_vl import Qwen25VLBackbone

FAMILIES: tuple[type[Backbone], ...] = (Idefics3Backbone, Qwen25VLBackbone)


def backbone_of(base: nn.Module) -> Backbone:
    """The backbone that fits `base`, by its `config.model_type`.

    Raises:
        ValueError: if no family answers to that name; lists those that do.
    """
    model_type = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
    for family in FAMILIES:
        if model_type in family.model_types:
            return family(base)
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise ValueError(
        f"no backbone for model type {model_type!r}; supported: {known}. A new family is one file in "
        "vismem/backbones (see Backbone in vismem/backbones/base.py)"
    )


__all__ = ["FAMILIES", "Backbone", "Image", "Patches", "backbone_of"]
