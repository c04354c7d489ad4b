"""Tiny real models: transformers' own classes built from a config with random weights, and their real processors."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

import vismem

TEXT = (
    "What is on the table? A red cup, a blue book and two green pens. Describe the image: it is bright; look again!\n"
)
TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer(special: list[str], image_mark: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with chat markers, an end and a pad token, and the family's image tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|end|>", "<|start|>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 4, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>", *special],
        padding_side="left",
    )
    found.chat_template = TEMPLATE.replace("IMAGE", image_mark)
    return found


def idefics3_processor() -> Idefics3Processor:
    marks = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    images = Idefics3ImageProcessor(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    words = tokenizer(marks, "<image>")
    return Idefics3Processor(images, words, image_seq_len=4, chat_template=words.chat_template)


def idefics3(seed: int = 0, sliding_window: int | None = None, tied: bool = True) -> Idefics3ForConditionalGeneration:
    """Two layers each side; images of 32 px in patches of 8, merged 2 x 2: four visual tokens."""
    words = idefics3_processor().tokenizer
    torch.manual_seed(seed)
    text = {
        "model_type": "mistral" if sliding_window else "llama",
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(words),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "pad_token_id": words.pad_token_id,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
    }
    if sliding_window:
        text["sliding_window"] = sliding_window
    config = Idefics3Config(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "initializer_range": 0.2,
        },
        text_config=text,
        scale_factor=2,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
        tie_word_embeddings=tied,
    )
    model = Idefics3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model


def qwen_processor() -> Qwen2_5_VLProcessor:
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    words = tokenizer(marks, "<|vision_start|><|image_pad|><|vision_end|>")
    sizes = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 64 * 64}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=words,
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=words.chat_template,
    )


def qwen(seed: int = 0, tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """Three vision blocks (windowed, full, windowed), M-RoPE, an untied head and a padded vocabulary."""
    words = qwen_processor().tokenizer
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "depth": 3,
            "num_heads": 4,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 48,
            "initializer_range": 0.2,
        },
        text_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": len(words) + 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]},
            "tie_word_embeddings": tied,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": words.eos_token_id,
        },
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=tied,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = words.eos_token_id
    model.generation_config.pad_token_id = words.pad_token_id
    return model


FAMILIES = {"idefics3": (idefics3, idefics3_processor), "qwen2_5_vl": (qwen, qwen_processor)}


def base_and_processor(family: str, dtype: torch.dtype = torch.float32, **changes):
    """A tiny base of that family with its processor."""
    build, processor = FAMILIES[family]
    return build(**changes).to(dtype), processor()


def equip(family: str, dtype: torch.dtype = torch.float32, seed: int = 1, base: dict | None = None, **config):
    """A tiny model with memory. Its memory is shaken a little, so that no part of it is zero."""
    model, processor = base_and_processor(family, dtype, **(base or {}))
    torch.manual_seed(seed)
    config = {"query_length": 4, "short_length": 4, "long_length": 4, "lora_r": 4, **config}
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
