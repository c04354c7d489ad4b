"""Checkpoints: what is written, what is refused and how, and the configuration's own checks."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

import vismem
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


def test_holds_what_was_trained_and_nothing_else(saved):
    model, folder = saved
    assert sorted(p.name for p in folder.iterdir()) == sorted([CARD_FILE, CONFIG_FILE, WEIGHTS_FILE])
    state = load_file(folder / WEIGHTS_FILE)
    trained = {id(p): n for n, p in model.named_parameters() if not n.startswith("base.")}
    assert len(state) == len(trained)
    assert all(torch.equal(state[name], dict(model.named_parameters())[name]) for name in state)
    card = (folder / CARD_FILE).read_text()
    assert card.startswith("---\nlibrary_name: vismem\npipeline_tag: image-text-to-text\n") and "idefics3" in card


def test_round_trip(saved):
    model, folder = saved
    again = load(folder)
    assert again.memory_config == model.memory_config
    for (name, ours), (_, theirs) in zip(again.memory.named_parameters(), model.memory.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not again.training


@pytest.mark.parametrize("place", [100, -5])
def test_one_damaged_byte_in_the_weights_is_noticed(saved, place):
    _, folder = saved
    content = bytearray((folder / WEIGHTS_FILE).read_bytes())
    content[place] ^= 1
    (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(ValueError, match="damaged: its checksum"):
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
def test_damaged_records_are_noticed(saved, change):
    _, folder = saved
    text = (folder / CONFIG_FILE).read_text()
    assert change(text) != text
    (folder / CONFIG_FILE).write_text(change(text))
    with pytest.raises(ValueError) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_any_damaged_byte_in_the_record_is_noticed(saved):
    """Also one that leaves good JSON with good values, such as another LoRA scale."""
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


def test_a_changed_length_does_not_fit_the_weights(saved):
    _, folder = saved
    record = json.loads((folder / CONFIG_FILE).read_text())
    record["config"]["short_length"] = 8
    del record["record_sha256"]
    record["record_sha256"] = digest(record)
    (folder / CONFIG_FILE).write_text(json.dumps(record))
    with pytest.raises(ValueError, match="does not match"):
        load(folder)


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


def test_missing_checkpoints(tmp_path):
    with pytest.raises(OSError, match="no such folder"):
        vismem.VisMem.from_pretrained(tmp_path / "nothing")
    with pytest.raises(OSError, match="cannot be had from the hub"):
        vismem.VisMem.from_pretrained("nobody/nothing-at-all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=CONFIG_FILE):
        vismem.VisMem.from_pretrained(tmp_path / "empty")


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
        {"query_length": True},
        {"builder_width": 100},
        {"lora_dropout": 1.0},
        {"memory_init": "random"},
        {"delimiters": ()},
        {"min_gap": -1},
    ],
)
def test_config_refuses(values):
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


def test_parameters_of():
    model = tiny.equip("idefics3")
    parts = ("builder", "short", "long", "tokens")
    ids = [id(p) for part in parts for p in model.parameters_of(part)]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}
    with pytest.raises(ValueError, match="unknown part"):
        model.parameters_of("everything")
