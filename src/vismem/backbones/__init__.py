"""The supported families of base models. docs/extend.md shows how to add one."""

from __future__ import annotations

from typing import Any

from vismem.backbones.base import Backbone, Image, Patches
from vismem.backbones.gemma3 import Gemma3Backbone
from vismem.backbones.idefics3 import Idefics3Backbone
from vismem.backbones.internvl import InternVLBackbone
from vismem.backbones.llava import LlavaBackbone
from vismem.backbones.llava_next import LlavaNextBackbone
from vismem.backbones.llava_onevision import LlavaOnevisionBackbone
from vismem.backbones.llava_onevision1_5 import LlavaOneVision15Backbone
from vismem.backbones.qwen2_5_vl import Qwen25VLBackbone
from vismem.backbones.qwen2_vl import Qwen2VLBackbone
from vismem.backbones.qwen3_vl import Qwen3VLBackbone

FAMILIES: list[type[Backbone]] = [
    Gemma3Backbone,
    Idefics3Backbone,
    InternVLBackbone,
    LlavaBackbone,
    LlavaNextBackbone,
    LlavaOnevisionBackbone,
    LlavaOneVision15Backbone,
    Qwen2VLBackbone,
    Qwen25VLBackbone,
    Qwen3VLBackbone,
]


def register(family: type[Backbone]) -> type[Backbone]:
    """Registers a family from outside this package; can be used as a class decorator.

    The latest registration wins, so it may replace a family.

    Raises:
        TypeError: if it is no `Backbone` class, or has no `model_types`.
    """
    if not (isinstance(family, type) and issubclass(family, Backbone) and family.model_types):
        raise TypeError(f"cannot register {family!r}: a family is a subclass of Backbone with model_types set")
    FAMILIES.insert(0, family)
    return family


def backbone_of(base: Any) -> Backbone:
    """The backbone for `base`, chosen by its `config.model_type`. A namespace with a config is enough to ask sizes.

    Raises:
        ValueError: if no family has that model type; lists the known ones.
    """
    model_type = getattr(getattr(base, "config", None), "model_type", None) or type(base).__name__
    for family in FAMILIES:
        if model_type in family.model_types:
            return family(base)
    known = ", ".join(sorted({name for family in FAMILIES for name in family.model_types}))
    raise ValueError(
        f"no backbone for model type {model_type!r}: memory needs a vision-language model of a known family "
        f"({known}); to add a family, write a Backbone and vismem.backbones.register it (docs/extend.md)"
    )


__all__ = ["FAMILIES", "Backbone", "Image", "Patches", "backbone_of", "register"]
