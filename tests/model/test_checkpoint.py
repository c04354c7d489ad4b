"""Checkpoints: what is written, what is refused and how, and the configuration's own checks."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from kills import killed_at_each_step
from safetensors.torch import load_file

import vismem
from vismem import checkpoint, files
from vismem.checkpoint import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, digest, read_record
from vismem.config import VisMemConfig


@pytest.fixture
def saved(tmp_path):
    model = tiny.equip("idefics3")
    model.save_pretrained(tmp_path / "memory")
    return model, tmp_path / "memory"


def load(folder, family="idefics3", **changes):
    base, processor = tiny.base_and_processor(family, **changes)
    return vismem.VisMem.from_pretrained(folder, base=base, processor=processor)


def test_a_checkpoint_holds_only_what_was_trained(saved):
    model, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
    state = load_file(folder / WEIGHTS_FILE)
    trained = {id(p): n for n, p in model.named_parameters() if not n.startswith("base.")}
    assert len(state) == len(trained)
    assert all(torch.equal(state[name], dict(model.named_parameters())[name]) for name in state)
    card = (folder / CARD_FILE).read_text()
    assert card.startswith("---\nlibrary_name: vismem\npipeline_tag: image-text-to-text\n") and "idefics3" in card


def test_a_saved_memory_loads_unchanged(saved):
    model, folder = saved
    again = load(folder)
    assert again.memory_config == model.memory_config
    for (name, ours), (_, theirs) in zip(again.memory.named_parameters(), model.memory.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not again.training


@pytest.mark.parametrize("place", [100, -5])
def test_a_damaged_byte_in_the_weights_is_detected(saved, place):
    _, folder = saved
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[place] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="damaged: it does not match the checksum"):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[:-3],
        lambda text: text.replace('"query_length"', '"query_lenght"'),
        lambda text: text.replace('"query_length": 4', '"query_length": -4'),
        lambda text: text.replace('"short_length": 4', '"short_length": 5'),
        lambda text: text.replace('"sha256"', '"sha255"'),
        lambda text: text.replace('"format": 1', '"format": 9'),
        lambda text: text.replace('"hidden_size": 48', '"hidden_size": 49'),
        lambda text: "[]",
    ],
)
def test_damaged_records_are_detected(saved, change):
    _, folder = saved
    text = (folder / CONFIG_FILE).read_text()
    assert change(text) != text
    (folder / CONFIG_FILE).write_text(change(text))
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_a_damaged_byte_in_the_record_is_detected(saved):
    """Even if the JSON stays valid with plausible values, such as another LoRA scale."""
    _, folder = saved
    whole = (folder / CONFIG_FILE).read_bytes()
    expected = read_record(folder)
    for place in range(0, len(whole), 3):
        content = bytearray(whole)
        content[place] ^= 1
        (folder / CONFIG_FILE).write_bytes(content)
        try:
            assert read_record(folder) == expected  # white space may change
            assert chr(whole[place]).isspace()
        except ValueError:
            pass


def test_another_base_is_refused_naming_both(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"idefics3 \(hidden size 48.*qwen2_5_vl \(hidden size 48"):
        load(folder, "qwen2_5_vl")
    base, processor = tiny.FAMILIES["idefics3"].build(tied=True), tiny.FAMILIES["idefics3"].processor()
    base.resize_token_embeddings(400)
    with pytest.raises(ValueError, match=r"vocabulary 321.*vocabulary 400|vocabulary \d+.*vocabulary 400"):
        vismem.VisMem.from_pretrained(folder, base=base, processor=processor)
    processor.tokenizer.add_tokens(["<one more>"])
    with pytest.raises(ValueError, match="tokenizer"):
        vismem.VisMem.from_pretrained(folder, base=tiny.FAMILIES["idefics3"].build(), processor=processor)


def test_missing_checkpoints_are_named(saved, tmp_path):
    with pytest.raises(OSError, match="no such folder"):
        vismem.VisMem.from_pretrained(tmp_path / "nothing")
    with pytest.raises(OSError, match=r"nothing downloaded earlier|no such repository"):
        vismem.VisMem.from_pretrained("nobody/nothing-at-all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=CONFIG_FILE):
        vismem.VisMem.from_pretrained(tmp_path / "empty")
    (saved[1] / WEIGHTS_FILE).unlink()
    with pytest.raises(OSError, match=f"not a complete checkpoint: it has no {WEIGHTS_FILE}"):
        load(saved[1])


def test_saving_over_a_file_is_refused(saved, tmp_path):
    model, _ = saved
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        model.save_pretrained(tmp_path / "file")


def test_equipping_twice_uses_the_same_tokens():
    base, processor = tiny.base_and_processor("idefics3")
    count = len(processor.tokenizer)
    first = vismem.VisMem(base, processor)
    second = vismem.VisMem(base, processor)
    assert len(processor.tokenizer) == count + 4
    assert first.tokens.invocation_ids == second.tokens.invocation_ids
    for token in ("<ms_I>", "<ms_E>", "<ml_I>", "<ml_E>"):
        assert processor.tokenizer.encode(token, add_special_tokens=False) == [
            processor.tokenizer.convert_tokens_to_ids(token)
        ]


def test_rows_start_as_a_delimiter(family):
    base, processor = tiny.base_and_processor(family)
    model = vismem.VisMem(base, processor)
    (dot,) = processor.tokenizer.encode(".", add_special_tokens=False)
    row = base.get_input_embeddings().weight[dot]
    for found in (*model.tokens.invocation, *model.tokens.end):
        difference = (found - row).pow(2).mean().sqrt() / row.pow(2).mean().sqrt()
        assert 0.003 < difference < 0.03


@pytest.mark.parametrize(
    "values",
    [
        {"short_length": 5},
        {"long_length": 64},
        {"query_length": 0},
        {"builder_width": 100},
        {"lora_dropout": 1.0},
        {"memory_init": "random"},
        {"delimiters": ()},
    ],
)
def test_config_refuses_wrong_values(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        VisMemConfig(**values)


def test_config_round_trip_and_presets():
    config = VisMemConfig(short_length=16)
    assert VisMemConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert (VisMemConfig().short_length, VisMemConfig().long_length) == (8, 16)
    table4 = VisMemConfig.preset("paper-table4", query_length=4)
    assert (table4.short_length, table4.long_length, table4.query_length) == (4, 8, 4)
    with pytest.raises(ValueError, match="unknown preset"):
        VisMemConfig.preset("big")


def test_the_parts_hold_each_trainable_parameter_once():
    model = tiny.equip("idefics3")
    parts = ("builder", "short", "long", "tokens")
    ids = [id(p) for part in parts for p in model.parameters_of(part)]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="unknown part"):
        model.parameters_of("everything")


# Crashes.


def loaded(folder, model) -> dict[str, torch.Tensor]:
    """The weights that a model loads from a folder."""
    record, state = checkpoint.read_checkpoint(checkpoint.find_memory(folder), model.base)
    checkpoint.load_weights(model, state, folder, record)
    return {name: tensor.clone() for name, tensor in checkpoint.trained_state(model).items()}


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.fixture
def unflushed(monkeypatch):
    """Skips flushing: these tests kill a process, not the machine."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def test_a_save_killed_at_any_step_leaves_the_old_or_the_new_memory(tmp_path, unflushed):
    old, new, reader = tiny.equip("idefics3", seed=1), tiny.equip("idefics3", seed=2), tiny.equip("idefics3")
    folder, found = tmp_path / "memory", []
    states = [{n: t.clone() for n, t in checkpoint.trained_state(model).items()} for model in (old, new)]
    old.save_pretrained(folder)
    for _ in killed_at_each_step(lambda: new.save_pretrained(folder), folder, tmp_path / "kept"):
        state = loaded(folder, reader)
        found.append([same(state, expected) for expected in states])
        old.save_pretrained(folder)  # whatever a killed save left, the next one cleans up
        assert same(loaded(folder, reader), states[0])
        assert {path.name for path in folder.iterdir()} == {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE}
    assert found[0] == [True, False] and found[-1] == [False, True]
    assert found == sorted(found, reverse=True) and len(found) > 15


