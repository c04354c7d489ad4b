"""Training on tiny real models: what each stage trains, what it leaves alone, and that a run can be resumed."""

from __future__ import annotations

import json
import math
import os
import sys
import types

import pytest
import tiny
import torch
from training_runs import (
    PARTS,
    STAGES,
    Gradients,
    command,
    distance,
    equip,
    folder,
    low,
    quick,
    rows,
    settings,
    train,
    weights,
    whole_and_resumed,
)
from transformers import TrainerState

from vismem.data import BadDataError, Row, prompt_inputs
from vismem.decoding.policies import Random
from vismem.memory import Memory
from vismem.training import experience, grpo, metrics, run
from vismem.training.arguments import PRESETS, arguments_for, load_settings
from vismem.training.replay import Learner, collate
from vismem.training.rewards import RewardError
from vismem.training.rollout import sampling, write
from vismem.training.rows import PromptSampler
from vismem.training.run import reported_apart
from vismem.training.trainer import MemoryTrainer, TrainingDivergedError

__all__ = ["folder", "quick"]  # fixtures

# What each stage moves.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("family", "dtype"), [("idefics3", torch.float32), ("qwen2_5_vl", torch.bfloat16)], ids=["fp32", "bf16"]
)
def test_a_stage_moves_its_own_part_only(family, stage, dtype, tmp_path):
    model = equip(family, dtype=dtype)
    base = {name: tensor.clone() for name, tensor in model.base.state_dict().items()}
    before, grads = weights(model), Gradients()
    # Both kinds at the start of the first answers, so that every part has something to do.
    args = settings(tmp_path, stage, max_steps=2, group_size=4, max_new_tokens=16, weight_decay=0.0)
    done = train(model, args, callbacks=[grads])
    now = model.base.state_dict()
    assert base.keys() == now.keys() and all(torch.equal(now[name], base[name]) for name in base)
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())
    own = {name for name in before if name.startswith("tokens." if stage == "stage2" else "memory.")}
    moved = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name].to(tensor))}
    # End tokens are never sampled, so where the head is untied their output rows have nothing to learn from.
    assert moved == own - {"tokens.end_output"}
    assert all(set(found) == own for found in grads.found)
    reached = {name for found in grads.found for name in own if found[name].any()}
    assert reached == own - {"tokens.end_output"}
    assert all(math.isfinite(entry["loss"]) for entry in done.state.log_history if "loss" in entry)
    assert all(p.dtype == torch.float32 for p in done.learner.parameters())


def test_end_rows_learn_at_a_tenth_of_the_rate(family, tmp_path):
    model = equip(family)
    before = weights(model)
    args = settings(tmp_path, "stage2", weight_decay=0.0, end_rate=0.1, max_grad_norm=0.0)
    train(model, args)
    steps = {name: float((p - before[name]).abs().max()) for name, p in weights(model).items()}
    # The first step of Adam is as long as the learning rate, whatever the gradient.
    assert steps["tokens.invocation"] == pytest.approx(1e-2, rel=1e-2)
    assert steps["tokens.end"] == pytest.approx(1e-3, rel=1e-2)


# What a run says of itself.


def rising(completions, **columns) -> list[float]:
    return [float(index) for index in range(len(completions))]


def alike(completions, **columns) -> list[float]:
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("stage", "reward", "config", "said"),
    [
        ("stage1", alike, {}, "in every group all answers earned the same"),
        ("stage2", rising, {"max_invocations": 0}, "memory was never invoked"),
        ("warmup", rising, {"max_invocations": 0}, "there was no gradient"),
        ("grpo", rising, {}, ""),
        ("stage1", rising, {}, ""),
    ],
)
def test_a_run_that_learns_nothing_warns(tmp_path, caplog, monkeypatch, stage, reward, config, said):
    monkeypatch.setattr(metrics, "PATIENCE", 2)
    args = settings(tmp_path, stage, max_steps=3, penalty_coef=0.0, skip_solved=False)
    train(equip("idefics3", **config), args, reward=reward)
    found = [record.getMessage() for record in caplog.records if record.name == metrics.__name__]
    assert len(found) == (2 if said else 0), found
    for message, start in zip(found, ("warning: in the last 2 updates", "warning: in 3 of 3 updates"), strict=False):
        assert message.startswith(start) and said in message and "docs/training.md" in message


