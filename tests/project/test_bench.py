"""The benchmarks run, compare what can be compared, and report a known shape. No timing is asserted."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from benchmark_programs import benchmark
from tiny import equip


@pytest.fixture(scope="module")
def decode():
    return benchmark("decode")


@pytest.fixture(scope="module")
def train():
    return benchmark("train")


@pytest.fixture(scope="module")
def throughput():
    return benchmark("throughput")


@pytest.fixture(scope="module")
def gpu():
    return benchmark("gpu")


@pytest.fixture(scope="module")
def bases(decode):
    """The bases and their prompts, as the benchmarks import them."""
    return importlib.import_module("bases")


@pytest.fixture(scope="module")
def write(train):
    """The benchmarks' shared `write`; `common` can be imported once one of them is loaded."""
    return importlib.import_module("common").write


@pytest.fixture
def short_segments(decode, monkeypatch):
    monkeypatch.setattr(decode, "SEGMENT", 2)


@pytest.mark.parametrize(("family", "batch"), [("idefics3", 1), ("qwen2_5_vl", 2)])
def test_a_decoding_row_goes_from_runs_to_report(decode, bases, short_segments, family, batch):
    model = equip(family)
    decode.silence(model)
    inputs = bases.prompt(model.base, 4, batch)
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


def test_a_run_that_writes_other_tokens_is_refused(decode, bases, short_segments):
    model = equip("idefics3")
    decode.silence(model)
    inputs, generate = bases.prompt(model.base, 4, 1), model.generate
    model.generate = lambda **kwargs: generate(**kwargs) + 1
    with pytest.raises(RuntimeError, match="other tokens"):
        decode.one_round(model, inputs)


def test_the_cost_of_an_invocation_is_in_steps(decode, short_segments, monkeypatch):
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
@pytest.mark.parametrize("name", ["decode", "train", "throughput"])
def test_misuse_exits_with_2(name, wrong, request):
    with pytest.raises(SystemExit) as exit_:
        request.getfixturevalue(name).main(wrong)
    assert exit_.value.code == 2


def test_impossible_prompts_are_refused(bases):
    for family in ("idefics3", "qwen2_5_vl"):
        with pytest.raises(ValueError, match="visual tokens"):
            bases.prompt(equip(family).base, 7, 1)


# Training.

GROUP = 4


@pytest.fixture
def updates(train, family, monkeypatch):
    """A tiny model, its prompt, and one update of each kind on its trajectories."""
    monkeypatch.setattr(train, "NEW_TOKENS", 16)
    model = equip(family, max_invocations=2)
    model.base.generation_config.eos_token_id = None
    inputs = train.prompt(model.base, 4, 1)
    return train.Updates(
        model, inputs, train.roll(model, inputs, train.schedule(GROUP), GROUP), train.Stopwatch(model.device)
    ), inputs


def test_a_training_row_goes_from_runs_to_report(train, updates, write, tmp_path):
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
    write(tmp_path / "found.json", report)
    other = train.summarize(train.Case("pocket", 16, GROUP), "random", model, found, rounds, "vismem bench train")
    write(tmp_path / "found.json", train.report([other], "cpu", torch.float32))
    written = json.loads((tmp_path / "found.json").read_text())
    assert [row["model"] for row in written["rows"]] == ["pocket", "qwen-28m"]  # an earlier call's row stays
    assert len(written["budgets"]) == 8
    assert str(Path.home()) not in json.dumps(written)
    assert "qwen-28m*" in train.table([result])


def test_each_update_trains_its_own_part(train, updates, monkeypatch):
    """Each kind of update has gradients only in its own part, on the same answers."""
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


def test_a_wrong_replay_is_refused(train, updates):
    found, _ = updates
    for one in found.rollouts["stage1"]:
        one.log_probs.add_(0.1)
    with pytest.raises(RuntimeError, match="cannot be compared"):
        found.check()


# Throughput.


@pytest.fixture
def short_answers(throughput, monkeypatch):
    small = {
        "VISUAL_TOKENS": 4,
        "SHORTEST": 2,
        "LONGEST": 7,
        "FEWEST": 5,
        "LONG": 24,
        "MARKS": (8, 16, 24),
        "WINDOW": 4,
    }
    for name, value in {**small, "MEMORY_TOKENS": 2, "RATES": {"few": 0.5, "often": 2.0}}.items():
        monkeypatch.setattr(throughput, name, value)


