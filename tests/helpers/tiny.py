"""Tiny real models: transformers' own classes built from a config with random weights, and their real processors.

Each is built once and copied for every test, which takes half as long as building it again.
"""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache

import numpy as np
import torch
from families import FAMILIES, UNLIKE
from PIL import Image

import vismem

__all__ = ["FAMILIES", "UNLIKE", "base_and_processor", "equip", "message", "mixed_batch", "picture", "prompts"]


def base_and_processor(family: str, dtype: torch.dtype = torch.float32, **changes):
    """A tiny base of that family with its processor."""
    return copied(built, family, dtype, changes)


def equip(family: str, dtype: torch.dtype = torch.float32, seed: int = 1, base: dict | None = None, **config):
    """A tiny model with memory. Its memory is shaken a little, so that no part of it is zero."""
    return copied(equipped, family, dtype, seed, base or {}, config)


MADE: dict[str, tuple] = {}


def copied(make, *given):
    """A copy of what `make` returns; torch's random numbers go on as if it had been made now."""
    key = f"{make.__name__}{given}"
    if key not in MADE:
        MADE[key] = make(*given), torch.get_rng_state()
    found, state = MADE[key]
    torch.set_rng_state(state)
    return deepcopy(found)


def built(family: str, dtype: torch.dtype, changes: dict):
    return FAMILIES[family].build(**changes).to(dtype), FAMILIES[family].processor()


def equipped(family: str, dtype: torch.dtype, seed: int, base: dict, changes: dict):
    model, processor = base_and_processor(family, dtype, **base)
    torch.manual_seed(seed)
    config = {"query_length": 4, "short_length": 4, "long_length": 4, "lora_r": 4, **changes}
    found = vismem.VisMem(model, processor, vismem.VisMemConfig(**config)).eval()
    with torch.no_grad():
        for parameter in found.memory.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found


@lru_cache
def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    """A random picture, width x height."""
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def message(text: str, *images: Image.Image) -> list[dict]:
    """A one-turn conversation: the images, then the text."""
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def prompts(processor, conversations: list[list[dict]]) -> dict:
    """A left-padded batch of prompts, as a user makes it."""
    return dict(
        processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )
    )


def mixed_batch(processor) -> dict:
    """Three rows that differ in length and images: one image, two images, one image of another shape."""
    return prompts(
        processor,
        [
            message("What is on the table?", picture(0)),
            message("Describe the image: a red cup, a blue book and two green pens.", picture(1), picture(2)),
            message("look again!", picture(3, (48, 32))),
        ],
    )
