"""What memory is compared with: LoRA adapters of the language model on the same trainer, and soft prompts."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random as Chance

import pytest
import tiny
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from training_runs import (
    Gradients,
    command,
    distance,
    folder,
    low,
    quick,
    rows,
    settings,
    train,
    weights,
    whole_and_resumed,
)

import vismem
from vismem.data import prompt_inputs
from vismem.decoding.policies import Forced, Random
from vismem.pocket.practice import MIXTURES, PocketRows, annotated, practice
from vismem.training.arguments import arguments_for, load_settings
from vismem.training.baselines import LanguageAdapter, adapter_of, load_adapter, lora_layers, without_adapter
from vismem.training.replay import collate
from vismem.training.rollout import sampling, write
from vismem.training.supervised import supervised_batch
from vismem.training.trainer import MemoryTrainer

__all__ = ["folder", "quick"]  # fixtures
STAGES = ("sft", "grpo")
EVERY = list(tiny.FAMILIES)


def equip(family: str = "idefics3", **changes):
    """A tiny model that depends on its context, which random weights hardly do."""
    model = tiny.equip(family, **{"lora_dropout": 0.0, **changes})
    with torch.no_grad():
        for name, parameter in model.backbone.language_model.named_parameters():
            if name.endswith("o_proj.weight"):
                parameter.mul_(3)
    return model


def adapted(family: str = "idefics3", **changes):
    """The same with a trained adapter."""
    model = equip(family, **changes)
    adapter = adapter_of(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.base.requires_grad_(False)
    return model


def plain(base) -> dict[str, torch.Tensor]:
    """The base's tensors, by their names without an adapter."""
    state = base.state_dict()
    return {name.replace(".base_layer", ""): t.clone() for name, t in state.items() if ".lora_" not in name}


def lora(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in LanguageAdapter(model.base).named_parameters()}


def last_logits(base, processor) -> torch.Tensor:
    with torch.no_grad():
        return base(**tiny.mixed_batch(processor)).logits[:, -1]


# What a baseline trains.


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", EVERY)
def test_only_the_adapter_moves(family, stage, tmp_path):
    """Float32 LoRA on a bfloat16 base, only on the language model's query and value projections."""
    if stage == "grpo" and family not in tiny.UNLIKE:
        pytest.skip("what is trained is the same in both")
    model = equip(family, dtype=torch.bfloat16)
    memory, before = weights(model), plain(model.base)
    grads = Gradients()
    train(model, settings(tmp_path, stage, max_steps=3, weight_decay=0.0), callbacks=[grads])
    now = plain(model.base)
    assert before.keys() == now.keys() and all(torch.equal(now[name], before[name]) for name in before)
    assert distance(weights(model), {name: tensor.float() for name, tensor in memory.items()}) == 0
    language = [m for m in model.backbone.language_model.modules() if isinstance(m, LoraLayer)]
    assert len(lora_layers(model.base)) == len(language) == 2 * model.base.config.get_text_config().num_hidden_layers
    assert all(p.dtype == torch.float32 for p in LanguageAdapter(model.base).parameters())
    assert {p.requires_grad for p in model.memory.parameters()} == {False}
    fresh = equip(family, dtype=torch.bfloat16)
    torch.manual_seed(0)
    moved = [name for name, p in LanguageAdapter(model.base).named_parameters() if "up" in name and p.any()]
    assert len(moved) == len(language)  # they start at zero
    assert set(grads.found[-1]) == {f"adapter.{name}" for name in lora(model)}
    assert all(gradient.any() for gradient in grads.found[-1].values())
    assert not lora_layers(fresh.base)