def unending(throughput, family: str):
    model = equip(family)
    throughput.silence(model)
    model.base.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("family", ["idefics3", "qwen2_5_vl"])
def test_a_stream_goes_from_runs_to_report(throughput, short_answers, family):
    model, case = unending(throughput, family), throughput.Case("qwen-28m", "stream", 2)
    asked = {kind: throughput.requests(model.base, 2, kind == "text") for kind in ("images", "text")}
    images, text = asked["images"], asked["text"]
    images[0].tokens = text[0].tokens = 12  # ends after others that came later
    assert [one.tokens for one in images] == [one.tokens for one in text]
    assert not any(model.base.config.image_token_id in one.inputs["input_ids"] for one in text)
    attention = model.base.config.get_text_config()._attn_implementation
    rounds = [throughput.stream_round(model, asked, 2, turn, True) for turn in range(2)]
    assert model.base.config.get_text_config()._attn_implementation == attention
    for done in rounds:
        assert set(done) == {"generate", *throughput.PEERS, "continuous"}
        for name in ("generate", "off", "on", "continuous", "text"):
            assert [len(answer) for answer in done[name].answers] == [one.tokens for one in images]
        assert sum(done["often"].invocations.values()) > 0 == sum(done["on"].invocations.values())
        assert all(one.seconds > 0 for one in done.values())
    found = throughput.summarize_stream(case, "random", "command", images, rounds)
    total = sum(one.tokens for one in images)
    pairs = [images[start : start + 2] for start in range(0, len(images), 2)]
    assert found.useful == round(total / sum(len(pair) * max(one.tokens for one in pair) for pair in pairs), 3)
    assert found.tokens_per_second["off"] == pytest.approx(total / found.seconds["off"].median, rel=0.01)
    assert set(found.differing.values()) == {0}

    written = json.loads(json.dumps(throughput.report([found], "cpu", torch.float32, True)))
    assert written["rows"][0]["row"] == "qwen-28m/stream/2" and len(written["budgets"]) == 3
    assert str(Path.home()) not in json.dumps(written)
    assert "qwen-28m*" in throughput.table([found])
    rounds[0]["off"].answers[0][-1] += 1
    with pytest.raises(RuntimeError, match="'off' wrote 1 answers that differ from 'generate'"):
        throughput.summarize_stream(case, "random", "command", images, rounds)
    assert throughput.summarize_stream(case, "random", "command", images, rounds, exact=False).differing["off"] == 1


def test_long_answers_are_timed_and_their_growth_measured(throughput, short_answers):
    model, case = unending(throughput, "qwen2_5_vl"), throughput.Case("qwen-28m", "long", 2)
    inputs = throughput.prompt(model.base, 4, 2)
    rounds = [throughput.long_round(model, inputs, turn, True) for turn in range(2)]
    assert all(len(watch.ticks) == len(watch.resident) == 24 for done in rounds for watch in done.values())
    found = throughput.summarize_long(case, "random", "command", model, rounds)
    cache = model.base.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert real == found.column_bytes * 2 * inputs["input_ids"].shape[1]
    assert found.cache_mb == {"generate": round(16 * 2 * found.column_bytes / 1e6, 2), "off": 0, "on": 0}
    assert set(found.token_ms) == {"generate", "off", "on"} and set(found.ratio) == {"off", "on"}
    assert len(throughput.budgets([found])) == 3 and "24" in throughput.table([found])


def test_rows_of_earlier_calls_stay_in_the_file(throughput, write, tmp_path):
    path, sizes = tmp_path / "found.json", {"generate": 1.0, "off": 1.0, "on": 1.0}
    for batch in (1, 4, 4):
        row = throughput.Memory(f"pocket/memory/{batch}", "pocket", "random", batch, "command", sizes, 1.0, 8, 256)
        write(path, throughput.report([row], "cpu", torch.float32, False))
    assert [row["row"] for row in json.loads(path.read_text())["rows"]] == ["pocket/memory/4", "pocket/memory/1"]


# On a GPU, tried out on a processor.


