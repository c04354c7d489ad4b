"""Bases in 4 and 8 bits, and bases with layers on disk: memory works on them and does not change them."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import vismem
from vismem.decoding.policies import Forced

SCHEDULE = Forced([(0, 0, "short"), (0, 7, "long"), (1, 3, "long"), (1, 3, "short"), (2, 5, "short")])
SIZES = {"query_length": 4, "short_length": 4, "long_length": 4, "lora_r": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved base whose widths are multiples of 64, the block that 4-bit weights are scaled in."""
    shape = tiny.FAMILIES["qwen2_5_vl"].build().config.to_dict()
    shape["text_config"] |= {"hidden_size": 128, "intermediate_size": 256}
    shape["text_config"]["rope_parameters"]["mrope_section"] = [4, 6, 6]
    shape["vision_config"] |= {"hidden_size": 64, "intermediate_size": 128, "out_hidden_size": 128}
    torch.manual_seed(0)
    base = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**shape))
    words = tiny.FAMILIES["qwen2_5_vl"].processor().tokenizer
    base.generation_config.eos_token_id, base.generation_config.pad_token_id = words.eos_token_id, words.pad_token_id
    found = tmp_path_factory.mktemp("base")
    base.save_pretrained(found)
    return found


def quantised(folder, kind: str):
    """The base in that format."""
    if kind == "torchao-int8":
        ao = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        config, dtype = TorchAoConfig(ao.Int8WeightOnlyConfig()), torch.float32
    else:
        pytest.importorskip("bitsandbytes")
        from transformers import BitsAndBytesConfig

        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        config = BitsAndBytesConfig(**(four if kind == "bnb-4bit" else {"load_in_8bit": True}))
        dtype = torch.bfloat16
    return AutoModelForImageTextToText.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map="cpu"
    )


@pytest.mark.parametrize("kind", ["torchao-int8", "bnb-8bit", "bnb-4bit"])
def test_quantised_bases_decode_and_train(folder, kind, tmp_path):
    base, processor = quantised(folder, kind), tiny.FAMILIES["qwen2_5_vl"].processor()
    batch = tiny.mixed_batch(processor)
    writing = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}  # no row ends before its schedule
    plain = base.generate(**batch, **writing)
    model = vismem.VisMem(base, processor, vismem.VisMemConfig(**SIZES)).eval()
    settings = {**writing, "return_dict_in_generate": True}
    out = model.generate(**batch, invocation=SCHEDULE, **settings)
    memories = [found.memory for row in out.invocations for found in row]
    assert len(memories) == 5 and all(memory.isfinite().all() for memory in memories)
    assert torch.equal(model.generate(**batch, invocation="off", **settings).sequences, plain)
    assert torch.equal(base.generate(**batch, **writing), plain)
    slots = model.generate(**batch, invocation=SCHEDULE, cache_implementation="static", **settings)
    if kind == "torchao-int8":  # in float32; 16 bits leave room for another choice
        assert torch.equal(slots.sequences, out.sequences)
    model.save_pretrained(tmp_path)
    again = vismem.VisMem.from_pretrained(tmp_path, base=base, processor=processor)
    assert torch.equal(again.generate(**batch, invocation=SCHEDULE, **settings).sequences, out.sequences)
    if kind == "bnb-4bit":
        return  # after generating on a CPU, bitsandbytes' 4-bit layers pass no gradient on
    labels = out.sequences.clone()
    labels[:, : batch["input_ids"].shape[1]] = -100
    rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
    model.train()(out.sequences, labels=labels, **rest, prompt_length=batch["input_ids"].shape[1]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.memory.parameters())
    assert all(p.grad is None for p in base.parameters())


TEXT = "model.language_model"
ON_CPU = {"model.visual": "cpu", f"{TEXT}.embed_tokens": "cpu", f"{TEXT}.norm": "cpu", f"{TEXT}.rotary_emb": "cpu"}


def test_layers_on_disk_give_the_same_answers(folder, tmp_path):
    """Layers that are read from disk when they run: the same answers, in either cache."""
    batch = tiny.mixed_batch(processor := tiny.FAMILIES["qwen2_5_vl"].processor())
    whole = vismem.VisMem(AutoModelForImageTextToText.from_pretrained(folder), processor, vismem.VisMemConfig(**SIZES))
    whole.eval().save_pretrained(tmp_path / "memory")
    places = {**ON_CPU, f"{TEXT}.layers": "disk", "lm_head": "cpu"}
    model = vismem.VisMem.from_pretrained(
        tmp_path / "memory", processor=processor, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    assert any(weight.is_meta for weight in model.base.parameters())
    for settings in ({}, {"cache_implementation": "static"}):
        settings |= {"max_new_tokens": 12, "do_sample": False, "invocation": SCHEDULE}
        assert torch.equal(model.generate(**batch, **settings), whole.generate(**batch, **settings))


def test_a_base_with_a_device_map_works(folder):
    base = AutoModelForImageTextToText.from_pretrained(folder, device_map="auto")
    processor = tiny.FAMILIES["qwen2_5_vl"].processor()
    model = vismem.VisMem(base, processor, vismem.VisMemConfig(**SIZES)).eval()
    out = model.generate(
        **tiny.mixed_batch(processor), max_new_tokens=8, invocation=SCHEDULE, return_dict_in_generate=True
    )
    assert sum(map(len, out.invocations)) == 5


@pytest.mark.parametrize("away", ["model.visual", f"{TEXT}.embed_tokens"])
def test_what_memory_reads_directly_must_not_be_offloaded(folder, tmp_path, away):
    places = {**ON_CPU, f"{TEXT}.layers": "cpu", "lm_head": "cpu", away: "disk"}
    base = AutoModelForImageTextToText.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    with pytest.raises(ValueError, match=r"offloaded parts of the base: .*device_map") as caught:
        vismem.VisMem(base, tiny.FAMILIES["qwen2_5_vl"].processor())
    assert "\n" not in str(caught.value)
