"""Soft prompts in place of memories: constants that depend on nothing, through every stage."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from peft.tuners.lora import LoraLayer
from training_runs import STAGES, Gradients, distance, quick, settings, train, weights

import vismem
from vismem.backbones import Backbone
from vismem.decoding.policies import Forced, Random
from vismem.memory.soft import SoftMemory
from vismem.training.replay import collate
from vismem.training.rollout import sampling, write

__all__ = ["quick"]  # a fixture


def soft(family: str = "idefics3", **changes):
    return tiny.equip(family, content="soft", **{"lora_dropout": 0.0, "min_gap": 1, **changes})


def memories(model, *pictures: int) -> list[torch.Tensor]:
    """Forced memories of a row about these pictures, short and long."""
    batch = tiny.prompts(model.processor, [tiny.message("look again!", *map(tiny.picture, pictures))])
    schedule = Forced([(0, 0, "short"), (0, 3, "long")])
    out = model.generate(**batch, max_new_tokens=6, invocation=schedule, return_dict_in_generate=True, record=True)
    return [invocation.memory for invocation in out.invocations[0]]


def test_soft_memory_depends_on_nothing_and_looks_at_nothing(family, monkeypatch):
    model, formed = soft(family), tiny.equip(family, min_gap=1)
    assert all(
        not torch.allclose(*pair, atol=1e-4) for pair in zip(memories(formed, 0), memories(formed, 1), strict=True)
    )

    def refuse(*given):
        raise AssertionError("an image was encoded")

    monkeypatch.setattr(Backbone, "encode", refuse)
    first, second = memories(model, 0), memories(model, 1, 2)
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert [len(memory) for memory in first] == [model.memory_config.short_length, model.memory_config.long_length]
    batch = tiny.mixed_batch(model.processor)
    seeds = list(range(6))
    written = write(model, batch, Random(0.7, "anywhere", seed=seeds), sampling(model, 16, 0.9), seeds, 2)
    inputs = collate(batch, written, model.processor.tokenizer.pad_token_id, 0.9, formed=False)
    with torch.no_grad():
        replayed = model(**inputs).log_probs
    start, kinds = inputs["prompt_length"], set()
    for row, rollout in enumerate(written):
        there = rollout.sampled
        kinds |= {invocation.kind for invocation in rollout.invocations}
        assert torch.allclose(replayed[row, start:][: len(there)][there], rollout.log_probs[there], atol=1e-4)
    assert kinds == {"short", "long"}


def test_soft_memory_starts_as_words_of_the_base():
    base, processor = tiny.base_and_processor("idefics3")
    model = vismem.VisMem(base, processor, vismem.VisMemConfig(content="soft"))
    table = model.backbone.embeddings.weight
    for kind in ("short", "long"):
        vectors = model.memory.form(kind, [None]).vectors[0]
        assert len(vectors) == model.memory_config.length(kind)
        assert all(float((table - vector.detach()).abs().max(1).values.min()) < 1e-5 for vector in vectors)
        before = vectors.detach().clone()
        with torch.no_grad():
            getattr(model.memory, kind).log_gain.fill_(1.0)
        assert torch.allclose(model.memory.form(kind, [None]).vectors[0], before * math.e, rtol=1e-4)
    assert model.parameters_of("builder") == [] and len(model.parameters_of("short")) == 2
    assert not any(isinstance(module, LoraLayer) for module in model.modules())


def test_soft_memory_counts_and_round_trips(tmp_path):
    model = soft()
    counted = {p: sum(t.numel() for t in model.parameters_of(p)) for p in ("builder", "short", "long", "tokens")}
    d, config = model.backbone.hidden_size, model.memory_config
    expected = {"builder": 0, "short": config.short_length * d + 1, "long": config.long_length * d + 1}
    assert counted == expected | {"tokens": 4 * d * (1 if model.tokens.tied else 2)}
    model.save_pretrained(tmp_path)
    assert "soft prompts" in (tmp_path / "README.md").read_text()
    base, processor = tiny.base_and_processor("idefics3")
    again = vismem.VisMem.from_pretrained(tmp_path, base=base, processor=processor)
    assert isinstance(again.memory, SoftMemory)
    assert distance(weights(again), weights(model)) == 0
    values = vismem.VisMemConfig().to_dict()
    del values["content"]  # as older checkpoints have it
    assert vismem.VisMemConfig.from_dict(values).content == "formed"


@pytest.mark.parametrize("stage", STAGES)
def test_soft_memory_goes_through_every_stage(stage, tmp_path):
    model, grads = soft(), Gradients()
    with torch.no_grad():  # it invokes often by itself
        for parameter in model.tokens.parameters():
            parameter.mul_(5)
    before, base = weights(model), {name: t.clone() for name, t in model.base.state_dict().items()}
    train(model, settings(tmp_path, stage, max_steps=2, group_size=4, max_new_tokens=16), callbacks=[grads])
    own = {name for name in before if name.startswith("tokens." if stage == "stage2" else "memory.")}
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    assert moved == own and len(own) == (2 if stage == "stage2" else 4)
    assert all(found[name].any() for found in grads.found[-1:] for name in own)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.base.state_dict().items())