def test_trackers_have_a_run_for_each_stage(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    tracker = types.ModuleType("wandb")
    tracker.run = None
    tracker.finish = lambda: setattr(tracker, "run", None)
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    args = settings(tmp_path, project="shelves")
    with reported_apart(args):
        assert os.environ["WANDB_PROJECT"] == "shelves"
        tracker.run = object()
    assert tracker.run is None and "WANDB_PROJECT" not in os.environ
    with pytest.raises(RuntimeError), reported_apart(args):
        tracker.run = object()
        raise RuntimeError
    assert tracker.run is None
    tracker.run = mine = object()  # started by the trainer's caller
    with reported_apart(args):
        pass
    assert tracker.run is mine


def test_a_prompt_longer_than_the_context_names_its_row(tmp_path):
    long = [{"role": "user", "content": [{"type": "text", "text": "word " * 3000}]}]
    data = [*rows(1), Row("too-long", long, [], "", "a", {})]
    for stage in ("warmup", "stage1"):
        args = settings(tmp_path / stage, stage, per_device_train_batch_size=1, max_steps=2, strict=True)
        with pytest.raises(BadDataError, match=r"the prompt has 12,\d+ tokens, and the model takes 2,048"):
            train(equip("idefics3"), args, data)


# Afterwards it is still the same method.


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_after_training_off_is_the_base_and_replay_is_decoding(family, stage, tmp_path):
    model = equip(family)
    args = settings(tmp_path, stage, max_steps=2)
    train(model, args)
    alone, _ = tiny.base_and_processor(family)
    batch = tiny.mixed_batch(model.processor)
    model.eval()
    for chance in ({"do_sample": False}, {"do_sample": True, "temperature": 0.8}):
        torch.manual_seed(3)
        expected = alone.generate(**batch, max_new_tokens=16, **chance)
        torch.manual_seed(3)
        assert torch.equal(model.generate(**batch, max_new_tokens=16, invocation="off", **chance), expected)
    seeds = list(range(6))
    policy = "learned" if stage == "stage2" else Random(0.7, "anywhere", seed=seeds)
    written = write(model, batch, policy, sampling(model, 16, 0.9), seeds, 2)
    assert sum(len(rollout.invocations) for rollout in written) > 3
    for formed in (False, True):
        inputs = collate(batch, written, model.processor.tokenizer.pad_token_id, 0.9, formed=formed)
        with torch.no_grad():
            found = model(**inputs).log_probs
        start, compared = inputs["prompt_length"], 0
        for row, rollout in enumerate(written):
            there = rollout.sampled
            replayed = found[row, start : start + len(rollout.tokens)][there]
            assert torch.allclose(replayed, rollout.log_probs[there], atol=1e-4)
            compared += int(there.sum())
        assert compared > 40


@pytest.mark.parametrize(
    ("places", "steps", "expected"),
    [
        ("delimiter-then-anywhere", 4, ["delimiter", "delimiter", "anywhere", "anywhere"]),
        ("delimiter-then-anywhere", 3, ["delimiter", "delimiter", "anywhere"]),
        ("delimiter", 2, ["delimiter", "delimiter"]),
        ("anywhere", 2, ["anywhere", "anywhere"]),
    ],
)
def test_invocations_are_injected_at_delimiters_in_the_first_half(places, steps, expected, tmp_path, monkeypatch):
    found, real = [], experience.write

    def watched(model, inputs, policy, *others, **named):
        if policy != "off":
            found.append((policy.where, policy.rate))
        return real(model, inputs, policy, *others, **named)

    monkeypatch.setattr(experience, "write", watched)
    plan = {"injection_places": places, "max_steps": steps, "injection_rate": 0.9, "anywhere_rate": 0.2}
    train(equip("idefics3"), settings(tmp_path, max_new_tokens=3, **plan))
    assert found == [(place, {"delimiter": 0.9, "anywhere": 0.2}[place]) for place in expected]


def test_the_coefficient_may_fall_only_after_the_warm_up(tmp_path):
    """Without a step of the policy the divergence is 0, so beta falls as soon as it may."""
    plan = {"max_steps": 4, "warmup_steps": 2, "lr_scheduler_type": "constant_with_warmup", "learning_rate": 0.0}
    done = train(equip("idefics3"), settings(tmp_path, kl_coef=0.5, kl_horizon=10, max_new_tokens=3, **plan))
    coefs = [entry["kl_coef"] for entry in done.state.log_history if "kl_coef" in entry]
    assert coefs == pytest.approx([0.5, 0.5, 0.5, 0.49]) and done.kl.coef == pytest.approx(0.5 * 0.98**2)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_reference_is_the_start_or_the_base_alone(stage, tmp_path):
    found = {}
    for reference in ("start", "no_memory"):
        done = train(equip("idefics3"), settings(tmp_path / reference, stage, reference=reference, max_new_tokens=16))
        found[reference] = done.state.log_history[0]["kl"]
    assert found["start"] == 0 and found["no_memory"] > 1e-5


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_gap_between_decode_and_replay_is_logged(stage, tmp_path, monkeypatch):
    def logged(folder, **changes) -> dict:
        done = train(equip("idefics3"), settings(tmp_path / folder, stage, **changes))
        return done.state.log_history[0]

    def gaps(entry: dict) -> list[float]:
        return [entry[f"sampling/logp_difference/{name}"] for name in ("mean", "max")]

    whole = logged("one")
    assert max(gaps(whole)) < 1e-4
    weighted = logged("weighted", importance_sampling_cap=2.0)
    assert weighted["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)  # ratios of 1 change nothing
    real = experience.write

    def doubtful(*given, **named):
        found = real(*given, **named)
        for rollout in found:
            rollout.log_probs[rollout.sampled] -= 0.25
        return found

    monkeypatch.setattr(experience, "write", doubtful)
    assert gaps(logged("two")) == pytest.approx([0.25, 0.25], abs=1e-3)
    found = logged("capped", importance_sampling_cap=1.1, kl_coef=0.0, max_grad_norm=0.0)
    plain = logged("plain", kl_coef=0.0, max_grad_norm=0.0)
    assert found["grad_norm"] == pytest.approx(1.1 * plain["grad_norm"], rel=1e-3)  # exp(.25) is cut to 1.1


# The same update, however it is cut up.


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_and_accumulation_change_nothing(family, stage, tmp_path):
    def after(name: str, **changes) -> tuple[dict, float]:
        model = equip(family)
        args = settings(tmp_path / name, stage, max_steps=2, optim="sgd", learning_rate=0.1, **changes)
        done = train(model, args)
        return weights(model), done.kl.coef

    whole, coef = after("whole")
    moved = distance(whole, weights(equip(family)))
    assert moved > 1e-3
    cuts = {"both": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "micro_batch": 1}}
    if family == "idefics3":  # no family can change how a batch is cut
        cuts["micro"] = {"micro_batch": 2 if stage == "stage1" else 1}
    for name, changes in cuts.items():
        found, other = after(name, **changes)
        assert distance(found, whole) < 1e-3 * moved, name
        assert other == pytest.approx(coef, rel=1e-6), name


@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_changes_nothing(family, stage, tmp_path):
    found = []
    for enable in (False, True):
        grads, model = Gradients(), equip(family)
        args = settings(tmp_path, stage, gradient_checkpointing=enable, max_grad_norm=0.0)
        train(model, args, callbacks=[grads])
        assert model.checkpointing == enable
        found.append(grads.found[0])
    largest = max(float(g.abs().max()) for g in found[0].values())
    assert largest > 1e-4
    assert distance(*found) < 1e-3 * largest


def test_inner_iterations_read_rollouts_again(tmp_path, monkeypatch):
    written, ratios = [], []
    real_write, real_loss = experience.write, grpo.grpo_loss

    def counted(model, inputs, policy, *others, **named):
        written.append(policy)
        return real_write(model, inputs, policy, *others, **named)

    def watched(log_probs, old, *others):
        ratios.append(float((log_probs - old).detach().abs().max()))
        return real_loss(log_probs, old, *others)

    monkeypatch.setattr(experience, "write", counted)
    monkeypatch.setattr(grpo, "grpo_loss", watched)
    args = settings(tmp_path, inner_iterations=2, max_steps=4, learning_rate=0.1, baseline="off")
    args.gradient_accumulation_steps = 2
    done = train(equip("idefics3"), args)
    assert len(written) == 4  # two updates' worth, of two batches each
    assert ratios[:2] == ratios[4:6] == [0.0, 0.0]
    assert min(ratios[2:4] + ratios[6:8]) > 1e-3
    clipped = [entry["clip_share"] for entry in done.state.log_history if "clip_share" in entry]
    assert clipped[0] == clipped[2] == 0 and max(clipped[1], clipped[3]) > 0
    with pytest.raises(ValueError, match="streaming"):
        settings(tmp_path, inner_iterations=2, streaming=True)


@pytest.mark.parametrize(("length", "chunk", "repeats"), [(10, 4, 1), (10, 4, 2), (3, 4, 2), (8, 4, 1)])
def test_prompts_come_in_whole_chunks(length, chunk, repeats):
    sampler = PromptSampler(length, chunk, repeats, seed=0)
    first = list(sampler)
    assert len(first) == len(sampler) and len(first) % (chunk * repeats) == 0
    assert set(first) == set(range(length))
    for start in range(0, len(first), chunk * repeats):
        assert first[start : start + chunk] * repeats == first[start : start + chunk * repeats]
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_solved_prompts_are_left_out(tmp_path):
    before = weights(model := equip("idefics3"))
    done = train(model, settings(tmp_path, weight_decay=0.0), reward=alike)
    assert done.state.log_history[0]["frac_solved"] == 1
    assert distance(weights(model), before) == 0


# When something goes wrong.


@pytest.mark.parametrize("stage", ["stage1", "warmup"])
def test_a_loss_of_nan_stops_training(stage, tmp_path, monkeypatch):
    model = equip("idefics3")
    args = settings(tmp_path, stage, max_steps=3, save_strategy="steps", save_steps=1)
    real = grpo.trajectory_mean

    def broken(values, sampled):
        return real(values, sampled) * (float("nan") if (tmp_path / "checkpoint-1").is_dir() else 1)

    monkeypatch.setattr(grpo, "trajectory_mean", broken)
    with pytest.raises(TrainingDivergedError, match=r"nan at step 1, rows row-\d, row-\d;.*checkpoint-1\. .*--resume"):
        train(model, args)
    assert all(p.isfinite().all() for p in model.memory.parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_of_nan_stops_training(stage, tmp_path):
    model = equip("idefics3")
    for part in PARTS:
        for parameter in model.parameters_of(part):
            parameter.requires_grad_(True).register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingDivergedError, match=r"at step 0, rows row-\d, row-\d;.*none yet"):
        train(model, settings(tmp_path, stage))
    assert all(p.isfinite().all() for p in model.memory.parameters())


def test_a_reward_that_fails_names_itself_and_the_row(tmp_path):
    def picky(completions, id, **columns):
        if "row-2" in id:
            raise KeyError("no such colour")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"'picky' failed at row row-2: KeyError: 'no such colour'"):
        train(equip("idefics3"), settings(tmp_path, max_steps=2), reward=picky)


