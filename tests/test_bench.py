"""The decoding benchmark runs, compares what can be compared, and reports a known shape. No timing is asserted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import equip

FILE = Path(__file__).parents[1] / "benchmarks" / "decode.py"


@pytest.fixture(scope="module")
def decode():
    """`benchmarks/decode.py` as a module."""
    spec = importlib.util.spec_from_file_location("benchmark_decode", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def short_segments(decode, monkeypatch):
    monkeypatch.setattr(decode, "SEGMENT", 2)


@pytest.mark.parametrize(("family", "batch"), [("idefics3", 1), ("qwen2_5_vl", 2)])
def test_a_row_from_runs_to_report(decode, short_segments, family, batch):
    model = equip(family)
    decode.silence(model)
    inputs = decode.prompt(model.base, 4, batch)
    rounds = [decode.one_round(model, inputs, turn) for turn in range(2)]
    tokens, _ = decode.schedules(batch)
    names = {"base", "off", "on", "none", "forced"} | ({"scattered"} if batch > 1 else set())
    for runs in rounds:
        assert set(runs) == names
        assert all(len(run.ticks) == tokens + 2 for name, run in runs.items() if name != "scattered")
        assert all(run.ticks == sorted(run.ticks) for run in runs.values())
        added = runs["forced"].sequences.shape[1] - runs["none"].sequences.shape[1]
        assert added == 2 * len(decode.KINDS_IN_ORDER)  # an invocation and an end token each

    case = decode.Case("qwen-28m", 256, batch)
    result = decode.summarize(case, "random", model, rounds)
    assert set(result.token_ms) == {"base", "off", "on"}
    assert set(result.ratio) == {"off", "on", "first_off", "first_on"}
    assert set(result.invocation_steps) == {"short_first", "short", "long"} | (names & {"scattered"})
    assert [len(result.invocation_steps[kind].samples) for kind in ("short_first", "short", "long")] == [2, 4, 4]
    written = json.loads(json.dumps(decode.report([result], "cpu", torch.float32, 2)))
    assert written["rows"][0]["batch"] == batch
    assert len(written["budgets"]) == (5 if batch == 1 else 2)
    assert str(Path.home()) not in json.dumps(written)
    assert "qwen-28m*" in decode.table([result])


def test_a_run_that_writes_other_tokens_is_refused(decode, short_segments):
    model = equip("idefics3")
    decode.silence(model)
    inputs, generate = decode.prompt(model.base, 4, 1), model.generate
    model.generate = lambda **kwargs: generate(**kwargs) + 1
    with pytest.raises(RuntimeError, match="other tokens"):
        decode.one_round(model, inputs)


def test_times_become_steps(decode, short_segments, monkeypatch):
    monkeypatch.setattr(decode, "KINDS_IN_ORDER", ("short", "short", "long"))
    steady = [float(tick) for tick in range(10)]  # start, eight tokens, end
    extra = [0, 0, 0, 5, 5, 8, 8, 10, 10, 10]  # before tokens 2, 4 and 6
    runs = {
        "base": decode.Run(steady, None),
        "none": decode.Run(steady, None),
        "forced": decode.Run([tick + more for tick, more in zip(steady, extra, strict=True)], None),
    }
    assert runs["base"].per_token == 1
    assert decode.invocation_costs([runs], 1) == {"short_first": [5], "short": [3], "long": [2]}


@pytest.mark.parametrize("wrong", [["--only", "nothing"], ["--rounds", "0"], ["--threads", "0"]])
def test_misuse_is_two(decode, wrong):
    with pytest.raises(SystemExit) as exit_:
        decode.main(wrong)
    assert exit_.value.code == 2


def test_prompts_that_cannot_be_are_refused(decode):
    for family in ("idefics3", "qwen2_5_vl"):
        with pytest.raises(ValueError, match="visual tokens"):
            decode.prompt(equip(family).base, 7, 1)