def test_two_saves_that_are_killed_leave_one_whole_memory(tmp_path, unflushed):
    """The second save finds what the first left: new weights, and a record not yet renamed."""
    models = [tiny.equip("idefics3", seed=seed) for seed in (1, 2, 3)]
    states = [{n: t.clone() for n, t in checkpoint.trained_state(model).items()} for model in models]
    folder, reader = tmp_path / "memory", tiny.equip("idefics3")
    for model, name in zip(models, ("old", "new"), strict=False):
        model.save_pretrained(tmp_path / name)
    shutil.copytree(tmp_path / "new", folder)
    shutil.copy(folder / CONFIG_FILE, files.partial_path(folder / CONFIG_FILE))
    shutil.copy(tmp_path / "old" / CONFIG_FILE, folder / CONFIG_FILE)
    for _ in killed_at_each_step(lambda: models[2].save_pretrained(folder), folder, tmp_path / "kept"):
        state = loaded(folder, reader)
        assert same(state, states[1]) or same(state, states[2])


def test_a_first_save_that_is_killed_is_a_memory_or_a_clear_error(tmp_path, unflushed):
    model, reader, said = tiny.equip("idefics3"), tiny.equip("idefics3", seed=2), set()
    folder = tmp_path / "memory"
    for _ in killed_at_each_step(lambda: model.save_pretrained(folder), folder, tmp_path / "kept"):
        try:
            assert same(loaded(folder, reader), checkpoint.trained_state(model))
            said.add("")
        except OSError as error:
            said.add(str(error))
    assert any("a save into it was interrupted" in text for text in said) and "" in said