@pytest.mark.parametrize(
    ("where", "phase", "setting"),
    [("forward", "update", "micro_batch"), ("write", "rollout", "per_device_train_batch_size, group_size")],
)
def test_out_of_memory_names_the_setting(where, phase, setting, tmp_path, monkeypatch):
    def full(*given, **named):
        raise torch.OutOfMemoryError("CUDA out of memory")

    target = Learner if where == "forward" else experience
    monkeypatch.setattr(target, where, full)
    with pytest.raises(RuntimeError, match=f"out of memory in the {phase} of step 0; lower {setting}"):
        train(equip("idefics3"), settings(tmp_path, kl_coef=0.0))


# Resuming.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("inner", [1, 2])
def test_a_resumed_run_equals_an_undisturbed_one(family, stage, inner, tmp_path):
    if inner == 2 and (stage == "warmup" or family != "idefics3"):
        pytest.skip("one family and stage are enough for inner iterations")

    def fresh():
        torch.manual_seed(7)
        return equip(family, lora_dropout=0.1)

    whole, again = whole_and_resumed(tmp_path, stage, fresh, inner_iterations=inner)
    assert distance(weights(whole), weights(fresh())) > 1e-3
    assert distance(weights(again), weights(whole)) == 0


# The command.


def test_the_command_trains_and_resumes(folder, tmp_path, capsys, monkeypatch):
    out, file = f"output_dir={tmp_path / 'run'}", str(folder / "settings.yaml")

    def cut(self, *given, **named):
        raise RuntimeError("the lights went out")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryTrainer, "save_memory", cut)
        assert command("stage1", file, out) == 1
    assert "the lights went out" in capsys.readouterr().err
    assert command("stage1", file, out) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert "holds a run already" in err and "--resume" in err
    assert command("stage1", file, out, "--resume") == 0
    memory = tmp_path / "run" / "memory"
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(memory)
    from vismem import VisMem

    assert VisMem.from_pretrained(memory).memory_config.short_length == 4
    done = (tmp_path / "run" / "done.json").stat().st_mtime_ns
    assert command("stage1", file, out, "--resume") == 0  # nothing left to do
    assert (tmp_path / "run" / "done.json").stat().st_mtime_ns == done
    assert command("stage2", file, f"output_dir={tmp_path / 'two'}", f"checkpoint={memory}") == 0
    assert not list(tmp_path.rglob("*.partial"))
    samples = (tmp_path / "run" / "completions.jsonl").read_text().splitlines()
    assert {"step", "id", "question", "completion", "answer", "reward", "baseline"} <= json.loads(samples[0]).keys()


