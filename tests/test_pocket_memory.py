"""The pocket's memory: its practice rows, how it is measured, and the shipped checkpoint."""

from __future__ import annotations

import json
import re
from collections import Counter
from random import Random

import numpy as np
import pytest
import torch

import vismem
from vismem.data import prompt_inputs
from vismem.pocket import BASE_PATH, MEMORY_PATH
from vismem.pocket import measure as measuring
from vismem.pocket.batches import Encoder
from vismem.pocket.conversations import sample_conversation
from vismem.pocket.practice import PocketRows, annotated, disturb
from vismem.pocket.tasks import score
from vismem.pocket.world import PROMOTION_RULES, render_array, sample_scene

MARK = re.compile(r"<m[sl]_I>")


@pytest.fixture(scope="module")
def model():
    return measuring.load(BASE_PATH, None)


@pytest.fixture(scope="module")
def shipped():
    return vismem.VisMem.from_pretrained(MEMORY_PATH)


@pytest.mark.parametrize("stage", ["warmup", "stage1", "stage2"])
def test_rows_are_the_same_for_a_seed_and_fit_the_processor(stage, model):
    rows = [PocketRows(stage, 3)[i] for i in range(4)]
    again = [PocketRows(stage, 3)[i] for i in (3, 0)]
    assert [r.completion for r in again] == [rows[3].completion, rows[0].completion]
    assert PocketRows(stage, 4)[0].prompt != rows[0].prompt
    inputs = prompt_inputs(model.processor, rows)
    assert len(inputs["input_ids"]) == 4 and inputs["pixel_values"].shape[0] == 4
    assert all(score(r.columns["task"], MARK.sub("", r.completion), r.answer) == 1 for r in rows)


def test_rows_are_of_all_kinds():
    rows = [PocketRows("warmup", 0)[i] for i in range(200)]
    tasks = Counter(row.columns["task"].partition("_")[0] for row in rows)
    assert tasks["promotion"] > 100 and tasks["describe"] > 0 and len(tasks) > 6
    late = [row for row in rows if row.columns["distance"] > 0]
    assert len(late) > 20 and all("<ms_I>" in row.completion for row in late)
    rules = [row for row in rows if row.columns["task"] == "promotion"]
    assert all("<ml_I>" in row.completion for row in rules)


def test_a_mixture_by_name():
    assert all(PocketRows("warmup", 0, mixture="late")[i].columns["distance"] > 0 for i in range(20))
    with pytest.raises(ValueError, match="unknown pocket mixture 'x'"):
        PocketRows("warmup", mixture="x")


def test_replies_name_a_look_at_the_first_colon_and_a_recall_after_the_label():
    for index in range(30):
        rng = Random(index)
        conversation = sample_conversation(rng, task="promotion", distance=3, rule="hidden-truth")
        marked = annotated(conversation, rng)
        label = next(name for name in PROMOTION_RULES if name in conversation.answer_text)
        assert re.match(rf"Row \d:?<ms_I> {label}:?<ml_I> {PROMOTION_RULES[label].words}\.", marked), marked
        assert marked.count("_I>") == 2
        stated = sample_conversation(rng, task="promotion", rule="stated")
        assert "<ml_I>" not in annotated(stated, rng)


def test_disturbed_pictures_differ_and_are_the_same_for_a_seed():
    picture = render_array(sample_scene(Random(0)))
    for kind in measuring.STRANGE:
        changed = disturb(picture, kind, Random(1))
        assert changed.shape == picture.shape and changed.dtype == np.uint8
        assert np.abs(changed.astype(int) - picture).mean() > 3
        assert np.array_equal(changed, disturb(picture, kind, Random(1)))
    with pytest.raises(ValueError, match="unknown disturbance"):
        disturb(picture, "fog", Random(0))


def test_controls_change_the_memory_and_are_undone(model):
    asked = measuring.questions("x", 2, 0, task="digit", distance=2)
    inputs = measuring.prompts_of(asked, Encoder(model.processor.tokenizer), torch.float32)
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


def test_measures_go_on_where_they_stopped(tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    options = {"out_json": out, "suites": ["rules"], "n": 2, "memory_path": None}
    first = measuring.measure(conditions=["vanilla"], **options)
    assert first["suites"]["rules"]["vanilla"]["n"] == 24
    calls = []
    inner = measuring.answered
    monkeypatch.setattr(measuring, "answered", lambda *given: calls.append(given[1:3]) or inner(*given))
    found = measuring.measure(conditions=["vanilla", "rule_stated"], **options)
    assert len(calls) == 1
    assert found["recovered"]["rules"]["rule_stated"] in (0.0, 1.0)
    assert json.loads(out.read_text()) == found


def test_bad_arguments_are_one_line():
    with pytest.raises(ValueError, match="n must be"):
        measuring.measure(n=1, out_json=None)
    with pytest.raises(ValueError, match="unknown suite"):
        measuring.measure(suites=["x"], out_json=None)


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
    """Late questions on unseen handwriting, the model deciding when: far above the base alone, and of no use when it
    is another image's."""
    asked = [q for t in ("colour", "digit") for q in measuring.questions("late", 16, 7, task=t, distance=5)]

    def accuracy(invocation, change=""):
        with measuring.changed(shipped, change):
            replies, _, _ = measuring.answers(shipped, asked, vismem.decoding.invocation.policy_of(invocation), 32)
        return sum(score(c.task, reply, c.answer) for c, reply in zip(asked, replies, strict=True)) / len(asked)

    vanilla, memory, other = accuracy("off"), accuracy("learned"), accuracy("learned", "another")
    assert memory > vanilla + 0.5
    assert other < vanilla + 0.25


def test_shipped_memory_recalls_rules_that_the_base_never_got(shipped):
    asked = measuring.questions("rules", 32, 7, task="promotion", rule="hidden-truth")

    def accuracy(invocation):
        replies, _, _ = measuring.answers(shipped, asked, vismem.decoding.invocation.policy_of(invocation), 32)
        return sum(score(c.task, reply, c.answer) for c, reply in zip(asked, replies, strict=True)) / len(asked)

    assert accuracy("learned") > accuracy("off") + 0.3
