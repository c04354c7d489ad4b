"""How large a base and its memory are, counted from numbers alone: no weights, no tensors.

`read_shape` takes what matters out of a config, `memory_parameters` counts what a memory adds, parameter for
parameter. What a base holds itself is counted on the real model without weights (`cli/meta.py`), but for a
family whose code is not in transformers: there `remote_parameters` counts. Peaks of memory are `estimates.py`'s matter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vismem.config import VisMemConfig

PARTS = ("builder", "short", "long", "tokens")
REMOTE = "llavaonevision1_5"  # LLaVA-OneVision-1.5 brings its own code: RICE's tower and a Qwen3 language model


@dataclass(frozen=True)
class Language:
    """A language model's numbers: d, the MLP's width, layers, heads, their size, rows of the embedding table."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    query_norm: bool


@dataclass(frozen=True)
class Tower:
    """A vision tower's numbers: d_vision, the MLP's width, blocks, heads, m; is its MLP gated, its projection fused."""

    width: int
    inner: int
    layers: int
    heads: int
    merge: int
    gated: bool
    fused: bool


@dataclass(frozen=True)
class Shape:
    """All of a base that sizes depend on.

    Args:
        family: `config.model_type`.
        language, tower: the two models in it.
        tied: whether the output head is the embedding table.
        parameters: of the whole base.
    """

    family: str
    language: Language
    tower: Tower
    tied: bool
    parameters: int


def read_shape(config: Any, parameters: int, tied: bool, backbone: Any = None) -> Shape:
    """The numbers of a base's config.

    Args:
        config: transformers' config, or an object with the same attributes.
        parameters, tied: of the base, counted and seen elsewhere.
        backbone: the family's, which knows the tower's width, m, the blocks in use, and whether one projection is
            query, key and value; without it they are what the config lets one see.

    Raises:
        ValueError: if the config lacks a number; names it.
    """
    vision = config.vision_config
    width = number(vision, "hidden_size") if backbone is None else backbone.vision_size
    tower = Tower(
        width=width,
        inner=number(vision, "intermediate_size", default=round(getattr(vision, "mlp_ratio", 4) * width)),
        layers=number(vision, "num_hidden_layers", "depth") if backbone is None else len(backbone.blocks),
        heads=number(vision, "num_attention_heads", "num_heads"),
        merge=merged(config) if backbone is None else backbone.merge,
        gated=config.model_type == "qwen2_5_vl",
        # Towers of Qwen's line, which call their number of blocks so, have one projection.
        fused=hasattr(vision, "depth") if backbone is None else backbone.fused_qkv,
    )
    return Shape(config.model_type, read_language(config.text_config), tower, tied, parameters)


def read_language(text: Any) -> Language:
    """The numbers of a text config."""
    hidden, heads = number(text, "hidden_size"), number(text, "num_attention_heads")
    return Language(
        hidden=hidden,
        inner=number(text, "intermediate_size"),
        layers=number(text, "num_hidden_layers"),
        heads=heads,
        kv_heads=number(text, "num_key_value_heads", default=heads),
        head_dim=number(text, "head_dim", default=hidden // heads),
        vocabulary=number(text, "vocab_size"),
        query_norm=any(name in getattr(text, "model_type", "").lower() for name in ("qwen3", "gemma3", REMOTE)),
    )


def number(config: Any, *names: str, default: int | None = None) -> int:
    """The first of the fields that the config has, as a whole number above zero."""
    found = next((value for name in names if (value := getattr(config, name, None)) is not None), default)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        what = getattr(config, "model_type", "the base")
        raise ValueError(f"the config of {what} must have {' or '.join(names)} as a whole number, got {found!r}")
    return found


def merged(config: Any) -> int:
    """m: the projector makes one visual token of m x m patches."""
    if getattr(config, "downsample_ratio", None):
        return round(1 / config.downsample_ratio)
    return number(config, "scale_factor", default=number(config.vision_config, "spatial_merge_size", default=1))


def linear(wide: int, out: int, bias: bool = True) -> int:
    """Parameters of a linear layer."""
    return wide * out + bias * out


# The memory.


def memory_parameters(shape: Shape, config: VisMemConfig) -> dict[str, int]:
    """Trainable parameters by part, for a memory of that configuration on that base."""
    d, w, m = shape.language.hidden, shape.tower.width, shape.tower.merge
    tokens = 4 * d * (1 if shape.tied else 2)
    if config.content == "soft":
        return {
            "builder": 0,
            "short": config.short_length * d + 1,
            "long": config.long_length * d + 1,
            "tokens": tokens,
        }
    width = config.inner_width(shape.language.hidden)
    block = 2 * 2 * width + linear(width, 3 * width) + linear(width, width)
    block += linear(width, 4 * width) + linear(4 * width, width)
    builder = 2 * d + linear(d, width) + (3 + config.query_length) * width + config.builder_layers * block
    builder += 2 * width + linear(width, d)
    positions = config.short_length * m**2
    short = linear(d, w) + positions * w + tower_lora(shape.tower, config.lora_r)
    short += positions * config.query_length if config.memory_init == "pooled" else 0
    long = config.long_length * d + 1 + language_lora(shape.language, config.lora_r)
    return {"builder": builder, "short": short, "long": long, "tokens": tokens}


def tower_lora(tower: Tower, r: int) -> int:
    """LoRA on query and value of every block; a fused projection has one way down for both."""
    ways_down = 1 if tower.fused else 2
    return tower.layers * r * tower.width * (ways_down + 2)


def language_lora(language: Language, r: int) -> int:
    """LoRA on the query and value projections of every layer."""
    outputs = (language.heads + language.kv_heads) * language.head_dim
    return language.layers * r * (2 * language.hidden + outputs)


# A base whose code is not in transformers.


def remote_parameters(config: Any) -> int:
    """Parameters of LLaVA-OneVision-1.5: language model, output head, RICE's tower and its merger."""
    language, vision = read_language(config.text_config), config.vision_config
    w, f = number(vision, "hidden_size"), number(vision, "intermediate_size")
    # A patch embedding without bias, a class embedding with half a head of rotation, a norm before the blocks.
    start = 3 * number(vision, "patch_size") ** 2 * w + w + w // number(vision, "num_heads") // 2 + 2 * w
    block = 4 * w + linear(w, 3 * w) + linear(w, w) + linear(w, f) + linear(f, w)
    wide = w * merged(config) ** 2
    merger = 2 * w + linear(wide, wide) + linear(wide, language.hidden)
    return qwen3_parameters(language, says_tied(config)) + start + number(vision, "depth") * block + merger


def says_tied(config: Any) -> bool:
    """Whether a config ties the output head to the embedding table; either of its two levels may say so."""
    return bool(getattr(config, "tie_word_embeddings", getattr(config.text_config, "tie_word_embeddings", False)))


def qwen3_parameters(language: Language, tied: bool) -> int:
    """A dense Qwen3 with its embedding table and head: no biases, norms on query and key."""
    d, heads = language.hidden, language.heads * language.head_dim
    attention = 2 * d * heads + 2 * d * language.kv_heads * language.head_dim + 2 * language.head_dim
    layer = attention + 3 * d * language.inner + 2 * d
    return language.layers * layer + d + language.vocabulary * d * (1 if tied else 2)