def test_a_new_adapter_changes_nothing_and_has_the_memorys_rank(family):
    model = equip(family, lora_r=3, lora_alpha=6)
    batch = tiny.mixed_batch(model.processor)
    expected = last_logits(model.base, model.processor)
    adapter_of(model)
    assert torch.equal(last_logits(model.base, model.processor), expected)
    config = model.base.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.0)
    alone, _ = tiny.base_and_processor(family)
    with torch.no_grad():
        alone.load_state_dict(plain(model.base))
    assert torch.equal(
        model.generate(**batch, max_new_tokens=8, invocation="off"), alone.generate(**batch, max_new_tokens=8)
    )


def test_off_is_base_and_adapter_together(family):
    """`invocation="off"` gives transformers' tokens, with an adapter and without."""
    model = adapted(family)
    batch = tiny.mixed_batch(model.processor)
    bare = equip(family)
    found = model.generate(**batch, max_new_tokens=12, invocation="off")
    assert torch.equal(found, model.base.generate(**batch, max_new_tokens=12))
    expected = bare.base.generate(**batch, max_new_tokens=12)
    assert not torch.equal(found, expected)
    with without_adapter(model.base):
        assert torch.equal(model.generate(**batch, max_new_tokens=12, invocation="off"), expected)
    assert torch.equal(model.generate(**batch, max_new_tokens=12, invocation="off"), found)
    assert not any(p.requires_grad for p in model.base.parameters())


def test_forming_memory_leaves_the_adapter_on(family):
    """The formers' adapters replace it while a memory is formed, and restore it afterwards."""
    model, bare = adapted(family), equip(family)
    batch = tiny.mixed_batch(model.processor)
    expected = last_logits(model.base, model.processor)
    forced = Forced([(0, 1, "long"), (0, 6, "short")])
    out = model.generate(**batch, max_new_tokens=8, invocation=forced, return_dict_in_generate=True, record=True)
    assert [i.kind for i in out.invocations[0]] == ["long", "short"]
    assert torch.equal(last_logits(model.base, model.processor), expected)
    assert len(lora_layers(model.base)) == len(lora(model)) // 2
    # A memory is formed by base and memory alone.
    from vismem.memory import Observation

    seen = Observation(
        torch.zeros(3, model.backbone.hidden_size),
        torch.ones(2, model.backbone.hidden_size),
        torch.ones(2, model.backbone.hidden_size),
    )
    with torch.no_grad():
        assert torch.equal(model.memory.form("long", [seen]).vectors, bare.memory.form("long", [seen]).vectors)


@pytest.mark.parametrize("family", EVERY)
def test_replay_is_decoding(family, tmp_path):
    model = adapted(family)
    batch, seeds = tiny.mixed_batch(model.processor), list(range(6))
    policy = MemoryTrainer(model, settings(tmp_path, "grpo"), rows(), low).collector.policy("anywhere", [], seeds)
    written = write(model, batch, policy, sampling(model, 8, 0.9), seeds, 2)
    inputs = collate(batch, written, model.processor.tokenizer.pad_token_id, 0.9, formed=True)
    with torch.no_grad():
        found = model(**inputs).log_probs[:, inputs["prompt_length"] :]
    for row, rollout in enumerate(written):
        assert not rollout.invocations
        assert torch.allclose(found[row, : len(rollout.tokens)], rollout.log_probs, atol=1e-4)


