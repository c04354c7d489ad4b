"""Configs with the keys of LLaVA-OneVision-1.5's; see modeling_llavaonevision1_5.py."""

from __future__ import annotations

from transformers import PretrainedConfig, Qwen3Config


class RiceConfig(PretrainedConfig):
    """The vision tower's."""

    model_type = "rice_vit"
    base_config_key = "vision_config"

    depth: int = 24
    embed_dim: int = 1024
    hidden_size: int = 1024
    hidden_act: str = "gelu"
    intermediate_size: int = 4096
    num_heads: int = 16
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    text_hidden_size: int = 2560


class LLaVAOneVision1_5_TextConfig(Qwen3Config):
    """The language model's: Qwen3's."""

    model_type = "LLaVAOneVision1_5_text"
    base_config_key = "text_config"


class Llavaonevision1_5Config(PretrainedConfig):
    """The whole model's."""

    model_type = "llavaonevision1_5"
    sub_configs = {"vision_config": RiceConfig, "text_config": LLaVAOneVision1_5_TextConfig}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    text_config: dict | PretrainedConfig | None = None
    vision_config: dict | PretrainedConfig | None = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vocab_size: int = 151936
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name, kind in self.sub_configs.items():
            part = getattr(self, name) or {}
            setattr(self, name, kind(**part) if isinstance(part, dict) else part)
        super().__post_init__(**kwargs)
