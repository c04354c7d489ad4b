"""Estimated peak memory of a base with a latent memory: for answering, and for each stage of training.

Every estimate is a sum of named parts in bytes. Attention is assumed to be fused (no score matrix is kept); the
allocator's overhead and the CUDA context are not counted. `docs/speed.md` explains the parts and compares them with
measurements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vismem.config import VisMemConfig
from vismem.training.stages import PLANS, STAGES

if TYPE_CHECKING:
    from vismem.backbones import Backbone

FLOAT32 = 4
TRAINED = {stage: PLANS[stage].trains for stage in STAGES}


@dataclass(frozen=True)
class Language:
    """A language model: d, the MLP's width, layers, heads, head size, vocabulary, and whether it norms queries."""

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
    """A vision tower: d_vision, the MLP's width, blocks, m, and whether its MLP is gated."""

    width: int
    inner: int
    layers: int
    merge: int
    gated: bool


@dataclass(frozen=True)
class Shape:
    """Everything about a base that the estimates depend on; the family is its `model_type`."""

    family: str
    language: Language
    tower: Tower
    parameters: int


def read_shape(backbone: Backbone) -> Shape:
    """The shape of a base, which may be on the meta device."""
    config, width = backbone.base.config, backbone.vision_size
    vision = config.vision_config
    tower = Tower(
        width=width,
        inner=getattr(vision, "intermediate_size", None) or round(getattr(vision, "mlp_ratio", 4) * width),
        layers=len(backbone.blocks),
        merge=backbone.merge,
        gated=backbone.model_type == "qwen2_5_vl",
    )
    parameters = sum(parameter.numel() for parameter in backbone.base.parameters())
    return Shape(backbone.model_type, read_language(config.get_text_config()), tower, parameters)


def read_language(text: Any) -> Language:
    """The shape of the language model that a text config describes."""
    heads, model_type = text.num_attention_heads, getattr(text, "model_type", "").lower()
    return Language(
        hidden=text.hidden_size,
        inner=text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocabulary=text.vocab_size,
        query_norm=any(name in model_type for name in ("qwen3", "gemma3", "llavaonevision1_5")),
    )


