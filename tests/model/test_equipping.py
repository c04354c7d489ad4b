"""What may be equipped with memory, and what transformers' and peft's tools find in the model."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, pipeline

import vismem

LORA = {"r": 2, "target_modules": ["q_proj"]}


@pytest.fixture
def whole():
    return tiny.base_and_processor("idefics3")


def wrapped(base, way: str):
    """The base as it is after something else was done with it."""
    if way == "peft":
        return peft.get_peft_model(base, peft.LoraConfig(**LORA))
    if way == "prompts":
        return peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    if way == "adapter":
        base.add_adapter(peft.LoraConfig(**LORA))
    if way == "ia3":
        peft.inject_adapter_in_model(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]), base)
    if way == "compiled":
        return torch.compile(base)
    if way == "parallel":
        return torch.nn.DataParallel(base)
    return base


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("peft", "equip it with memory first, then add the adapter, or pass base.merge_and_unload()"),
        ("adapter", r"has a LoRA adapter already: equip it with memory first, .* merge_and_unload\(\)"),
        ("ia3", r"merge_and_unload\(\)"),
        ("prompts", r"merge_and_unload\(\)"),
        ("compiled", "pass base._orig_mod"),
        ("parallel", "wrapped in DataParallel: pass base.module"),
    ],
)
def test_wrapped_bases_are_refused_in_one_line(whole, way, message):
    base, processor = whole
    given = wrapped(base, way)
    with pytest.raises(ValueError, match=message) as caught:
        vismem.VisMem(given, processor)
    assert "\n" not in str(caught.value)
    assert "<ms_I>" not in processor.tokenizer.get_vocab()  # nothing was begun


def test_a_merged_adapter_is_part_of_the_base(whole):
    base, processor = whole
    merged = peft.get_peft_model(base, peft.LoraConfig(**LORA)).merge_and_unload()
    assert vismem.VisMem(merged, processor).base is merged


def test_anything_but_a_model_is_refused_in_one_line(whole):
    base, processor = whole
    text = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    for given, message in [
        ("some/base", r"not the name or path 'some/base': pass AutoModelForImageTextToText.from_pretrained"),
        (Path("/a/base"), "not the name or path '/a/base'"),
        (None, "must be a loaded model, not a NoneType"),
        (SimpleNamespace(model=base), "not a SimpleNamespace: pass its .model and its .processor"),
        (base.config, "must be a loaded model, not a Idefics3Config"),
        (text, "no backbone for model type 'llama'"),
        (base.model, "Idefics3Model, which has no output head: load it with AutoModelForImageTextToText"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            vismem.VisMem(given, processor)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has memory already"):
        vismem.VisMem(vismem.VisMem(base, processor), processor)


@pytest.mark.parametrize("part", ["tokenizer", "image_processor", "name", "none"])
def test_anything_but_a_processor_is_refused_in_one_line(whole, part):
    base, processor = whole
    given = {"tokenizer": processor.tokenizer, "image_processor": processor.image_processor, "name": "a/b"}.get(part)
    with pytest.raises(ValueError, match=r"whole processor \(AutoProcessor.from_pretrained\), not") as caught:
        vismem.VisMem(base, given)
    assert "\n" not in str(caught.value)


def test_a_pipeline_takes_the_model_without_warnings(whole, caplog):
    base, processor = whole
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        ask = pipeline("image-text-to-text", model=vismem.VisMem(base, processor), processor=processor)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "not supported" not in caplog.text
    assert ask(text=tiny.message("look", tiny.picture(0)), max_new_tokens=2)[0]["generated_text"]


def test_parameters_are_counted_as_transformers_and_peft_do(capsys):
    model = tiny.equip("qwen2_5_vl")
    base = model.base.num_parameters()
    own = sum(p.numel() for part in ("builder", "short", "long", "tokens") for p in model.parameters_of(part))
    assert model.num_parameters() == base + own and model.num_parameters(only_trainable=True) == own
    embeddings = sum(m.weight.numel() for m in model.base.modules() if isinstance(m, torch.nn.Embedding))
    assert model.num_parameters(exclude_embeddings=True) == base + own - embeddings
    assert model.get_nb_trainable_parameters() == (own, base + own)
    model.print_trainable_parameters()
    share = 100 * own / (base + own)
    said = f"trainable params: {own:,d} || all params: {base + own:,d} || trainable%: {share:.4f}\n"
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("memory_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", tiny.UNLIKE)
def test_logits_of_the_four_tokens_are_float32(family, memory_dtype):
    """A change of the rows too small for bfloat16 logits moves the logits of decoding and of training alike."""
    model = tiny.equip(family, torch.bfloat16)
    model.tokens.to(memory_dtype)
    states = 3 * torch.randn(5, model.backbone.hidden_size).bfloat16()
    base = model.backbone.head(states)
    found = model.tokens.extend(base, states)
    rows = [model.tokens.invocation, model.tokens.end]
    if not model.tokens.tied:
        rows = [model.tokens.invocation_output, model.tokens.end_output]
    four = states.float() @ torch.cat(rows).detach().float().T
    assert found.dtype == torch.float32 and torch.equal(found[:, model.tokens.ids], four)
    assert not torch.equal(four, four.bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.tokens.extend(base, states)[:, model.tokens.ids], four)
    others = [index for index in range(model.tokens.base_vocabulary) if index not in model.tokens.ids]
    assert torch.equal(found[:, others], base[:, others].float())

    batch = tiny.mixed_batch(model.processor)
    settings = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    for layout in ({}, {"cache_implementation": "static"}):
        out = model.generate(**batch, **settings, **layout)
        seen = torch.stack(out.logits)[..., model.tokens.ids]
        assert not torch.equal(seen, seen.bfloat16().float())
    rest = {n: t for n, t in batch.items() if n not in ("input_ids", "attention_mask")}
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"], prompt_length=batch["input_ids"].shape[1], **rest)
    seen = logits.logits[..., list(model.tokens.invocation_ids.values())]
    assert not torch.equal(seen, seen.bfloat16().float())