def test_the_gradient_goes_through_shared_prompts(family):
    """The prompt's gradient counts too, as if every trajectory encoded its own prompt."""
    model = adapted(family)
    parameters = dict(LanguageAdapter(model.base).requires_grad_(True).named_parameters())
    conversations = [tiny.message("look again!", tiny.picture(0)), tiny.message("a red cup.", tiny.picture(1))]
    batch, seeds = tiny.prompts(model.processor, conversations), list(range(4))
    written = write(model, batch, Random(0.0), sampling(model, 6, 1.0), seeds, 2)
    pad = model.processor.tokenizer.pad_token_id

    def gradient(inputs: dict) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs).log_probs.sum().backward()
        return {name: p.grad.clone() for name, p in parameters.items()}

    shared = gradient(collate(batch, written, pad, 1.0, formed=True))
    each = [
        gradient(collate(tiny.prompts(model.processor, [conversations[i // 2]]), [rollout], pad, 1.0, formed=True))
        for i, rollout in enumerate(written)
    ]
    for name, found in shared.items():
        expected = torch.stack([one[name] for one in each]).sum(0)
        assert expected.abs().max() > 1e-3
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max().clamp(min=1))), name


# The same update, however it is cut up.


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_accumulation_and_checkpointing_change_nothing(family, stage, tmp_path):
    def gradient(name: str, **changes) -> dict[str, torch.Tensor]:
        model, grads = adapted(family), Gradients()
        args = settings(tmp_path / name, stage, max_grad_norm=0.0, group_size=4, **changes)
        train(model, args, callbacks=[grads])
        return grads.found[0]

    expected = gradient("whole")
    largest = max(float(g.abs().max()) for g in expected.values())
    assert largest > 1e-4
    for name, changes in {
        "micro": {"micro_batch": 1},
        "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        "checkpointing": {"gradient_checkpointing": True},
    }.items():
        assert distance(gradient(name, **changes), expected) < 1e-3 * largest, name


def test_a_memory_stage_leaves_an_adapter_alone(tmp_path):
    model = adapted()
    before = lora(model)
    LanguageAdapter(model.base).requires_grad_(True)
    train(model, settings(tmp_path, "warmup"))
    assert distance(lora(model), before) == 0
    assert all(p.grad is None and not p.requires_grad for p in model.base.parameters())


# Supervised: the reply, and no invocation in it.


def test_supervised_replies_have_no_invocations(tmp_path):
    model = equip()
    decode = model.processor.tokenizer.decode
    prompts = prompt_inputs(model.processor, rows(2))
    replies = ["A red<ms_I> cup,<ml_I><ml_E> a blue book.", "Look! It is bright."]
    chance = [Chance(0), Chance(1)]
    batch = supervised_batch(
        model, prompts, replies, [True, True], chance, "delimiter", settings(tmp_path, "sft", max_new_tokens=64)
    )
    start = batch["prompt_length"]
    texts = [
        decode(ids[kept], skip_special_tokens=True)
        for ids, kept in zip(batch["input_ids"], batch["sampled"], strict=True)
    ]
    assert texts == ["A red cup, a blue book.", "Look! It is bright."]
    tokens = torch.tensor(model.tokens.ids)
    assert not torch.isin(batch["input_ids"][:, start:], tokens).any()
    assert torch.equal(batch["sampled"][:, start:], batch["attention_mask"][:, start:].bool())
    warm = supervised_batch(
        model, prompts, replies, [True, True], chance, "delimiter", settings(tmp_path, "warmup", max_new_tokens=64)
    )
    assert torch.isin(warm["input_ids"][:, start:], tokens).any()


IM = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content[0].text }}<|end|>\n{% endfor %}"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text | trim }} {% endfor %}"
BETWEEN = "{% for m in messages %}{{ '<|end|>' if m.role == 'user' }}{{ m.content[0].text }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "ends", "expected"),
    [
        (IM, ["<|pad|>", "<|end|>"], "<|end|>"),  # two end ids, the template's second: as Gemma 3 has them
        (IM, ["<|end|>", "<|pad|>"], "<|end|>"),
        (IM, ["<|pad|>", "<|start|>", "<|end|>"], "<|end|>"),  # the next turn's opening comes after it
        (BETWEEN, ["<|pad|>", "<|end|>"], "<|end|>"),  # nothing closes a turn: the next one's opening does
        (PLAIN, ["<|pad|>", "<|end|>"], "<|pad|>"),  # a template without any: the first
        (IM, "<|end|>", "<|end|>"),
        (IM, None, None),
    ],
)
def test_replies_end_as_the_chat_template_ends_a_turn(template, ends, expected, tmp_path):
    model = equip()
    model.processor.chat_template = template
    number = model.processor.tokenizer.convert_tokens_to_ids
    model.generation_config.eos_token_id = number(ends) if ends else None
    prompts = {"input_ids": torch.ones(1, 3, dtype=torch.long), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    args = settings(tmp_path, "sft", max_new_tokens=64)
    batch = supervised_batch(model, prompts, ["A cup"], [False], [Chance(0)], "delimiter", args)
    words = model.processor.tokenizer.encode("A cup", add_special_tokens=False)
    expected = [] if expected is None else [number(expected)]
    assert batch["input_ids"][0, 3:].tolist() == [*words, *expected]


def test_dropout_is_on_in_supervised_training_alone(tmp_path):
    found = {}
    for stage in STAGES:
        model = equip(lora_dropout=0.3)

        class Watch(Gradients):
            def on_pre_optimizer_step(self, args, state, control, model=None, stage=stage, **others):
                found[stage] = {part.training for part in model.modules() if isinstance(part, torch.nn.Dropout)}

        train(model, settings(tmp_path / stage, stage), callbacks=[Watch()])
        assert not any(part.training for part in model.base.modules())
    assert found == {"sft": {True}, "grpo": {False}}


# GRPO: what the base alone is.


@pytest.mark.parametrize(("reference", "differs"), [("start", False), ("no_memory", True)])
def test_the_reference_is_the_start_or_the_base_alone(reference, differs, tmp_path):
    done = train(adapted(), settings(tmp_path, "grpo", reference=reference))
    kl = done.state.log_history[0]["kl"]
    assert kl > 1e-3 if differs else kl == 0


def test_the_baseline_is_the_base_without_its_adapter(tmp_path):
    model, bare = adapted(), equip()
    found = []
    for one in (model, bare):
        trainer = MemoryTrainer(one, settings(tmp_path, "grpo", max_new_tokens=12), rows(), low)
        found.append(trainer.collector.baseline(rows(), prompt_inputs(one.processor, rows()), None))
    assert torch.equal(*found)
    off = write(model, prompt_inputs(model.processor, rows()), "off", sampling(model, 12, None))
    assert low(None, None, [rollout.tokens.tolist() for rollout in off]) != found[0].tolist()


# They learn.


def test_supervised_training_lowers_the_loss(tmp_path):
    done = train(equip(), settings(tmp_path, "sft", max_steps=30, max_new_tokens=64, weight_decay=0.0), rows(2))
    losses = [entry["loss"] for entry in done.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5


def test_grpo_raises_the_reward(tmp_path):
    model, seeds, data = equip(), list(range(64)), rows(1)

    def mean_reward() -> float:
        batch = prompt_inputs(model.processor, data)
        written = write(model, batch, "off", sampling(model, 2, 1.0), seeds, len(seeds))
        return sum(low(None, None, [rollout.tokens.tolist() for rollout in written])) / len(written)

    before = mean_reward()
    plan = {"group_size": 64, "max_new_tokens": 2, "max_steps": 12, "learning_rate": 3e-2, "kl_coef": 0.0}
    train(
        model, settings(tmp_path, "grpo", per_device_train_batch_size=1, baseline="off", weight_decay=0.0, **plan), data
    )
    assert mean_reward() > before + 0.1


# Resuming.


@pytest.mark.parametrize("stage", STAGES)
def test_resuming_equals_an_uninterrupted_run(stage, tmp_path):
    def fresh():
        model = equip(lora_dropout=0.1)
        torch.manual_seed(7)
        return model

    whole, again = whole_and_resumed(tmp_path, stage, fresh)
    saved = load_file(tmp_path / "cut" / "checkpoint-4" / "model.safetensors")
    assert set(saved) == {f"adapter.{name}" for name in lora(whole)}
    assert distance(lora(again), lora(whole)) == 0
    assert max(float(p.abs().max()) for name, p in lora(whole).items() if "up" in name) > 1e-3


# What a run leaves.


@pytest.mark.parametrize("family", EVERY)
def test_peft_and_transformers_read_what_is_saved(family, tmp_path):
    model = adapted(family)
    done = MemoryTrainer(model, settings(tmp_path, "sft"), rows(), None)
    done.save_result(tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    expected = last_logits(model.base, model.processor)
    assert not torch.allclose(expected, last_logits(equip(family).base, model.processor), atol=1e-3)

    ours = equip(family)
    load_adapter(ours, tmp_path / "adapter")
    assert torch.equal(last_logits(ours.base, model.processor), expected)
    assert not any(p.requires_grad for p in ours.base.parameters())
    load_adapter(ours.base, tmp_path / "adapter")  # in the place of the first
    assert torch.equal(last_logits(ours.base, model.processor), expected)

    theirs = equip(family).base
    theirs.load_adapter(str(tmp_path / "adapter"))
    assert torch.allclose(last_logits(theirs, model.processor), expected, atol=1e-5)
    wrapped = PeftModel.from_pretrained(equip(family).base, str(tmp_path / "adapter"))
    assert torch.allclose(last_logits(wrapped, model.processor), expected, atol=1e-5)


def test_an_adapter_stays_float32_on_a_narrow_base(tmp_path):
    model = adapted(dtype=torch.bfloat16)
    MemoryTrainer(model, settings(tmp_path, "sft"), rows(), None).save_result(tmp_path / "adapter")
    again = equip(dtype=torch.bfloat16)
    load_adapter(again, tmp_path / "adapter")
    assert distance(lora(again), lora(model)) == 0
    assert any(not torch.equal(p, p.bfloat16().float()) for p in lora(again).values())


def test_a_memory_is_equipped_before_an_adapter(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match="has a LoRA adapter already: equip it with memory first"):
        vismem.VisMem(model.base, model.processor, model.memory_config)


# The command.


def test_the_command_trains_and_resumes(folder, tmp_path, capsys):
    file, reply = str(folder / "settings.yaml"), tmp_path / "replies.jsonl"
    lines = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    lines = [{**line, "images": [str(folder / line["images"][0])], "completion": "a red cup."} for line in lines]
    reply.write_text("".join(json.dumps(line) + "\n" for line in lines))
    data, out = f"data={reply}", tmp_path / "sft"
    assert command("sft", file, data, f"output_dir={out}", "sft.max_steps=2", "sft.per_device_train_batch_size=2") == 0
    adapter = out / "adapter"
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base") and config["r"] == 4
    assert json.loads((out / "done.json").read_text())["stage"] == "sft"
    assert json.loads((out / "log.json").read_text())["log"]
    assert command("sft", file, data, f"output_dir={out}") == 1
    assert "holds a run already" in capsys.readouterr().err
    assert command("grpo", file, data, f"output_dir={out}", "--resume") == 1
    assert "another stage" in capsys.readouterr().err
    # Continued by GRPO, which starts from the adapter; its base is the one that the adapter names.
    change = ["grpo.max_steps=1", "grpo.per_device_train_batch_size=2", "base=", f"checkpoint={adapter}"]
    assert command("grpo", file, data, f"output_dir={tmp_path / 'grpo'}", *change) == 0
    first, second = (load_file(one / "adapter_model.safetensors") for one in (adapter, tmp_path / "grpo" / "adapter"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)  # the first update of a schedule is at rate 0
    assert not list(tmp_path.rglob("*.partial"))


def broken(adapter: Path, folder: Path, change) -> Path:
    """A copy of an adapter with a modified config."""
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
    return folder


def test_wrong_adapters_give_one_line(tmp_path):
    model = adapted()
    MemoryTrainer(model, settings(tmp_path, "sft"), rows(), None).save_result(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "memory")
    wrong = {
        tmp_path / "memory": "is not a LoRA adapter: it has no adapter_config.json",
        tmp_path / "nothing": "no adapter .*nothing",
        broken(tmp_path / "adapter", tmp_path / "half", {"target_modules": ".*text_model.*q_proj"}): "does not match",
        broken(tmp_path / "adapter", tmp_path / "rank", {"r": 2}): "does not match",
    }
    for place, said in wrong.items():
        bare = equip()
        with pytest.raises(ValueError, match=said) as error:
            load_adapter(bare, place)
        assert "\n" not in str(error.value)
        assert not lora_layers(bare.base)
    with pytest.raises(ValueError, match=r"does not fit .*q_proj") as error:
        load_adapter(tiny.equip("qwen2_5_vl"), tmp_path / "adapter")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sft", "checkpoint=CHECKPOINT", "base="], "is not a LoRA adapter: it has no adapter_config.json"),
        (["grpo", "base="], "no base: set base=NAME_OR_FOLDER, or checkpoint=FOLDER of what a run made"),
        (["sft", "sft.lerning_rate=1"], "unknown setting sft.lerning_rate; did you mean learning_rate?"),
        (["sft", "memory.content=hard"], "memory.content must be one of formed, soft, got 'hard'"),
        (["sft", "preset=pocket", "base=pocket", "data=pocket:warm"], "unknown pocket mixture 'warm'"),
    ],
)
def test_misuse_gives_one_line(folder, tmp_path, capsys, given, said):
    given = [word.replace("CHECKPOINT", str(folder)) for word in given]
    assert command(given[0], str(folder / "settings.yaml"), f"output_dir={tmp_path / 'run'}", *given[1:]) in (1, 2)
    err = [line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("vismem")]
    assert len(err) == 1 and said in err[0]


def test_presets_have_sections_for_both():
    for preset in ("paper", "pocket"):
        layers = load_settings(None, [f"preset={preset}", "bf16=false", "output_dir=x"])
        sft, grpo = (arguments_for(stage, layers) for stage in STAGES)
        warmup, first = (arguments_for(stage, layers) for stage in ("warmup", "stage1"))
        assert sft.per_device_train_batch_size == warmup.per_device_train_batch_size
        assert (grpo.per_device_train_batch_size, grpo.group_size) == (
            first.per_device_train_batch_size,
            first.group_size,
        )
        assert (grpo.kl_coef, grpo.target_kl) == (first.kl_coef, first.target_kl)
        assert sft.memory_config() == warmup.memory_config()


# The pocket's rows.


@pytest.mark.parametrize(
    ("stage", "mixture", "follows", "theirs"),
    [
        ("sft", "", "warmup", ""),
        ("sft", "warmup", "warmup", ""),
        ("sft", "stage2", "stage2", ""),
        ("sft", "partial", "warmup", "partial"),
        ("grpo", "", "stage2", ""),
        ("grpo", "warmup", "warmup", ""),
        ("grpo", "late", "stage2", "late"),
    ],
)
def test_baselines_read_the_rows_of_a_stage(stage, mixture, follows, theirs):
    ours, memory = PocketRows(stage, 3, mixture=mixture), PocketRows(follows, 3, mixture=theirs)
    for index in (0, 7, 12345):
        one, other = ours[index], memory[index]
        assert (one.id, one.prompt, one.answer, one.columns) == (other.id, other.prompt, other.answer, other.columns)
        assert [image.tobytes() for image in one.images] == [image.tobytes() for image in other.images]
        assert "<" not in one.completion and one.answer in one.completion


def test_the_stages_rows_are_unchanged():
    """A stage's rows depend only on seed, stage, index and the mixture in `data`."""
    for stage, mixture in (("warmup", ""), ("stage1", ""), ("stage2", "late")):
        rng = Chance(f"5-{stage}-9")
        conversation = practice(rng, MIXTURES[mixture or stage])
        row = PocketRows(stage, 5, mixture=mixture)[9]
        assert (row.prompt, row.answer) == (conversation.prompt, conversation.answer)
        named = stage in ("warmup", "stage1")  # stage II learns where to invoke
        assert row.completion == (annotated(conversation, rng) if named else conversation.answer_text)