def test_a_memory_is_read_whole_while_others_are_saved(tmp_path, unflushed, monkeypatch):
    """Another save runs before each of the reader's file accesses in turn."""
    models = [tiny.equip("idefics3", seed=seed) for seed in (1, 2)]
    states = [{n: t.clone() for n, t in checkpoint.trained_state(model).items()} for model in models]
    folder, reader = tmp_path / "memory", tiny.equip("idefics3")
    for number in range(50):
        models[0].save_pretrained(folder)
        left = [number]

        def before(look, left=left):
            def looked(path, *given):
                left[0] -= 1
                if left[0] == -1:
                    models[1].save_pretrained(folder)
                return look(path, *given)

            return looked

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", before(Path.read_bytes))
            patch.setattr(Path, "is_file", before(Path.is_file))
            patch.setattr(files, "sha256", before(files.sha256))
            state = loaded(folder, reader)
        assert same(state, states[0]) or same(state, states[1])
        if left[0] >= 0:  # the reader was done before
            break
    assert 3 < number < 49


# Where a memory and its base are found.


@pytest.fixture(scope="module")
def pocketed():
    """A model on the packaged base."""
    from vismem.pocket import load_base

    return vismem.VisMem(*load_base(), VisMemConfig.preset("pocket")).eval()


@pytest.mark.parametrize("given", ["bases/one", "./bases/one", "bases/deep/../one"])
def test_a_base_in_a_relative_folder_is_found_from_anywhere(tmp_path, monkeypatch, given):
    base, processor = tiny.base_and_processor("idefics3")
    (tmp_path / "there" / "bases" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "there")
    base.save_pretrained("bases/one")
    processor.save_pretrained("bases/one")
    model = vismem.VisMem(type(base).from_pretrained(given), processor, tiny.equip("idefics3").memory_config)
    model.save_pretrained("runs/memory")
    monkeypatch.chdir(tmp_path)
    assert vismem.VisMem.from_pretrained("there/runs/memory").base.config.model_type == "idefics3"
    (tmp_path / "there").rename(tmp_path / "moved")  # the tree as a whole: the path from the memory still leads there
    assert vismem.VisMem.from_pretrained("moved/runs/memory").base.config.model_type == "idefics3"
    from vismem.loading import load_model

    assert load_model("moved/runs").base == given
    (tmp_path / "moved" / "bases" / "one").rename(tmp_path / "elsewhere")
    for load_it in (vismem.VisMem.from_pretrained, load_model):
        with pytest.raises(OSError, match=r"is in none of .*/there/bases/one, .*/moved/bases/one.* base= \(--base"):
            load_it("moved/runs/memory")
    found = vismem.VisMem.from_pretrained("moved/runs/memory", base=type(base).from_pretrained("elsewhere"))
    assert found.base.name_or_path == "elsewhere"


def test_a_base_on_the_hub_keeps_its_name_and_an_error_says_base(saved, tmp_path):
    model, _ = saved
    model.base.name_or_path = model.base.config._name_or_path = "nobody/nothing-at-all"
    model.save_pretrained(tmp_path / "hub")
    record = read_record(tmp_path / "hub")
    assert record.base_name == "nobody/nothing-at-all" and record.base_folders == ()
    with pytest.raises(OSError, match=r"cannot load nobody/nothing-at-all, the base of memory .*base= \(--base"):
        vismem.VisMem.from_pretrained(tmp_path / "hub")


def test_records_of_earlier_versions_load(saved):
    _, folder = saved
    record = json.loads((folder / CONFIG_FILE).read_text())
    for name in ("base_folders", "history", "record_sha256"):
        del record[name]
    record["record_sha256"] = digest(record)
    (folder / CONFIG_FILE).write_text(json.dumps(record))
    assert load(folder).history == ()


