"""`vismem.load`: one way to a model, whatever was named."""

from __future__ import annotations

import httpx
import huggingface_hub
import pytest
import tiny
import torch
from huggingface_hub import errors
from safetensors.torch import load_file

import vismem
from vismem import hub
from vismem.bundled import MEMORY_PATH, is_pocket
from vismem.checkpoint import WEIGHTS_FILE
from vismem.loading import LoadError


@pytest.mark.parametrize("name", [None, "pocket", MEMORY_PATH])
def test_the_pocket_model_by_default_by_name_and_by_folder(name):
    model = vismem.load(name, device="cpu")
    assert is_pocket(model.name_or_path) and model.dtype == torch.float32
    shipped = load_file(MEMORY_PATH / WEIGHTS_FILE)["memory.builder.query_init"]
    assert torch.equal(model.memory.builder.query_init, shipped.float())


def test_a_base_without_a_memory_gets_the_same_untrained_one(tmp_path):
    base, processor = tiny.base_and_processor("qwen2_5_vl")
    base.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    one, two = vismem.load(tmp_path, device="cpu"), vismem.load(str(tmp_path), device="cpu")
    for (name, first), second in zip(one.memory.named_parameters(), two.memory.parameters(), strict=True):
        assert torch.equal(first, second), name


def test_a_memory_with_its_base_elsewhere(tmp_path):
    model = tiny.equip("qwen2_5_vl")
    model.base.save_pretrained(tmp_path / "base")
    model.processor.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "memory")
    loaded = vismem.load(tmp_path / "memory", base=str(tmp_path / "base"), device="cpu")
    assert torch.equal(loaded.memory.builder.query_init, model.memory.builder.query_init)


def test_an_unknown_name_is_one_line(tmp_path):
    with pytest.raises(LoadError, match="is not a VisMem checkpoint: it has no vismem_config"):
        vismem.load(tmp_path)


def answer(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("HEAD", "https://hub"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.GatedRepoError("", response=answer(403)), "base owner/name is gated: ask for access"),
        (errors.RepositoryNotFoundError("", response=answer(404)), "no such repository that you may read"),
        (errors.RemoteEntryNotFoundError("", response=answer(404)), "is not a base: the repository has no config.json"),
        (httpx.ConnectError("down"), "nothing downloaded earlier, and the hub cannot be reached"),
        (None, None),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, error, words):
    def ask(url, token, timeout):
        if error is not None:
            raise error

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    notes: list[str] = []
    if error is None:
        assert hub.find("owner/name", "config.json", "base", notes.append) == ("owner/name", False)
        assert notes == ["note: downloading owner/name from the hub"]
    else:
        with pytest.raises(LoadError, match=words):
            hub.find("owner/name", "config.json", "base", notes.append)


@pytest.mark.parametrize("name", ["nowhere", "./a/b", "~/nowhere", "/nowhere", "a/b/c", "own er/name", "a/b--c"])
def test_other_names_are_not_looked_up(monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *given, **more: pytest.fail("asked"))
    with pytest.raises(LoadError):
        hub.find(name, "config.json", "base")