@dataclass(frozen=True)
class Load:
    """The workload of a device.

    Args:
        visual_tokens: image tokens in each prompt.
        prompt_tokens: text tokens in each prompt.
        answer_tokens: sampled tokens in each answer.
        invocations: in each answer, half of each kind.
        prompts: in a training batch; in the RL stages each has `group_size` answers.
        group_size: G.
        micro_batch: trajectories (rows, in the warm-up) in each forward and backward pass.
        bytes_each: bytes per number in the base's dtype.
    """

    visual_tokens: int = 1024
    prompt_tokens: int = 128
    answer_tokens: int = 256
    invocations: int = 4
    prompts: int = 8
    group_size: int = 16
    micro_batch: int = 4
    bytes_each: int = 2

    @property
    def prompt(self) -> int:
        """Positions of a prompt."""
        return self.visual_tokens + self.prompt_tokens

    def written(self, config: VisMemConfig) -> int:
        """Positions of an answer, its memories and their end tokens."""
        slots = self.invocations * (config.short_length + config.long_length + 2)
        return self.answer_tokens + -(-slots // 2)

    @property
    def segment(self) -> int:
        """Tokens between two invocations."""
        return -(-self.answer_tokens // (self.invocations + 1))


# The parts, in bytes; `each` is the size of one number.


def cache(shape: Shape, rows: int, columns: int, each: int) -> int:
    """Keys and values of the language model."""
    language = shape.language
    return rows * columns * language.layers * 2 * language.kv_heads * language.head_dim * each


def patches_of(shape: Shape, load: Load) -> int:
    """Patches of a prompt's images."""
    return load.visual_tokens * shape.tower.merge**2


def patch_cache(shape: Shape, images: int, load: Load) -> int:
    """The short-term former's keys and values of every patch."""
    return images * patches_of(shape, load) * shape.tower.layers * 2 * shape.tower.width * load.bytes_each


def gated_inner(tower: Tower) -> int:
    """Numbers that the MLP of a tower block holds for each patch."""
    return (3 if tower.gated else 2) * tower.inner


def reading(shape: Shape, rows: int, load: Load) -> int:
    """Peak of reading prompts without gradient: one layer of the language model or one block of the tower.

    Either holds three vectors of its width (input, states, norm) and those of its MLP; visual states are kept as well.
    """
    language, tower = shape.language, shape.tower
    words = load.prompt * 3 * (language.hidden + language.inner)
    patches = patches_of(shape, load) * (3 * tower.width + gated_inner(tower))
    return rows * (max(words, patches) + load.visual_tokens * language.hidden) * load.bytes_each


def building(shape: Shape, config: VisMemConfig, load: Load, widths: int) -> tuple[int, int]:
    """Numbers that the query builder holds for a query, with `widths` inner vectors per state, and its mask's."""
    states, hidden = load.visual_tokens + load.segment + config.query_length, shape.language.hidden
    return states * (2 * hidden + widths * config.inner_width(hidden)), states**2


def forming(shape: Shape, config: VisMemConfig, rows: int, load: Load, each: int) -> int:
    """Peak of forming memory without gradient for `rows` rows at once: the builder, or the short-term former.

    The former holds one block's keys and values of all patches, twice while they are concatenated.
    """
    numbers, mask = building(shape, config, load, 13)
    short = 2 * patches_of(shape, load) * 2 * shape.tower.width * load.bytes_each
    return rows * max(numbers * each + mask, short)


def logits(shape: Shape, tokens: int, load: Load) -> int:
    """Logits of `tokens` tokens, with the copies made while sampling or taking log-probabilities."""
    return tokens * shape.language.vocabulary * (2 * load.bytes_each + 2 * FLOAT32)


def layer_activations(shape: Shape, load: Load) -> int:
    """What one frozen layer of the language model keeps for the backward pass at each position.

    Frozen linear layers keep nothing. Norms keep their input in float32 (two of width d, plus query and key norms where
    the family has them), attention its query and output, the MLP three vectors of its width.
    """
    language = shape.language
    heads, keys = language.heads * language.head_dim, language.kv_heads * language.head_dim
    norms = 2 * language.hidden + (heads + keys if language.query_norm else 0)
    return norms * FLOAT32 + (2 * heads + 3 * language.inner) * load.bytes_each


def seen_keys(shape: Shape, load: Load) -> int:
    """Keys and values that attention keeps for one layer and position: one of each per query head."""
    return 2 * shape.language.heads * shape.language.head_dim * load.bytes_each


def replay(shape: Shape, config: VisMemConfig, rows: int, load: Load, *, checkpointing: bool) -> dict[str, int]:
    """Reading `rows` answers with gradient, after reading their prompts without.

    With checkpointing a layer keeps only its input, and one layer's activations come on top while they are recomputed.
    """
    language, answer = shape.language, load.written(config)
    layer = rows * (answer * layer_activations(shape, load) + (load.prompt + answer) * seen_keys(shape, load))
    inputs = rows * answer * language.hidden * load.bytes_each
    kept = language.layers * inputs + layer if checkpointing else language.layers * layer
    return {
        "prompt_cache": cache(shape, rows, load.prompt, load.bytes_each),
        "activations": kept + rows * answer * (load.prompt + answer) * load.bytes_each,
    }


def formation(shape: Shape, config: VisMemConfig, rows: int, images: int, load: Load, *, checkpointing: bool) -> int:
    """Forming all memories of `rows` answers with gradient.

    For `images` prompts, this keeps the tower's activations at every patch (with checkpointing the blocks' inputs and
    one block's activations) and its keys and values; for each short-term invocation, those of all patches again and its
    own; for each long-term one, the language model's activations over segment, query and memory; and for each
    invocation the builder's, in float32.
    """
    tower, each = shape.tower, load.bytes_each
    patches, each_kind = patches_of(shape, load), rows * load.invocations / 2
    block = 2 * tower.width * (FLOAT32 if tower.gated else each) + (6 * tower.width + gated_inner(tower)) * each
    seen = tower.layers * tower.width * each + block if checkpointing else tower.layers * block
    encode = images * patches * seen + patch_cache(shape, images, load)
    own = config.query_length + config.short_length * tower.merge**2
    short = tower.layers * ((patches + own) * 2 * tower.width * each + own * block)
    recalled = load.segment + config.query_length + config.long_length
    long = shape.language.layers * recalled * (layer_activations(shape, load) + seen_keys(shape, load))
    numbers, mask = building(shape, config, load, 21)
    return round(encode + each_kind * (short + long + 2 * (numbers * FLOAT32 + mask)))


# The estimates.


def inference(shape: Shape, parts: dict[str, int], config: VisMemConfig, load: Load, rows: int) -> dict[str, int]:
    """Answering `rows` prompts at once: weights, memory, both caches, and the peak of reading or forming."""
    each = load.bytes_each
    found = {
        "weights": shape.parameters * each,
        "memory": sum(parts.values()) * each,
        "cache": cache(shape, rows, load.prompt + load.written(config), each),
        "patch_cache": patch_cache(shape, rows, load),
        "activations": max(reading(shape, rows, load), forming(shape, config, rows, load, each))
        + logits(shape, rows, load),
    }
    return found | {"total": sum(found.values())}


def training(
    shape: Shape, parts: dict[str, int], config: VisMemConfig, load: Load, stage: str, *, checkpointing: bool
) -> dict[str, Any]:
    """One update of a stage on one device.

    The base stays in its dtype, memory and token rows in float32; trained parameters add AdamW's two moments and a
    copy of their initial values (the KL reference). Added to this is the larger of two peaks: the rollout of all
    `prompts * group_size` answers at once (none in the warm-up), and the update of a micro-batch with its gradients.
    """
    from vismem.reading.heads import MOST_LOGITS

    each, language = load.bytes_each, shape.language
    trained = sum(parts[part] for part in TRAINED[stage])
    kept = {
        "weights": shape.parameters * each,
        "memory": sum(parts.values()) * FLOAT32,
        "optimizer": 2 * trained * FLOAT32,
        "start": trained * FLOAT32,
    }
    update = {
        "gradients": trained * FLOAT32,
        **replay(shape, config, load.micro_batch, load, checkpointing=checkpointing),
    }
    images = load.micro_batch if stage == "warmup" else -(-load.micro_batch // load.group_size)
    if stage != "stage2":
        update["formation"] = formation(shape, config, load.micro_batch, images, load, checkpointing=checkpointing)
    at_once = max(1, MOST_LOGITS // language.vocabulary)
    update["logits"] = logits(shape, min(at_once, load.micro_batch * load.answer_tokens), load)
    rollout = {}
    if stage != "warmup":
        rows = load.prompts * load.group_size
        rollout = {
            "rollout_cache": cache(shape, rows, load.prompt + load.written(config), each),
            "patch_cache": patch_cache(shape, load.prompts, load),
            "recorded_states": rows * load.answer_tokens * language.hidden * each,
            "activations": max(reading(shape, load.prompts, load), forming(shape, config, load.prompts, load, FLOAT32))
            + logits(shape, rows, load),
        }
    peaks = {"rollout": sum(rollout.values()), "update": sum(update.values())}
    return kept | {
        "rollout": rollout,
        "update": update,
        "widest": max(peaks, key=peaks.__getitem__),
        "total": sum(kept.values()) + max(peaks.values()),
    }
