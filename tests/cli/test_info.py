"""Counts and estimates for a base that is only a config: counts against real modules, bytes against real tensors.

Nothing here loads weights: large bases are built on torch's meta device, and tiny ones are measured.
"""

from __future__ import annotations

import contextlib
import io
import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, DynamicCache, Qwen3Config, Qwen3ForCausalLM

import vismem
from vismem import cli
from vismem.cli.meta import CONFIGS, build_base, memory_parameters
from vismem.cli.remote_base import RemoteBase
from vismem.estimates import (
    Load,
    Shape,
    cache,
    inference,
    layer_activations,
    patch_cache,
    read_language,
    read_shape,
    seen_keys,
    training,
)

EVERY_FAMILY = True
PARTS = ("builder", "short", "long", "tokens")

# Billions of parameters, as model cards and papers print them (docs/speed.md says which); none for LLaVA-OneVision-1.5.
PUBLISHED = {
    "Qwen2.5-VL-3B": 3.75,
    "Qwen2.5-VL-7B": 8.29,
    "Qwen2.5-VL-32B": 33.45,
    "InternVL3.5-4B": 4.7,
    "InternVL3.5-8B": 8.5,
    "InternVL3.5-14B": 15.1,
    "InternVL3.5-38B": 38.4,
}
UNPUBLISHED = ["LLaVA-OneVision-1.5-4B", "LLaVA-OneVision-1.5-8B"]


def counted(model: vismem.VisMem) -> dict[str, int]:
    return {part: sum(p.numel() for p in model.parameters_of(part)) for part in PARTS}


def on_meta(name: str) -> torch.nn.Module:
    """One of the paper's bases without weights."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(CONFIGS / f"{name}.json"))


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main([str(argument) for argument in arguments])
    return code, *capsys.readouterr()


# Counts.


@pytest.mark.parametrize(
    "config", [{}, {"memory_init": "learned", "builder_layers": 1, "builder_width": 16, "lora_r": 3, "long_length": 8}]
)
def test_base_and_memory_are_counted_from_the_config_as_they_are_built(family, config, tmp_path):
    model = tiny.equip(family, **config)
    model.base.config.to_json_file(tmp_path / "config.json", use_diff=False)
    backbone = build_base(tmp_path / "config.json")
    assert read_shape(backbone) == read_shape(model.backbone)
    assert memory_parameters(backbone, model.memory_config) == counted(model)


@pytest.mark.parametrize(("name", "family"), [("Qwen2.5-VL-7B", "qwen2_5_vl"), ("InternVL3.5-38B", "internvl")])
def test_memory_of_a_large_base_is_counted_as_it_is_built(name, family):
    with torch.device("meta"):
        model = vismem.VisMem(on_meta(name), tiny.FAMILIES[family].processor(), vismem.VisMemConfig())
    parts = counted(model)
    assert memory_parameters(build_base(CONFIGS / f"{name}.json"), model.memory_config) == parts
    if name == "Qwen2.5-VL-7B":
        assert sum(p.numel() for p in model.base.parameters()) == 8_292_166_656
        assert parts == {"builder": 29_048_832, "short": 6_596_096, "long": 5_103_617, "tokens": 28_672}


@pytest.mark.parametrize("name", UNPUBLISHED)
@pytest.mark.parametrize("tied", [True, False])
def test_a_base_with_its_own_code_has_the_layers_of_its_config(name, tied):
    fields = json.loads((CONFIGS / f"{name}.json").read_text()) | {"tie_word_embeddings": tied}
    config = json.loads(json.dumps(fields), object_hook=lambda each: SimpleNamespace(**each))
    text = fields["text_config"] | {"model_type": "qwen3", "tie_word_embeddings": tied}
    with torch.device("meta"):
        base, language = RemoteBase(config), Qwen3ForCausalLM(Qwen3Config(**text))
    w, f = fields["vision_config"]["hidden_size"], fields["vision_config"]["intermediate_size"]
    block = 4 * w + (w * 3 * w + 3 * w) + (w * w + w) + (w * f + f) + (f * w + w)
    merger = 2 * w + (16 * w * w + 4 * w) + (4 * w * text["hidden_size"] + text["hidden_size"])
    start = 3 * 14 * 14 * w + w + w // fields["vision_config"]["num_heads"] // 2 + 2 * w
    tower = start + fields["vision_config"]["depth"] * block + merger
    assert sum(p.numel() for p in base.parameters()) == sum(p.numel() for p in language.parameters()) + tower


def test_a_base_with_its_own_code_has_the_parameters_of_that_code():
    base = tiny.FAMILIES["llavaonevision1_5"].build()
    with torch.device("meta"):
        outline = RemoteBase(base.config)
    ours, theirs = ({n: p.shape for n, p in each.named_parameters()} for each in (outline, base))
    assert ours == theirs


@pytest.fixture(scope="module")
def paper() -> dict[str, dict]:
    """What `vismem info --paper --json` says, by the config's name."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["info", "--paper", "--json"]) == 0
    names = {json.loads(path.read_text())["_name_or_path"]: path.stem for path in CONFIGS.glob("*.json")}
    return {names[facts["base"]["name"]]: facts for facts in json.loads(out.getvalue())}


