"""Weight files that are not what they claim: sizes, dtypes and numbers are checked before use."""

from __future__ import annotations

import hashlib
import json
from functools import cache

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import vismem
from vismem.checkpoint import CONFIG_FILE, WEIGHTS_FILE, digest
from vismem.memory import memory_of
from vismem.training.baselines import WEIGHTS_FILE as ADAPTER_FILE
from vismem.training.baselines import adapter_of, load_adapter, save_adapter

model_of = cache(tiny.equip)


@pytest.fixture
def saved(request, tmp_path):
    family = getattr(request, "param", "idefics3")
    model_of(family).save_pretrained(tmp_path)
    return family, tmp_path


def rewrite(folder, change_config=lambda config: None, change_state=lambda state: None, content=None) -> None:
    """Modifies a checkpoint and updates its checksums, as in a crafted file."""
    state, record = load_file(folder / WEIGHTS_FILE), json.loads((folder / CONFIG_FILE).read_text())
    change_state(state), change_config(record["config"])
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if content is not None:
        (folder / WEIGHTS_FILE).write_bytes(content)
    record["sha256"] = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
    del record["record_sha256"]
    record["record_sha256"] = digest(record)
    (folder / CONFIG_FILE).write_text(json.dumps(record))


def load(saved, **changes):
    model = model_of(saved[0])
    return vismem.VisMem.from_pretrained(saved[1], base=model.base, processor=model.processor, **changes)


SIZES = [("builder_layers", value) for value in (1, 3, 100_000, 2**31 - 1)]
SIZES += [(name, 10**9) for name in ("query_length", "lora_r")]
SIZES += [("builder_width", 8 * 10**8), ("builder_width", 24), ("builder_heads", 10**9), ("lora_r", 5)]
SIZES += [("short_length", 8), ("long_length", 32), ("memory_init", "learned"), ("content", "soft")]


@pytest.mark.parametrize("saved", ["idefics3", "qwen2_5_vl"], indirect=True)
@pytest.mark.parametrize(("name", "value"), SIZES)
def test_sizes_are_compared_with_the_weights_before_anything_is_built(saved, name, value, monkeypatch):
    built = []
    monkeypatch.setattr("vismem.model.memory_of", lambda *given: (built.append(given), memory_of(*given))[1])
    rewrite(saved[1], lambda config: config.update({name: value}))
    with pytest.raises(ValueError, match="does not match its config: ") as caught:
        load(saved)
    assert not built and "\n" not in str(caught.value) and str(saved[1]) in str(caught.value)
    if name not in ("builder_heads", "content"):
        assert f"{name} is {value!r} in the config" in str(caught.value)


WRONG = [("short_length", 8.0), ("long_length", True), ("token_noise", 1e400), ("delimiters", "abc"), ("delimiters", 5)]
for _name in ("query_length", "builder_layers", "builder_heads", "builder_width", "lora_r", "lora_alpha", "min_gap"):
    WRONG += [(_name, value) for value in (-1, True, 2.0, "8", [8], 10**400, float("nan"))]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda value: repr(value)[:20])
def test_sizes_of_the_wrong_type_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"VisMemConfig.{name} must be"):
        vismem.VisMemConfig(**{name: value})


@pytest.mark.parametrize("value", [10**400, "x" * 10**6, ["x"] * 10**5])
@pytest.mark.parametrize("name", ["query_length", "short_length", "content"])
def test_long_values_are_shortened_in_messages(name, value):
    with pytest.raises(ValueError, match=rf"VisMemConfig.{name} must be .*\.\.\.$") as caught:
        vismem.VisMemConfig(**{name: value})
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("shape", [(), (0,), (0, 4)])
@pytest.mark.parametrize("name", ["memory.x.down.weight", "memory.builder.query_init", "memory.builder.blocks.x"])
def test_tensors_of_odd_shapes_are_refused(saved, name, shape):
    rewrite(saved[1], change_state=lambda state: state.update({name: torch.ones(shape)}))
    with pytest.raises(ValueError, match="does not match its"):
        load(saved)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["memory.long.log_gain", "tokens.invocation", "memory.builder.query_init"])
def test_weights_that_are_not_finite_are_refused_by_name(saved, part, value):
    def poison(state):
        state[part].view(-1)[0] = value

    rewrite(saved[1], change_state=poison)
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}: tensor {part} has 1 values that are not finite") as caught:
        load(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_not_floating_are_refused_by_name(saved, dtype):
    rewrite(saved[1], change_state=lambda state: state.update({"tokens.end": state["tokens.end"].to(dtype)}))
    with pytest.raises(ValueError, match=r"tensor tokens.end is .*, not floating point"):
        load(saved)


def test_weights_that_overflow_in_the_requested_dtype_are_refused(saved):
    rewrite(saved[1], change_state=lambda state: state["tokens.end"].fill_(1e6))
    assert load(saved).tokens.end.max() == 1e6
    with pytest.raises(ValueError, match=r"loaded as float16: tensor tokens.end has"):
        load(saved, memory_dtype=torch.float16)


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", b"\x08" + b"\0" * 7 + b"{" * 8]
)
def test_invalid_headers_are_refused(saved, content):
    rewrite(saved[1], content=content)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        load(saved)


def test_a_memory_that_is_not_finite_is_not_saved_over_a_good_one(saved):
    model = load(saved)
    before = {path.name: path.read_bytes() for path in saved[1].iterdir()}
    with torch.no_grad():
        model.memory.long.log_gain.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"is not saved to .*: tensor memory.long.log_gain has 1 values"):
        model.save_pretrained(saved[1])
    assert {path.name: path.read_bytes() for path in saved[1].iterdir()} == before


def test_sizes_of_soft_prompts_are_checked(tmp_path):
    tiny.equip("idefics3", content="soft").save_pretrained(tmp_path)
    assert load(("idefics3", tmp_path)).memory_config.content == "soft"
    rewrite(tmp_path, lambda config: config.update(short_length=32))
    with pytest.raises(ValueError, match="short_length is 32 in the config, but 4 in the weights"):
        load(("idefics3", tmp_path))


def test_adapters_are_checked_like_memories(tmp_path):
    model = tiny.equip("idefics3")
    adapter_of(model)
    save_adapter(model.base, tmp_path)
    state = load_file(tmp_path / ADAPTER_FILE)
    name = next(iter(state))
    save_file({**state, name: state[name] * torch.nan}, tmp_path / ADAPTER_FILE)
    with pytest.raises(ValueError, match=r"has .* values that are not finite"):
        load_adapter(tiny.equip("idefics3"), tmp_path)
    save_file(state, tmp_path / ADAPTER_FILE)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 10**9}))
    with pytest.raises(ValueError, match="no tensor has rank 1000000000"):
        load_adapter(tiny.equip("idefics3"), tmp_path)