def test_the_more_specific_setting_wins(tmp_path):
    file = tmp_path / "settings.yaml"

    def rate(text: str, *changes: str) -> float:
        file.write_text(text)
        return arguments_for("stage1", load_settings(file, ["output_dir=runs/x", *changes])).learning_rate

    assert arguments_for("stage2", load_settings(None, ["bf16=false"])).learning_rate == 1e-5
    assert rate("bf16: false") == 5e-5  # the preset's section
    assert arguments_for("stage1", load_settings(None, ["bf16=false"])).group_size == 16  # the preset
    assert rate("bf16: false\nlearning_rate: 3e-4") == 3e-4  # the file before the preset's section
    assert rate("bf16: false\nlearning_rate: 3e-4\nstage1: {learning_rate: 4e-4}") == 4e-4  # the file's section
    assert rate("bf16: false\nstage1: {learning_rate: 4e-4}", "learning_rate=6e-4") == 6e-4  # the command line
    assert rate("bf16: false\nlearning_rate: 3e-4", "stage1.learning_rate=7e-4", "learning_rate=6e-4") == 7e-4
    assert rate("bf16: false\nlearning_rate: 3e-4", "stage2.learning_rate=7e-4") == 3e-4
    assert rate("preset: paper\nbf16: false", "preset=pocket") == PRESETS["pocket"]["stage1"]["learning_rate"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("lerning_rate=1", "unknown setting lerning_rate; did you mean learning_rate?"),
        ("stage1.gruop_size=4", "unknown setting stage1.gruop_size; did you mean group_size?"),
        ("group_size=1", "group_size must be 2 or more"),
        ("stage1.temperature=0", "temperature must be more than 0"),
        ("injection_rate=1.5", "injection_rate must be between 0 and 1, got 1.5"),
        ("reference=nowhere", "reference must be one of start, no_memory, got 'nowhere'"),
        ("micro_batch=5", "micro_batch must be 0, a divisor of group_size (2) or a multiple of it, got 5"),
        ("preset=papr", "unknown preset 'papr'; choose from paper, pocket"),
        ("base=/nowhere/base", "no base /nowhere/base: there is no such folder"),
        ("rewards=exakt", "exakt"),
        ("data=/nowhere.jsonl", "/nowhere.jsonl"),
        ("memory.short_length=5", "short_length must be one of"),
        ("learning_rate=[", "the value of learning_rate is not valid YAML"),
        ("group_size=many", "group_size must be a whole number, got 'many'"),
        ("learning_rate=high", "learning_rate must be a number, got 'high'"),
        ("group_size=2.5", "group_size must be a whole number, got 2.5"),
        ("streaming=perhaps", "streaming must be true or false, got 'perhaps'"),
    ],
)
def test_bad_settings_are_one_line(folder, tmp_path, capsys, change, said):
    assert command("stage1", str(folder / "settings.yaml"), f"output_dir={tmp_path / 'run'}", change) in (1, 2)
    err = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("vismem")]
    assert len(err) == 1 and said in err[0]
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("rewards=[exakt]", "no reward 'exakt'; choose from exact"),
        ("rewards=[math]", "the reward 'math' needs the package math-verify"),
        ("stage2.rewards=[nowhere:low]", "cannot import nowhere"),
        ("stage2.temperature=0", "temperature must be more than 0"),
        ("stage1.data=/nowhere.jsonl", "no such file or folder: /nowhere.jsonl"),
        ("stage2.data=pocket:lately", "unknown pocket mixture 'lately'"),
        ("stage2.data={folder}/blind.jsonl", "blind.jsonl has no good row (1 bad)"),
        ("stage2.data={folder}/words.jsonl stage2.streaming=true", "words.jsonl has no good row (1 bad)"),
        ("stage2.seed=1", "stage2 holds a run already"),
    ],
)
def test_errors_of_a_later_stage_are_found_before_the_first(folder, tmp_path, capsys, monkeypatch, change, said):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    monkeypatch.setattr(run, "load_model", lambda args: pytest.fail("nothing should be loaded"))
    (folder / "blind.jsonl").write_text(json.dumps({"prompt": "what?", "images": ["nowhere.png"], "answer": "a"}))
    (folder / "words.jsonl").write_text("words")
    if "already" in said:
        (tmp_path / "run" / "stage2").mkdir(parents=True)
        (tmp_path / "run" / "stage2" / "done.json").write_text('{"stage": "stage2"}')
    changes = [part.format(folder=folder) for part in change.split()]
    misuse = said.startswith(("no reward", "cannot import", "temperature"))  # the rest is what settings name
    code = command("all", str(folder / "settings.yaml"), f"output_dir={tmp_path / 'run'}", *changes)
    assert code == (2 if misuse else 1)
    err = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("vismem")]
    assert len(err) == 1 and said in err[0]
    assert not (tmp_path / "run" / "warmup").exists()