def test_the_papers_bases_have_their_published_sizes(paper):
    assert set(paper) == {*PUBLISHED, *UNPUBLISHED}
    for name, billions in PUBLISHED.items():
        digits = len(str(billions).partition(".")[2])
        assert round(paper[name]["base"]["parameters"] / 1e9, digits) == billions, name


def test_memory_is_below_one_percent_of_the_papers_bases(paper):
    shares = {name: facts["memory"]["share"] for name, facts in paper.items()}
    assert max(shares, key=shares.get) == "Qwen2.5-VL-3B" and max(shares.values()) < 0.0095


# Bytes.


def test_a_checkpoint_has_the_bytes_that_were_counted(family, tmp_path):
    model = tiny.equip(family, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    content = (tmp_path / "vismem.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - header == 2 * sum(counted(model).values())


def test_keys_and_values_have_the_bytes_that_were_estimated(family):
    model = tiny.equip(family)
    shape, inputs = read_shape(model.backbone), tiny.prompts(model.processor, [tiny.message("What is on the table?")])
    kept = DynamicCache(config=model.base.config.get_text_config())
    with torch.no_grad():
        model.base(**inputs, **{model.backbone.cache_name: kept})
    found = sum(t.numel() * t.element_size() for layer in kept.layers for t in (layer.keys, layer.values))
    estimated = cache(shape, 1, inputs["input_ids"].shape[1], 4)
    if getattr(model.base.config.get_text_config(), "sliding_window", None):
        assert found <= estimated  # windows are not in the estimate
    else:
        assert found == estimated


def test_patches_have_the_bytes_that_were_estimated(family):
    model = tiny.equip(family)
    inputs = tiny.prompts(model.processor, [tiny.message("look again!", tiny.picture(0))])
    images = model.backbone.images(**{n: inputs[n] for n in model.backbone.image_inputs if n in inputs})
    encoded = model.memory.short.encode(images)
    found = sum(t.numel() * t.element_size() for patches in encoded for t in patches.keys_values)
    load = Load(visual_tokens=sum(image.tokens for image in images), bytes_each=4)
    shape = read_shape(model.backbone)
    estimated = patch_cache(shape, 1, load)
    first = 2 * shape.tower.width * shape.tower.layers * 4 * len(images)
    if hasattr(model.base.model, "image_newline"):  # the ends of rows of tiles are tokens without a patch
        assert found < estimated < 1.2 * found
    else:
        assert found - estimated in (0, first)  # a class token is one patch more of each image


def test_a_frozen_layer_keeps_what_was_estimated():
    """Bytes that a language model saves for the backward pass, without weights; attention saves slightly more."""
    config = Qwen3Config(
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=64,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16).requires_grad_(False).model
    saved: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows, length = 2, 96
    inputs = torch.randn(rows, length, 128, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=inputs, use_cache=False)
    shape = SimpleNamespace(language=read_language(config))
    each_layer = rows * length * (layer_activations(shape, Load()) + seen_keys(shape, Load()))
    assert sum(saved.values()) == pytest.approx(3 * each_layer, rel=0.15)


# Estimates.


@pytest.fixture
def seven(paper) -> tuple[Shape, dict[str, int]]:
    backbone = build_base(CONFIGS / "Qwen2.5-VL-7B.json")
    return read_shape(backbone), memory_parameters(backbone, vismem.VisMemConfig())


def test_estimates_are_the_sum_of_their_parts(seven):
    shape, parts = seven
    config, load = vismem.VisMemConfig(), Load()
    found = inference(shape, parts, config, load, 1)
    assert found["total"] == sum(value for name, value in found.items() if name != "total")
    assert found["weights"] == 2 * 8_292_166_656
    assert found["cache"] == 28 * 2 * 4 * 128 * (1024 + 128 + 256 + 2 * 8 + 2 * 16 + 4) * 2
    for stage in ("warmup", "stage1", "stage2"):
        found = training(shape, parts, config, load, stage, checkpointing=False)
        kept = [found[name] for name in ("weights", "memory", "optimizer", "start")]
        moments = [sum(found[moment].values()) for moment in ("rollout", "update")]
        assert found["total"] == sum(kept) + max(moments)
        assert found["widest"] == ("rollout", "update")[moments[1] > moments[0]]
        trained = parts["tokens"] if stage == "stage2" else sum(parts.values()) - parts["tokens"]
        assert (found["optimizer"], found["start"]) == (8 * trained, 4 * trained)
        assert found["update"]["gradients"] == 4 * trained
    assert "formation" not in found["update"]  # stage II is given the memories


@pytest.mark.parametrize(
    "more", [{"visual_tokens": 2048}, {"answer_tokens": 512}, {"micro_batch": 8}, {"invocations": 8}]
)
def test_more_work_needs_more_memory(seven, more):
    shape, parts = seven
    config = vismem.VisMemConfig()
    for checkpointing in (False, True):
        some, most = (
            training(shape, parts, config, load, "stage1", checkpointing=checkpointing)
            for load in (Load(), Load(**more))
        )
        assert sum(most["update"].values()) > sum(some["update"].values())
    plain, spared = (training(shape, parts, config, Load(), "stage1", checkpointing=c)["update"] for c in (False, True))
    assert sum(spared.values()) < sum(plain.values())


# The command.


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text((CONFIGS / "Qwen2.5-VL-3B.json").read_text())
    return tmp_path / "base"


def test_a_base_with_its_own_code_needs_none_of_it(capsys, tmp_path):
    fields = json.loads((CONFIGS / "LLaVA-OneVision-1.5-8B.json").read_text())
    fields["text_config"]["tie_word_embeddings"] = fields.pop("tie_word_embeddings")  # said in one place or the other
    fields["auto_map"] = {"AutoConfig": "configuration_that_is_not_here.Config"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    code, out, err = call(capsys, "info", "--base", tmp_path, "--json")
    assert (code, err) == (0, "") and json.loads(out)["base"]["parameters"] == 8_527_214_624


@pytest.mark.parametrize("file", [False, True])
def test_info_of_a_config_alone(capsys, folder, file):
    code, out, err = call(capsys, "info", "--base", folder / "config.json" if file else folder, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["base"]["parameters"] == 3_754_622_976 and facts["base"]["bytes"] == 2 * 3_754_622_976
    assert facts["memory"]["parameters"]["total"] == sum(facts["memory"]["parameters"][part] for part in PARTS)
    assert facts["memory"]["bytes"] == 2 * facts["memory"]["parameters"]["total"]
    assert facts["dtype"] == "bfloat16" and facts["estimates"]["assumptions"]["visual_tokens"] == 1024
    assert set(facts["estimates"]) == {"assumptions", "inference", "warmup", "stage1", "stage2"}

    code, out, err = call(capsys, "info", "--base", folder, "--visual-tokens", 77, "--dtype", "float32")
    assert (code, err) == (0, "")
    for words in ("3,754,622,976", "15.02 GB", "0.92 %", "77 visual", "answer 8", "stage II, checkpointing"):
        assert words in out


def test_paper_prints_a_table(capsys, tmp_path):
    for name in ("Qwen2.5-VL-3B", UNPUBLISHED[0]):
        (tmp_path / f"{name}.json").write_text((CONFIGS / f"{name}.json").read_text())
    code, out, err = call(capsys, "info", "--paper", tmp_path)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].split()[0] == "base" and len(lines[: lines.index("")]) == 1 + 2
    assert "All below 1 % of their base." in out
    assert all(len(line) <= 140 for line in lines)


def test_paper_reads_another_folder(capsys, folder):
    code, out, _ = call(capsys, "info", "--paper", folder.parent, "--json")
    assert code == 0 and [facts["base"]["parameters"] for facts in json.loads(out)] == [3_754_622_976]


def test_a_folder_with_weights_is_loaded(capsys, folder):
    (folder / "model.safetensors").write_bytes(b"")
    code, _, err = call(capsys, "info", "--base", folder)
    assert code == 1 and "cannot load base" in err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no config.json"]),
        ('{"model_type"', ["config.json", "JSON with a model_type"]),
        ("[1]", ["JSON with a model_type"]),
        ('{"hidden_size": 8}', ["JSON with a model_type"]),
        ('{"model_type": "llama"}', ["'llama'", "qwen2_5_vl"]),
        ('{"model_type": "nobody_knows"}', ["'nobody_knows'", "qwen2_5_vl"]),
        ('{"model_type": "qwen2_5_vl", "text_config": {"hidden_size": "wide"}}', ["config.json"]),
    ],
)
def test_configs_that_cannot_be_counted_are_refused(capsys, tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    code, out, err = call(capsys, "info", "--base", tmp_path)
    assert (code, out) == (1, "") and err.startswith("vismem: error: ") and err.count("\n") == 1
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--paper", "nowhere"], 1, "no such folder"),
        (["--paper", "."], 1, "neither NAME.json nor NAME/config.json"),
        (["--paper", "--base", "pocket"], 2, "--paper or --base"),
        (["--paper", "--checkpoint", "memory"], 2, "--checkpoint needs a base with weights"),
        (["--paper", "--visual-tokens", "0"], 2, "--visual-tokens"),
    ],
)
def test_misuse_is_one_line(capsys, tmp_path, monkeypatch, arguments, code, word):
    monkeypatch.chdir(tmp_path)
    found, out, err = call(capsys, "info", *arguments)
    assert (found, out) == (code, "") and word in err and err.count("\n") == 1
