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
from vismem.evaluation.answering import answer
from vismem.pocket import BASE_PATH, MEMORY_PATH, load_base, suites
from vismem.pocket.conversations import sample_conversation
from vismem.pocket.practice import DISTURBANCES, PocketRows, annotated, disturb
from vismem.pocket.tasks import score
from vismem.pocket.world import PROMOTION_RULES, render_array, sample_scene

MARK = re.compile(r"<m[sl]_I>")


@pytest.fixture(scope="module")
def model():
    base, processor = load_base()
    torch.manual_seed(0)
    return vismem.VisMem(base, processor, vismem.VisMemConfig.preset("pocket")).eval()


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


def test_a_mixture_is_chosen_by_name():
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
    for kind in DISTURBANCES:
        changed = disturb(picture, kind, Random(1))
        assert changed.shape == picture.shape and changed.dtype == np.uint8
        assert np.abs(changed.astype(int) - picture).mean() > 3
        assert np.array_equal(changed, disturb(picture, kind, Random(1)))
    with pytest.raises(ValueError, match="unknown disturbance"):
        disturb(picture, "fog", Random(0))


def test_shipped_files_are_small_and_name_no_machine(shipped):
    files = [path for folder in (BASE_PATH, MEMORY_PATH) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    record = json.loads((MEMORY_PATH / "vismem_config.json").read_text())
    assert record["base_name"] == "pocket"
    for path in files:
        if path.suffix in (".json", ".md", ".jinja"):
            assert str(BASE_PATH.parent) not in path.read_text()
    assert {path.suffix for path in files} <= {".json", ".md", ".jinja", ".safetensors"}


@pytest.mark.parametrize(("suite", "gain"), [("late", 0.5), ("rules", 0.3)])
def test_shipped_memory_supplies_what_the_base_lacks(shipped, suite, gain):
    """Unseen handwriting, the model deciding when: pictures that have left the window, rules that nobody stated."""
    asked = suites.rows(suite, 2, seed=7)

    def accuracy(invocation):
        found = answer(shipped, asked, ["pocket"], invocation=invocation, batch_size=40, max_new_tokens=40)
        return sum(record.score for record in found) / len(asked)

    assert accuracy("learned") > accuracy("off") + gain