def test_stages_with_the_same_data_read_it_once_and_finished_ones_not(folder, tmp_path, monkeypatch):
    read, begun = [], []
    whole = run.load_rows
    monkeypatch.setattr(run, "load_rows", lambda args: read.append(args.stage) or whole(args))
    monkeypatch.setattr(run, "load_model", lambda args: None)

    class Trainer:
        def __init__(self, model, args, rows):
            self.state = TrainerState()
            begun.append((args.stage, args.checkpoint, rows))

        def train(self, resume_from_checkpoint):
            pass

        def save_result(self, folder):
            folder.mkdir(parents=True)
            for name in ("vismem_config.json", "vismem.safetensors"):
                (folder / name).write_text("{}")

    monkeypatch.setattr(run, "MemoryTrainer", Trainer)
    given = [str(folder / "settings.yaml"), f"output_dir={tmp_path}", f"stage2.data={folder / 'more.jsonl'}"]
    (folder / "more.jsonl").write_text(json.dumps({"prompt": "what?", "answer": "a"}))
    assert command("all", *given) == 0
    assert read == ["warmup", "stage2"]
    assert [stage for stage, *_ in begun] == list(STAGES) and begun[0][2] is begun[1][2] is not begun[2][2]
    memories = [str(tmp_path / stage / "memory") for stage in STAGES]
    assert [checkpoint for _, checkpoint, _ in begun] == [None, *memories[:2]]
    assert command("all", *given, "rewards=[exakt]", "data=/nowhere.jsonl", "--resume") == 0
    assert len(begun) == 3