def test_a_memory_downloaded_earlier_is_found_without_a_network(saved, tmp_path, monkeypatch):
    import huggingface_hub

    _, folder = saved
    downloaded = tmp_path / "models--me--memory" / "snapshots" / "0a1b"
    shutil.copytree(folder, downloaded)
    (tmp_path / "models--me--memory" / "refs").mkdir()
    (tmp_path / "models--me--memory" / "refs" / "main").write_text("0a1b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert checkpoint.locate("me/memory") == downloaded


def test_the_one_memory_below_a_folder_is_found(saved, tmp_path):
    model, _ = saved
    run = tmp_path / "runs" / "x"
    model.save_pretrained(run / "stage2" / "memory")
    (run / "stage2" / "checkpoint-5").mkdir()
    (run / "stage2" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    for name in (run, run / "stage2", run / "stage2" / "memory"):
        assert checkpoint.locate(name) == run / "stage2" / "memory"
    with pytest.raises(OSError, match=r"no vismem_config.json; it is a training checkpoint; .*stage2/memory"):
        checkpoint.locate(run / "stage2" / "checkpoint-5")
    model.save_pretrained(run / "stage1" / "memory")
    with pytest.raises(OSError, match=r"several memories; name one of .*stage1/memory, .*stage2/memory"):
        checkpoint.locate(run)


# The model card.


def front_matter(folder) -> dict:
    return yaml.safe_load((folder / CARD_FILE).read_text().split("---\n")[1])


@pytest.mark.parametrize(
    ("base", "linked"),
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("/cache/models--Qwen--Qwen2-VL/snapshots/0a1b", "Qwen/Qwen2-VL"),
        ("bases/one/two", None),
        ("./one", None),
        ("", None),
    ],
)
def test_the_card_links_a_base_on_the_hub(saved, base, linked):
    model, folder = saved
    model.base.name_or_path = base
    model.save_pretrained(folder)
    found = front_matter(folder)
    assert found.get("base_model") == linked and ("base_model_relation" in found) == bool(linked)
    assert found["library_name"] == "vismem" and {"vismem", "idefics3"} <= set(found["tags"])
    assert "path/to" not in (folder / CARD_FILE).read_text()


def test_the_card_has_the_runs_metrics_and_a_working_snippet(pocketed, tmp_path):
    pocketed.history = (
        {
            "stage": "stage1",
            "steps": 25,
            "seed": 0,
            "data": "pocket",
            "rewards": ["pocket"],
            "figures": {"reward": 0.53},
        },
    )
    pocketed.save_pretrained(tmp_path / "runs" / "memory")
    again = vismem.VisMem.from_pretrained(tmp_path / "runs")
    assert again.history == pocketed.history
    again.save_pretrained(tmp_path / "copy")
    card = (tmp_path / "copy" / CARD_FILE).read_text()
    assert "| stage1 | 25 | 0 | pocket | pocket | 0.53 |" in card
    exec(card.split("```python\n")[1].split("```")[0].replace("max_new_tokens=256", "max_new_tokens=2"), {})


ODD_NAMES = [
    'my "best" one',
    "a: b #c",
    "back\\slash",
    "two\nlines",
    "\N{SNOWMAN}\u2028|`",
    "\x1b[31m",
    "\udcff",
    "- x",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=ascii)
def test_the_card_is_well_formed_with_any_name(saved, tmp_path, name):
    model, _ = saved
    model.base.name_or_path = f"/bases/{name}"
    model.history = ({"stage": "stage1", "steps": 1, "seed": 0, "data": f"{name}.jsonl", "rewards": [name]},)
    folder = tmp_path / name
    checkpoint.save(model, folder, tags=(name,) if name.isprintable() else ())
    front = front_matter(folder)
    assert front["pipeline_tag"] == "image-text-to-text" and (not name.isprintable() or name in front["tags"])
    card = (folder / CARD_FILE).read_text()
    snippet = ast.parse(card.split("```python\n")[1].split("```")[0])
    calls = [node for node in ast.walk(snippet) if isinstance(node, ast.Call)]
    call = next(node for node in calls if "from_pretrained" in ast.unparse(node.func))
    assert ast.literal_eval(call.args[0]) == folder.as_posix()
    table = [line for line in card.split("\n") if line.startswith("|")]
    assert len(table) == 12 and {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3, 6}
    assert not set(card) & set("\x1b\u2028")
    model.history = ()


def test_pushing_uploads_a_card_that_names_the_repository(saved, monkeypatch):
    model, _ = saved
    sent = {}

    class Hub:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, **others):
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def file_exists(self, repo_id, name, revision=None):
            return repo_id == "me/old"

        def upload_folder(self, repo_id, folder_path, ignore_patterns, **others):
            sent[repo_id] = {
                p.name: p.read_bytes() for p in Path(folder_path).iterdir() if p.name not in ignore_patterns
            }
            return f"https://hub/{repo_id}"

    monkeypatch.setattr("vismem.model.HfApi", Hub)
    assert model.push_to_hub("new", tags=["mine"]) == "https://hub/me/new"
    assert set(sent["me/new"]) == {CARD_FILE, CONFIG_FILE, WEIGHTS_FILE}
    card = sent["me/new"][CARD_FILE].decode()
    assert 'from_pretrained("me/new"' in card and "- mine\n" in card
    model.push_to_hub("old")
    assert set(sent["me/old"]) == {CONFIG_FILE, WEIGHTS_FILE}
