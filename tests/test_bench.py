"""The benchmarks run, compare what can be compared, and report a known shape. No timing is asserted."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import equip

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str):
    """`benchmarks/NAME.py` as a module; it may import its neighbours."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def decode():
    return benchmark("decode")


@pytest.fixture(scope="module")
def train():
    return benchmark("train")


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
@pytest.mark.parametrize("name", ["decode", "train"])
def test_misuse_is_two(name, wrong, request):
    with pytest.raises(SystemExit) as exit_:
        request.getfixturevalue(name).main(wrong)
    assert exit_.value.code == 2


def test_prompts_that_cannot_be_are_refused(decode):
    for family in ("idefics3", "qwen2_5_vl"):
        with pytest.raises(ValueError, match="visual tokens"):
            decode.prompt(equip(family).base, 7, 1)


# Training.

GROUP = 4


@pytest.fixture
def updates(train, family, monkeypatch):
    """A tiny model, its prompt, and one update of each sort on its trajectories."""
    monkeypatch.setattr(train, "NEW_TOKENS", 16)
    model = equip(family, max_invocations=2)
    model.base.generation_config.eos_token_id = None
    inputs = train.prompt(model.base, 4, 1)
    return train.Updates(
        model, inputs, train.roll(model, inputs, train.schedule(GROUP), GROUP), train.Stopwatch(model.device)
    ), inputs


def test_a_training_row_from_runs_to_report(train, updates, tmp_path):
    found, inputs = updates
    model = found.model
    assert all(len(one.invocations) == train.INVOCATIONS for one in found.rollouts["stage1"])
    found.check()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounds = [train.one_round(model, inputs, found, turn) for turn in range(2)]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for one in rounds:
        assert set(one.update) == {"plain", "lora", "stage1", "stage2"}
        assert set(one.rollout) == set(one.reading) == {"generate", "stage1", "stage2", "baseline"}
        assert all(0 < one.reading[name] < one.rollout[name] for name in one.rollout)
        assert one.invocations["stage1"] == train.INVOCATIONS
        for stage, parts in one.parts.items():
            named = sum(parts.get(name, 0) for name in train.PARTS)
            assert 0.5 * one.update[stage] < named <= one.update[stage]
        assert "formation" in one.parts["stage1"] and "formation" not in one.parts["stage2"]

    case = train.Case("qwen-28m", 256, GROUP)
    result = train.summarize(case, "random", model, found, rounds, "vismem bench train")
    assert set(result.update_ratio) == {"stage1", "stage2", "stage1_lora", "stage2_lora"}
    assert len(result.rollout_ratio) == 6 and len(result.update_ratio["stage1"].samples) == 2
    report = train.report([result], "cpu", torch.float32)
    train.write(tmp_path / "found.json", report)
    other = train.summarize(train.Case("pocket", 16, GROUP), "random", model, found, rounds, "vismem bench train")
    train.write(tmp_path / "found.json", train.report([other], "cpu", torch.float32))
    written = json.loads((tmp_path / "found.json").read_text())
    assert [row["model"] for row in written["rows"]] == ["pocket", "qwen-28m"]  # an earlier call's row stays
    assert len(written["budgets"]) == 8
    assert str(Path.home()) not in json.dumps(written)
    assert "qwen-28m*" in train.table([result])


def test_updates_train_what_they_say(train, updates, monkeypatch):
    """Each sort of update has gradients in its own part, on the same answers."""
    found, _ = updates
    model, seen = found.model, {}

    def moved(name: str) -> set[str]:
        parts = {"base": model.base, "memory": model.memory, "tokens": model.tokens, "lora": found.lora}
        return {part for part, m in parts.items() if any(p.grad is not None and p.grad.any() for p in m.parameters())}

    trainable = train.Updates.trainable
    for name in ("plain", "lora", "stage1", "stage2"):
        with trainable(found, name):
            if name == "lora":
                with found.lora.on():
                    train.plain(model.base, found.rows)
            elif name == "plain":
                train.plain(model.base, found.rows)
            else:
                found.ours(name)
            seen[name] = moved(name)
    assert seen == {"plain": {"base"}, "lora": {"lora"}, "stage1": {"memory"}, "stage2": {"tokens"}}
    words = found.rows["input_ids"][:, found.batches["stage1"]["prompt_length"] :]
    assert not torch.isin(words, torch.tensor([*model.tokens.ids, model.base.config.image_token_id])).any()
    assert words.shape[1] == train.NEW_TOKENS + 2 * train.INVOCATIONS


def test_a_replay_that_is_none_is_refused(train, updates):
    found, _ = updates
    for one in found.rollouts["stage1"]:
        one.log_probs.add_(0.1)
    with pytest.raises(RuntimeError, match="cannot be compared"):
        found.check()