# It learns.


@pytest.mark.parametrize("cut", [False, True], ids=["memory", "memory-without-gradient"])
def test_stage_one_raises_the_reward(cut, tmp_path, monkeypatch):
    """Two tokens after each memory, on a base that depends on its context; random weights hardly do."""
    model = tiny.equip("idefics3", lora_dropout=0.0)
    with torch.no_grad():
        for layer in model.backbone.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(3)
    seeds, data = list(range(64)), rows(1)

    def mean_reward() -> float:
        policy = Random(1.0, "delimiter", seed=seeds)
        batch = prompt_inputs(model.processor, data)
        written = write(model.eval(), batch, policy, sampling(model, 2, 1.0), seeds, len(seeds))
        return sum(low(None, None, [rollout.tokens.tolist() for rollout in written])) / len(written)

    if cut:
        real = Memory.form

        def detached(*given):
            formed = real(*given)
            return formed._replace(vectors=formed.vectors.detach())

        monkeypatch.setattr(Memory, "form", detached)
    before = mean_reward()
    plan = {"group_size": 64, "max_new_tokens": 2, "max_steps": 5 if cut else 40, "learning_rate": 1e-2}
    plan |= {"per_device_train_batch_size": 1, "kl_coef": 0.0, "baseline": "off", "weight_decay": 0.0}
    train(model, settings(tmp_path, **plan), data)
    gained = mean_reward() - before
    assert gained == 0 if cut else gained > 0.08