@pytest.fixture
def short_runs(gpu, monkeypatch):
    small = {"BATCHES": (1, 2), "COSTLY": (1,), "TOKENS": 6, "LONGEST": 28, "ANSWERS": 4, "LENGTHS": (28,)}
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(importlib.import_module("decode"), "SEGMENT", 2)


TRY_OUT = ["--device", "cpu", "--model", "tiny", "--visual-tokens", "4", "--rounds", "1"]


def test_the_whole_gpu_benchmark_runs_on_a_cpu(gpu, short_runs, tmp_path, capsys):
    """Takes a while, since our step and transformers' are traced for compiling."""
    path = tmp_path / "found.json"
    assert gpu.main([*TRY_OUT, "--dtype", "float32", "--batches", "1", "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    rows = {row["row"]: row for row in found["rows"]}
    runs = [f"{whose} {cache}" for cache in ("dynamic", "static") for whose in ("generate", "off", "on")]
    kinds = ["cost dynamic", "cost static", "overhead 28"]
    assert set(rows) == {f"1/{name}" for name in (*runs, *kinds)}
    assert not found["missed"]
    assert all(row["same"] == 1 for row in rows.values() if "same" in row)
    assert set(rows["1/cost static"]["ms"]) == {"short_first", "short", "long"}
    assert set(rows["1/overhead 28"]["computed"]) == {"0.13", "0.26"}
    assert set(rows["1/overhead 28"]["measured"]) == {"0.25", "0.5"}
    assert len(found["budgets"]) == 2 + 4
    assert found["setting"]["bandwidth"]["measured"] > 0 and str(Path.home()) not in path.read_text()
    assert "on static" in capsys.readouterr().out


def test_rows_that_fail_or_run_out_of_time_are_listed(gpu, short_runs, monkeypatch, capsys):
    assert gpu.main([*TRY_OUT, "--batches", "1", "--minutes", "0"]) == 1
    told = capsys.readouterr()
    assert "not measured  1/generate dynamic: no time left" in told.out and "were not measured" in told.err
    bench = gpu.Bench(gpu.equip("tiny", "cpu", torch.float32), 4, 1, 1.0, 1.0, 600.0, lambda _: None)
    monkeypatch.setattr(bench.model, "generate", lambda **_: 1 / 0)
    monkeypatch.setattr(gpu, "COSTLY", ())
    bench.all([1])
    assert {"1/generate dynamic", "1/generate static"} == set(bench.rows)
    assert bench.missed["1/on static"] == "ZeroDivisionError: division by zero"


def test_sets_of_answers_invoke_at_their_rate(gpu, short_runs):
    """Whatever the batch, each kind is invoked in its number of answers, all different ones."""
    bench = gpu.Bench(gpu.equip("tiny", "cpu", torch.float32), 4, 1, 1.0, 1.0, 600.0, lambda _: None)
    generate, bench.static["ours"] = bench.model.generate, {}
    for batch in (1, 2):
        seen = []

        def watched(seen=seen, **kwargs):
            out = generate(return_dict_in_generate=True, **kwargs)
            seen += [[invocation.kind for invocation in row] for row in out.invocations]
            return out.sequences

        bench.model.generate = watched
        asked = [gpu.prompt(bench.model.base, 4, batch, seed) for seed in range(gpu.ANSWERS // batch)]
        assert bench.answers(asked, 28, gpu.schedule(2, 28)) > 0
        assert sorted(seen) == [["long"], ["long"], ["short"], ["short"]]
        seen.clear()
        bench.answers(asked, 28, None)
        assert seen == [[]] * 4


def test_a_gpu_is_needed(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    told = capsys.readouterr().err
    assert "needs a CUDA device" in told and told.count("\n") == 1
    assert gpu.main(["--device", "cpu", "--model", "nothing"]) == 1
    assert "there is no such config" in capsys.readouterr().err


def test_bytes_of_a_step_are_counted(gpu):
    """Every weight of the language side but the embedding table, and keys and values."""
    model = equip("qwen2_5_vl")
    text = sum(p.numel() for p in model.base.model.language_model.parameters())
    weights = text - model.base.get_input_embeddings().weight.numel() + model.base.lm_head.weight.numel()
    config = model.base.config.text_config
    column = 2 * config.num_hidden_layers * config.num_key_value_heads * 12 * 4
    assert gpu.step_bytes(model, 3, 5) == weights * 4 + 3 * 5 * column
