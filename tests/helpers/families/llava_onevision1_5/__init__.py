"""LLaVA-OneVision-1.5: a RICE tower with a class token, code that comes with the model, positions of one axis."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PreTrainedModel,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from families.words import tokenizer

FOLDER = Path(__file__).parent / "remote"
LOADING = {"trust_remote_code": True}  # what `from_pretrained` must be told


def processor() -> Qwen2_5_VLProcessor:
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer(marks, "<|vision_start|><|image_pad|><|vision_end|>")
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 1, "min_pixels": 64, "max_pixels": 64 * 64}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=words.chat_template,
    )


def build(seed: int = 0, tied: bool = False) -> PreTrainedModel:
    """Two layers of text and three of vision, by the code in `remote/`; images in patches of 4 px, merged 2 x 2."""
    words = processor().tokenizer
    config = AutoConfig.from_pretrained(FOLDER, **LOADING)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    config.vocab_size = config.text_config.vocab_size = len(words) + 2
    config.text_config.eos_token_id, config.text_config.bos_token_id = words.eos_token_id, None
    config.image_token_id = words.convert_tokens_to_ids("<|image_pad|>")
    config.video_token_id = words.convert_tokens_to_ids("<|video_pad|>")
    config.vision_start_token_id = words.convert_tokens_to_ids("<|vision_start|>")
    torch.manual_seed(seed + 1)  # seed 0's head hardly ever writes a token copied from a delimiter's row
    model = AutoModelForImageTextToText.from_config(config, **LOADING).eval()
    with torch.no_grad():  # transformers starts biases at zero and norms at one
        for parameter in model.model.visual.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model
