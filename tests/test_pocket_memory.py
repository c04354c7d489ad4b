"""The pocket's memory: its practice examples, its training's resumption, its controls, and the shipped checkpoint."""

from __future__ import annotations

import json
from random import Random

import pytest
import torch

import vismem
from vismem.pocket import BASE_PATH, MEMORY_PATH
from vismem.pocket import measure as measuring
from vismem.pocket.batches import Encoder
from vismem.pocket.tasks import score
from vismem.pocket.warmup import WarmupRecipe, fresh_model, sample_example, train, training_batch, warmup

RECIPE = WarmupRecipe(steps=2, batch=3)


@pytest.fixture(scope="module")
def model():
    return fresh_model()


@pytest.fixture(scope="module")
def shipped():
    return vismem.VisMem.from_pretrained(MEMORY_PATH)


def examples(model, count=40):
    encoder, rng = Encoder(model.processor.tokenizer), Random(3)
    return encoder, [sample_example(rng, RECIPE, encoder) for _ in range(count)]


def test_practice_covers_both_kinds_and_places(model):
    _, found = examples(model, 200)
    plans = [tuple(kind for _, kind in example.plan) for example in found]
    assert {("short",), ("long",), ("short", "long")} <= set(plans)
    assert any(place > 0 for example in found for place, _ in example.plan)


def test_training_batch_puts_pairs_in_without_a_loss(model):
    encoder, found = examples(model, 12)
    batch = training_batch(model, found, encoder)
    tokens, start = model.tokens, batch["prompt_length"]
    for row, example in enumerate(found):
        ids, labels = batch["input_ids"][row, start:].tolist(), batch["labels"][row, start:].tolist()
        wanted = [tokens.invocation_ids[kind] for _, kind in example.plan]
        assert [t for t in ids if t in tokens.kind_of] == wanted
        assert all(label == -100 for t, label in zip(ids, labels, strict=True) if t in tokens.kind_of)
        words = [label for label in labels if label != -100]
        expected = [*encoder.text(example.conversation.answer_text), encoder.end]
        if example.replaces:
            expected = [t for i, t in enumerate(expected) if i + 1 not in {place for place, _ in example.plan}]
        assert words == expected
    plain = training_batch(model, found, encoder, invoke=False)
    assert not model.tokens.present(plain["input_ids"])


@pytest.mark.parametrize("name", ["memory", "soft", "lora"])
def test_training_moves_its_learner_only_and_resumes(name, tmp_path):
    model = fresh_model()
    base = {n: p.clone() for n, p in model.base.named_parameters()}
    memory = {n: p.clone() for n, p in model.memory.named_parameters()}
    module = train(model, name, RECIPE, tmp_path)
    assert all(torch.equal(p, base[n]) for n, p in model.base.named_parameters())
    moved = any(not torch.equal(p, memory[n]) for n, p in model.memory.named_parameters())
    assert moved == (name == "memory")
    state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    assert state["step"] == 2 and len(state["losses"]) == 2
    again = fresh_model()
    resumed = train(again, name, WarmupRecipe(steps=3, batch=3), tmp_path)
    state = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    assert state["step"] == 3 and len(state["losses"]) == 3
    assert resumed.state_dict().keys() == module.state_dict().keys()


def test_controls_change_the_memory_and_are_undone(model):
    asked = measuring.questions("x", 2, 0, task="digit", distance=2)
    inputs = measuring.prompts_of(asked, Encoder(model.processor.tokenizer))
    policy = vismem.invocation.Forced([(0, 0, "short"), (1, 0, "short")])

    def memories():
        out = model.generate(**inputs, invocation=policy, max_new_tokens=1, return_dict_in_generate=True)
        return torch.stack([row[0].memory for row in out.invocations])

    before = memories()
    with measuring.changed(model, "zero"):
        assert not memories().any()
    with measuring.changed(model, "another"):
        assert not torch.allclose(memories(), before, atol=1e-2)
    assert torch.equal(memories(), before)


def test_bad_arguments_are_one_line(tmp_path):
    for change, message in (({"steps": 0}, "steps"), ({"only": "x"}, "unknown learner")):
        with pytest.raises(ValueError, match=message):
            warmup(tmp_path, **change)
    with pytest.raises(ValueError, match="n must be"):
        measuring.measure(n=1, out_json=None)


def test_shipped_files_are_small_and_name_no_machine(shipped):
    files = [path for folder in (BASE_PATH, MEMORY_PATH) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    record = json.loads((MEMORY_PATH / "vismem_config.json").read_text())
    assert record["base_name"] == "pocket"
    for path in files:
        if path.suffix in (".json", ".md", ".jinja"):
            assert str(BASE_PATH.parent) not in path.read_text()
    assert {path.suffix for path in files} <= {".json", ".md", ".jinja", ".safetensors"}


def test_shipped_memory_brings_back_what_has_left_the_window(shipped):
    """Late questions on unseen handwriting: far above the base alone, and of no use when it is another image's."""
    asked = [q for t in ("colour", "digit") for q in measuring.questions("late", 16, 7, task=t, distance=5)]

    def accuracy(invoke, change=""):
        with measuring.changed(shipped, change):
            replies = measuring.answers(shipped, asked, invoke, 32)
        return sum(score(c.task, reply, c.answer) for c, reply in zip(asked, replies, strict=True)) / len(asked)

    vanilla, memory, other = accuracy(()), accuracy(("short",)), accuracy(("short",), "another")
    assert memory > vanilla + 0.35
    assert other < vanilla + 0.2
