"""A stand-in for the code that LLaVA-OneVision-1.5's repositories bring along, written anew for transformers 5.

Classes, modules and parameters are named as there, so that what fits this fits them; the language model, there a copy
of Qwen3's, is transformers' own. As there, `get_image_features` gives a tensor, `forward` takes no encoded images, and
positions have one axis and are left to the language model.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel, Qwen3Model
from transformers.activations import ACT2FN
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from .configuration_llavaonevision1_5 import LLaVAOneVision1_5_TextConfig, Llavaonevision1_5Config, RiceConfig

CACHE = "cache" if "cache" in inspect.signature(Qwen3Model.forward).parameters else "past_key_values"  # by version


class RiceRotaryEmbedding(nn.Module):
    """Angles [length, dim / 2] of positions on one axis."""

    def __init__(self, dim: int, theta: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.theta = dim, theta
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        return self.theta ** (-torch.arange(0, self.dim, 2).float() / self.dim)

    def forward(self, seqlen: int) -> Tensor:
        return torch.arange(seqlen, device=self.inv_freq.device)[:, None] * self.inv_freq


class RicePatchEmbed(nn.Module):
    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.shape = (-1, config.in_channels, size, size)
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, kernel_size=size, stride=size, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.proj(pixels.to(self.proj.weight.dtype).view(self.shape)).flatten(1)


class RicePatchMerger(nn.Module):
    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.width = config.hidden_size * config.spatial_merge_size**2
        self.ln_q = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(self.width, self.width), nn.GELU(), nn.Linear(self.width, config.text_hidden_size)
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(self.ln_q(hidden).view(-1, self.width))


class RiceMlp(nn.Module):
    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(hidden)))


class RiceSdpaAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, hidden: Tensor, lengths: list[int], position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [t, heads, head_dim]
        query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        images = zip(*(states.transpose(0, 1).split(lengths, dim=1) for states in (query, key, value)), strict=True)
        attended = torch.cat([F.scaled_dot_product_attention(*(s[None] for s in image))[0] for image in images], dim=1)
        return self.proj(attended.transpose(0, 1).flatten(1))


class RiceBlock(nn.Module):
    def __init__(self, config: RiceConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn = RiceSdpaAttention(config.hidden_size, config.num_heads)
        self.mlp = RiceMlp(config)

    def forward(self, hidden: Tensor, lengths: list[int], position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        hidden = hidden + self.attn(self.norm1(hidden), lengths, position_embeddings)
        return hidden + self.mlp(self.norm2(hidden))


class LLaVAOneVision1_5_PreTrainedModel(PreTrainedModel):
    config_class = Llavaonevision1_5Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    input_modalities = ("image", "text")
    _no_split_modules = ["Qwen3DecoderLayer", "RiceBlock"]  # noqa: RUF012
    _skip_keys_device_placement = "past_key_values"
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RiceRotaryEmbedding):  # no checkpoint holds it, so transformers 5 asks for it here
            module.inv_freq.copy_(module.frequencies())
        elif isinstance(module, RiceTransformerPretrainedModel):
            for parameter in (module.class_embedding, module.class_pos_emb):
                nn.init.normal_(parameter)


class RiceTransformerPretrainedModel(LLaVAOneVision1_5_PreTrainedModel):
    config_class = RiceConfig

    def __init__(self, config: RiceConfig) -> None:
        super().__init__(config)
        self.spatial_merge_size, self.patch_size = config.spatial_merge_size, config.patch_size
        angles = config.hidden_size // config.num_heads // 2
        self.patch_embed = RicePatchEmbed(config)
        self.rotary_pos_emb = RiceRotaryEmbedding(angles)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.class_pos_emb = nn.Parameter(torch.empty(1, angles))
        self.pre_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(RiceBlock(config) for _ in range(config.depth))
        self.merger = RicePatchMerger(config)
        self.post_init()

    def rot_pos_emb(self, height: int, width: int) -> Tensor:
        """Angles [height * width, head_dim / 2] of an image's patches, merge block by merge block."""
        side = self.spatial_merge_size
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        places = torch.stack([rows, columns], dim=-1).view(height // side, side, width // side, side, 2)
        return self.rotary_pos_emb(max(height, width))[places.transpose(1, 2).reshape(-1, 2)].flatten(1)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor) -> Tensor:
        grids = [(height, width) for time, height, width in grid_thw.tolist() for _ in range(time)]
        patches = self.patch_embed(hidden_states).split([height * width for height, width in grids])
        hidden = torch.cat([torch.cat([self.class_embedding[None], image]) for image in patches])
        angles = [torch.cat([self.class_pos_emb, self.rot_pos_emb(*grid).to(self.class_pos_emb)]) for grid in grids]
        both = torch.cat(angles).repeat(1, 2)
        lengths = [1 + len(image) for image in patches]
        hidden = self.pre_layernorm(hidden)
        for block in self.blocks:
            hidden = block(hidden, lengths, (both.cos(), both.sin()))
        return self.merger(torch.cat([image[1:] for image in hidden.split(lengths)]))


class LLaVAOneVision1_5_TextModel(Qwen3Model):
    config_class = LLaVAOneVision1_5_TextConfig


class LLaVAOneVision1_5_Model(LLaVAOneVision1_5_PreTrainedModel):
    def __init__(self, config: Llavaonevision1_5Config) -> None:
        super().__init__(config)
        self.visual = RiceTransformerPretrainedModel._from_config(config.vision_config)
        self.language_model = LLaVAOneVision1_5_TextModel._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.language_model.embed_tokens = value

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor | None = None) -> Tensor:
        return self.visual(pixel_values, grid_thw=image_grid_thw)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        cache=None,  # the name of today
    ):
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                visual = self.get_image_features(pixel_values, image_grid_thw).to(inputs_embeds)
                places = (input_ids == self.config.image_token_id)[..., None]
                inputs_embeds = inputs_embeds.masked_scatter(places, visual)
        return self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: past_key_values if cache is None else cache},
        )


class LLaVAOneVision1_5_ForConditionalGeneration(LLaVAOneVision1_5_PreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Llavaonevision1_5Config) -> None:
        super().__init__(config)
        self.model = LLaVAOneVision1_5_Model(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,  # comes from the processor of today; positions of one axis need none
        logits_to_keep: int = 0,
        cache=None,
        **_,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            pixel_values,
            image_grid_thw,
            cache,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        return CausalLMOutputWithPast(logits=logits, **{CACHE: outputs[CACHE]})

    def prepare_inputs_for_generation(self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs) -> dict:
        inputs = super().prepare_inputs_for_generation(input_ids, is_first_iteration=is_first_iteration, **kwargs)
        inputs["position_ids"] = None
        if not is_first_iteration:
            inputs["pixel_values"] = None
        return inputs

    def _expand_inputs_for_generation(self, expand_size: int = 1, input_ids: Tensor | None = None, **kwargs) -> tuple:
        vision = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_grid_thw")}
        pixels, grids = vision.values()
        if pixels is not None and expand_size > 1:  # each row's images again for each of its copies
            counts = (input_ids == self.config.vision_start_token_id).sum(1).tolist()
            of_rows = grids.split(counts)
            patches = pixels.split([int(row.prod(1).sum()) for row in of_rows])
            vision = {
                "pixel_values": torch.cat([row for row in patches for _ in range(expand_size)]),
                "image_grid_thw": torch.cat([row for row in of_rows for _ in range(expand_size)]),
            }
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, input_ids=input_ids, **kwargs)
        return input_ids, {**kwargs, **vision}
