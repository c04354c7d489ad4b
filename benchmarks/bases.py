"""The bases to benchmark, and prompts for them: the pocket, Qwen2.5-VL in several sizes, one of every family.

All but the pocket have random weights. Families use the tests' tiny models with their real processors, so a family
can be benchmarked as soon as it is tested.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

import vismem
from vismem.pocket import load_base

PROMPT_WORDS = 32
SPECIAL = ("<pad>", "<end>", "<image>", "<start>", "<stop>")
WORK = {"pocket": 1, "qwen-28m": 3, "qwen-200m": 12}  # relative time of a row, used only to estimate the time left


def word_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `size` words, so that the four memory tokens come after the base's vocabulary."""
    words = [*SPECIAL, ".", *(f"w{index}" for index in range(size - len(SPECIAL) - 1))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    marks = {"pad_token": "<pad>", "eos_token": "<end>", "unk_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **marks)


def random_qwen(
    vocabulary: int, width: int, layers: int, mlp: int, tower: tuple[int, int, int], tied: bool
) -> tuple[Qwen2_5_VLForConditionalGeneration, Any]:
    """A Qwen2.5-VL with random weights; `tower` is its vision encoder's width, depth and MLP width."""
    tokenizer = word_tokenizer(vocabulary)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(list(SPECIAL)), strict=True))
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": tower[0],
            "depth": tower[1],
            "intermediate_size": tower[2],
            "num_heads": tower[0] // 64,
            "out_hidden_size": width,
            "fullatt_block_indexes": [tower[1] // 2 - 1, tower[1] - 1],
        },
        text_config={
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 64,
            "num_key_value_heads": max(width // 64 // 2, 1) if width % 128 == 0 else 1,
            "vocab_size": vocabulary,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": ids["<end>"],
        },
        image_token_id=ids["<image>"],
        video_token_id=vocabulary - 1,
        vision_start_token_id=ids["<start>"],
        vision_end_token_id=ids["<stop>"],
        tie_word_embeddings=tied,
    )
    base = Qwen2_5_VLForConditionalGeneration(config)
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = ids["<end>"], ids["<pad>"]
    return base, SimpleNamespace(tokenizer=tokenizer)


def family(name: str) -> tuple[Any, Any]:
    """The tests' tiny base of a family, with its processor."""
    module = import_module(f"families.{name}")
    return module.build(), module.processor()


HELPERS = Path(__file__).resolve().parents[1] / "tests" / "helpers"
FAMILIES = sorted(
    p.stem for p in (HELPERS / "families").iterdir() if p.stem.strip("_") not in ("init", "pycache", "words")
)
sys.path.append(str(HELPERS))

BASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "pocket": load_base,
    "qwen-28m": lambda: random_qwen(16384, 320, 8, 1280, (256, 4, 704), tied=False),
    "qwen-200m": lambda: random_qwen(32768, 1024, 12, 2816, (512, 8, 1408), tied=True),
    **{f"tiny-{name}": partial(family, name) for name in FAMILIES},
}


def prompts(model: vismem.VisMem, visual_tokens: int, batch: int) -> dict[str, Tensor]:
    """A batch of prompts for a model; with 0 visual tokens, its own processor encodes a small picture."""
    if visual_tokens:
        return prompt(model.base, visual_tokens, batch)
    import tiny

    asked = [tiny.message("Describe the image: it is bright; look again!", tiny.picture(0))] * batch
    return tiny.prompts(model.processor, asked)


def prompt(base: Any, visual_tokens: int, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """A batch of random prompts as the family's processor would make them: images, then `PROMPT_WORDS` words.

    Qwen2.5-VL shows one square image. Idefics3 has a fixed number of visual tokens per image and shows several.

    Raises:
        ValueError: if no square image, or no number of images, gives that many visual tokens.
    """
    config, generator = base.config, torch.Generator().manual_seed(seed)
    # Avoids special tokens at either end of the vocabulary, and unused rows at its end.
    marks = [value for name, value in vars(config).items() if name.endswith("_token_id") and (value or 0) > 1000]
    last = min(config.get_text_config().vocab_size - 8, *marks, 2**31)
    words = torch.randint(64, last, (batch, PROMPT_WORDS), generator=generator)
    if config.model_type == "qwen2_5_vl":
        vision = config.vision_config
        side = math.isqrt(visual_tokens) * vision.spatial_merge_size
        if side**2 != visual_tokens * vision.spatial_merge_size**2:
            raise ValueError(f"{visual_tokens} visual tokens are not a square image")
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        images = {
            "pixel_values": torch.randn(batch * side**2, values, generator=generator),
            "image_grid_thw": torch.tensor([[1, side, side]] * batch),
        }
        frame = [config.vision_start_token_id], [config.vision_end_token_id]
    else:
        vision = config.vision_config
        each = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
        if visual_tokens % each:
            raise ValueError(f"{visual_tokens} visual tokens are not a whole number of images of {each}")
        shape = (batch, visual_tokens // each, 3, vision.image_size, vision.image_size)
        images = {"pixel_values": torch.rand(shape, generator=generator) + 0.1}
        images["pixel_attention_mask"] = torch.ones(shape[0], shape[1], *shape[3:], dtype=torch.long)
        frame = [], []
    places = torch.tensor([*frame[0], *[config.image_token_id] * visual_tokens, *frame[1]])
    input_ids = torch.cat([places.expand(batch, -1), words], dim=1)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **images}
    if config.model_type == "qwen2_5_vl":
        inputs["mm_token_type_ids"] = (input_ids == config.image_token_id).long()
    return {
        name: value.to(base.device, base.dtype if value.is_floating_point() else None) for name, value in inputs.items()
    }


def equipped(
    name: str, device: str, dtype: torch.dtype, config: vismem.VisMemConfig | None = None
) -> tuple[vismem.VisMem, str]:
    """A base of that name with an untrained memory, and where the base's weights come from."""
    torch.manual_seed(0)
    base, processor = BASES[name]()
    weights = "trained" if name == "pocket" else "random"
    return vismem.VisMem(base.to(device, dtype).eval(), processor, config).eval(), weights


def silence(model: vismem.VisMem) -> None:
    """Zeroes the output rows of the four tokens: greedy decoding never picks them, and the cost stays the same."""
    tokens = model.tokens
    rows = (tokens.invocation, tokens.end) if tokens.tied else (tokens.invocation_output, tokens.end_output)
    with torch.no_grad():
        for row in rows:
            row.zero_()
