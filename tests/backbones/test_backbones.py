"""Each backbone matches transformers' own classes: patches, keys and values, projection, order."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import vismem
from vismem import backbones
from vismem.backbones import FAMILIES, Image, backbone_of
from vismem.memory.short_term import averaging, coarse_grid, pool, share

EVERY_FAMILY = True
EVERY_TOWER = [
    pytest.param(name, variant, id="-".join([name, *variant]))
    for name, family in tiny.FAMILIES.items()
    for variant in ({}, *getattr(family, "VARIANTS", []))
]


def one_image(model, size=(32, 32)):
    batch = tiny.prompts(model.processor, [tiny.message("look", tiny.picture(0, size))])
    inputs = {name: batch[name] for name in model.backbone.image_inputs}
    return batch, inputs, model.backbone.images(**inputs)


def native_values(model, inputs) -> list[torch.Tensor]:
    """What the base's own tower computes as values, block by block, for one picture and all its tiles."""
    found = []

    def keep(_module, _args, output):
        found.append(output.detach())

    target = model.backbone.tower_targets[-1].split(".")[-1]  # values, or queries, keys and values in one
    parts = [dict(block.named_modules()) for block in model.backbone.blocks]
    modules = [part[name] for part in parts for name in part if name.split(".")[-1] == target]
    handles = [module.register_forward_hook(keep) for module in modules]
    model.backbone.image_features(**inputs)
    for handle in handles:
        handle.remove()
    width = model.backbone.vision_size
    return [output.reshape(-1, output.shape[-1])[:, -width:] for output in found]


def projected(family, model, inputs) -> torch.Tensor:
    """The base's own projector outputs [t, d] for one picture and all its tiles."""
    own = getattr(tiny.FAMILIES[family], "projected", None)
    if own is not None:
        return own(model.base, inputs)
    return torch.cat([*model.backbone.image_features(**inputs).pooler_output]).view(-1, model.backbone.hidden_size)


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (24, 56)])
@pytest.mark.parametrize(("family", "variant"), EVERY_TOWER)
def test_patches_are_the_towers_own(family, variant, size):
    """With the adapter off, every block's values equal those of the base's tower: masks, windows and rotation fit."""
    model = tiny.equip(family, base=variant)
    _, inputs, images = one_image(model, size)
    with torch.no_grad():
        patches = model.backbone.encode(images)
        native = native_values(model, inputs)
    for depth, values in enumerate(native):
        ours = torch.cat([tile.keys_values[depth][1].transpose(0, 1).flatten(1) for tile in patches])
        if len(values) > len(ours):  # the native tower also runs the processor's padding
            side = round(len(values) ** 0.5)
            values = values.view(side, side, -1)[: images[0].grid[0], : images[0].grid[1]].flatten(0, 1)
        assert torch.allclose(ours, values, atol=1e-4)


@pytest.mark.parametrize(("family", "variant"), EVERY_TOWER)
def test_projection_and_raster_order_are_the_bases(family, variant):
    """Patches in raster order, gathered into blocks, project to exactly the base's visual tokens."""
    model = tiny.equip(family, base=variant)
    backbone, side = model.backbone, model.backbone.merge
    _, inputs, images = one_image(model)
    with torch.no_grad():
        grid = images[0].grid
        hidden, rotary = backbone.embed_patches(images), backbone.patch_rotary(grid)
        for depth, block in enumerate(backbone.blocks):
            q, k, v = backbone.qkv(block, hidden, rotary)
            hidden = backbone.finish(block, hidden, backbone.attend_patches(depth, grid, q, k, v))
        raster = backbone.to_raster(hidden, grid)  # [views, height, width, d_vision]
        blocks = raster.reshape(-1, grid[0] // side, side, grid[1] // side, side, 32).transpose(2, 3)
        ours = backbone.project(blocks.reshape(len(images), -1, 32)).flatten(0, 1)
        native = projected(family, model, inputs)
    assert torch.allclose(ours, native, atol=1e-4)


def test_full_length_pool_is_the_image_itself():
    """As many vectors as the image has visual tokens: the start of memory is the patches, in block order."""
    embedded = torch.randn(4, 6, 5)
    vectors, centres = pool(embedded, 6, 2)
    expected = embedded.reshape(2, 2, 3, 2, 5).transpose(1, 2).reshape(24, 5)
    assert torch.equal(vectors, expected)
    rows, columns = centres[:, 0].long(), centres[:, 1].long()
    assert torch.equal(embedded[rows, columns], vectors)


def test_coarse_pool_averages_regions():
    embedded = torch.arange(16.0).reshape(4, 4, 1)
    vectors, centres = pool(embedded, 1, 2)
    assert vectors.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert centres.tolist() == [[0.5, 0.5], [0.5, 2.5], [2.5, 0.5], [2.5, 2.5]]


def test_an_image_smaller_than_its_share_repeats_cells():
    weights = averaging(2, 4, torch.device("cpu"))
    assert weights.tolist() == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert averaging(3, 2, torch.device("cpu")).sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [(8, [16, 48], [2, 6]), (8, [5], [8]), (4, [1, 1000], [1, 3]), (2, [1, 1, 1], [1, 0, 1]), (4, [1] * 4, [1] * 4)],
)
def test_shares_are_whole_and_sum_to_the_total(total, weights, expected):
    assert share(total, weights) == expected
    assert sum(share(total, weights)) == total


def test_coarse_grid_keeps_the_shape():
    assert coarse_grid(16, (8, 8)) == (4, 4)
    assert coarse_grid(8, (4, 8)) == (2, 4)
    assert coarse_grid(8, (40, 5)) == (8, 1)


def test_pooled_untrained_memory_resembles_the_image(family):
    """An untrained memory at full length is close to a second look: nearer to its own image than to another."""
    looks_again(family, (32, 32))


@pytest.mark.parametrize("size", [(64, 64), (48, 32), (24, 56)])
@pytest.mark.parametrize("family", ["internvl", "llava_next", "llava_onevision"])
def test_pooled_untrained_memory_resembles_every_tile(family, size):
    """The same for a picture in tiles: memory follows each of them, in order, and leaves padding out."""
    looks_again(family, size)


def looks_again(family, size) -> None:
    model = tiny.equip(family)
    side = model.backbone.merge
    with torch.no_grad():
        for name, parameter in model.memory.short.named_parameters():
            if "adapter" in name or name in ("memory_init", "query_mix"):
                parameter.zero_()
        _, inputs, images = one_image(model, size)
        # No vectors for newlines here: one for each patch, or block of patches, that shows the picture.
        images = [replace(image, tokens=torch.zeros(image.grid)[image.part].numel() // side**2) for image in images]
        positions = sum(image.tokens for image in images) * side**2
        model.memory.short.memory_init = nn.Parameter(torch.zeros(positions, 32))
        model.memory.short.query_mix = nn.Parameter(torch.zeros(positions, 4))
        memory = model.memory.short(torch.randn(1, 4, 48), [model.memory.short.encode(images)])[0]
        batch = tiny.prompts(model.processor, [tiny.message("look", tiny.picture(7, size))])
        elsewhere = {name: batch[name] for name in model.backbone.image_inputs}
        found = []
        for given in (inputs, elsewhere):
            views = projected(family, model, given).view(len(images), *(cells // side for cells in images[0].grid), -1)
            found.append(torch.cat([view[image.part].flatten(0, 1) for view, image in zip(views, images, strict=True)]))
        own, other = found
    assert memory.shape == own.shape
    assert (memory - own).norm() < 0.5 * (memory - other).norm()


# What the language model reads.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_tokens_start_as_the_delimiter_is_read_and_written(family, dtype):
    """Without noise they are the delimiter: the same input embedding, and the same logit."""
    model = tiny.equip(family, dtype, token_noise=0.0)
    delimiter = model.processor.tokenizer.convert_tokens_to_ids(".")
    ids = torch.tensor([model.tokens.ids])
    real = model.base.get_input_embeddings()(torch.tensor(delimiter))
    assert torch.equal(model.tokens.embed(ids), real.expand(1, 4, -1))
    for kind in ("short", "long"):
        for which in ("invocation", "end"):
            assert torch.equal(model.tokens.row(kind, which), real)
    hidden = torch.randn(3, model.backbone.hidden_size, dtype=dtype)
    logits = model.tokens.extend(model.backbone.head(hidden), hidden)
    assert torch.allclose(
        logits[:, ids[0]], logits[:, [delimiter]].expand(-1, 4), atol=1e-2 if dtype != torch.float32 else 1e-5
    )


def test_memory_stands_at_the_scale_of_words(family):
    """Long memory has the RMS of the words as the language model reads them; so have untrained queries."""
    model = tiny.equip(family)
    words = model.base.get_input_embeddings()(torch.arange(model.tokens.base_vocabulary)).float()
    rms = float(words.pow(2).mean().sqrt())
    with torch.no_grad():
        model.memory.long.log_gain.zero_()
        query = torch.randn(2, 4, 48)
        memory = model.memory.long(query, [words[:3], words[5:7]])
        model.memory.long.log_gain.fill_(1.0)
        larger = model.memory.long(query, [words[:3], words[5:7]])
    assert torch.allclose(memory.pow(2).mean(-1).sqrt(), torch.full((2, 4), rms), rtol=1e-4)
    assert torch.allclose(larger, memory * math.e, rtol=1e-4)  # the gain is kept as its logarithm
    assert torch.allclose(model.memory.long.table_mean, words.mean(0), atol=1e-5)
    fresh = vismem.VisMem(*tiny.base_and_processor(family), vismem.VisMemConfig())
    query = fresh.memory.builder([torch.randn(6, 48)], [torch.randn(5, 48)])
    assert 0.7 < float(query.detach().pow(2).mean().sqrt()) / rms < 1.4


def test_a_conversation_is_read_as_the_base_reads_it(family):
    """Without an invocation the training forward is the base's, with images in later turns too."""
    model = tiny.equip(family)
    first, second, answer = (
        tiny.message("A red cup?", tiny.picture(0)),
        tiny.message("look", tiny.picture(1)),
        "bright;",
    )
    turns = [*first, {"role": "assistant", "content": answer}, *second, {"role": "assistant", "content": answer}]
    batch = tiny.prompts(model.processor, [turns, tiny.message("again", tiny.picture(2))])
    with torch.no_grad():
        expected = model.base(**batch).logits
        found = model(**batch, prompt_length=12).logits[..., : expected.shape[-1]]
    real = batch["attention_mask"].bool()
    outside = [i for i in range(expected.shape[-1]) if i not in model.tokens.ids]
    assert torch.allclose(found[real][:, outside], expected[real][:, outside], atol=1e-4)


# One family's own.


@pytest.mark.parametrize("text", ["qwen3", "qwen3_moe"])
def test_internvl_works_with_other_text_models(text):
    model = tiny.equip("internvl", base={"text": text})
    batch = tiny.mixed_batch(model.processor)
    expected = model.base.generate(**batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False, invocation="off"), expected)
    policy = vismem.invocation.Forced([(0, 1, "short"), (2, 3, "long")])
    out = model.generate(**batch, max_new_tokens=12, invocation=policy, return_dict_in_generate=True)
    assert [len(row) for row in out.invocations] == [1, 0, 1]


def test_internvl_tiles_are_images_and_the_class_token_is_seen():
    model = tiny.equip("internvl")
    batch, inputs, images = one_image(model, (48, 32))
    assert len(images) == 7  # three by two tiles and the whole
    assert all(torch.equal(image.pixels, tile) for image, tile in zip(images, inputs["pixel_values"], strict=True))
    places = batch["input_ids"] == model.backbone.image_token_id
    assert places.sum() == sum(image.tokens for image in images) == 28
    assert len(model.backbone.rows_of_images(places, images)[0]) == 7
    query = torch.randn(1, 4, 48)
    with torch.no_grad():
        before = model.memory.short.encode(images)
        assert before[0].keys_values[0].shape[2] == 17 and before[0].embedded.shape == (4, 4, 32)
        for layer in before[0].keys_values:
            layer[:, :, 0] += 1  # the class token's keys and values alone
        after = model.memory.short.encode(images)
        assert not torch.allclose(model.memory.short(query, [before]), model.memory.short(query, [after]), atol=1e-4)


def test_internvl_refuses_another_layer_of_the_tower():
    base = tiny.FAMILIES["internvl"].build()
    base.config.vision_feature_layer = -2
    with pytest.raises(ValueError, match="vision_feature_layer=-2"):
        backbone_of(base)


def test_gemma3_crops_are_images():
    """Pan-and-scan: the whole picture and its crops, in order, each with its own tokens."""
    model = tiny.equip("gemma3")
    batch = model.processor.apply_chat_template(
        [tiny.message("look", tiny.picture(0, (72, 24))), tiny.message("again")],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "do_pan_and_scan": True, "pan_and_scan_min_crop_size": 8},
    )
    images = model.backbone.images(pixel_values=batch["pixel_values"])
    places = batch["input_ids"] == model.backbone.image_token_id
    assert [image.tokens for image in images] == [4] * 4
    assert [len(row) for row in model.backbone.rows_of_images(places, images)] == [4, 0]
    expected = model.base.generate(**batch, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=12, do_sample=False, invocation="off"), expected)


def test_gemma3_image_tokens_look_both_ways_in_training():
    """Token types reach the training forward: an image's first token sees its last."""
    model = tiny.equip("gemma3")
    batch = tiny.prompts(model.processor, [tiny.message("look", tiny.picture(0))])
    prompt = batch["input_ids"].shape[1]
    with torch.no_grad():
        both = model(**batch, prompt_length=prompt).logits
        causal = model(**{**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}, prompt_length=prompt)
    assert not torch.allclose(both[:, -1], causal.logits[:, -1], atol=1e-3)


def test_gemma3_slots_keep_to_the_window():
    """With preallocated keys and values, windowed and full layers give the same answers with memory in between."""
    model = tiny.equip("gemma3")
    settings = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None}
    settings["invocation"] = vismem.invocation.Forced([(0, 2, "short"), (1, 9, "long"), (1, 20, "short")])
    batch = tiny.mixed_batch(model.processor)
    expected = model.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, **settings, cache_implementation="static"), expected)


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_vl_moe"])
def test_deepstack_keeps_to_the_images_places(name):
    """What the tower's early blocks saw is added at the prompt's visual tokens, in decoding and in training; memory
    takes no part in it."""
    model = tiny.equip(name)
    batch = tiny.mixed_batch(model.processor)
    places = batch["input_ids"] == model.backbone.image_token_id
    language, added = model.backbone.language_model, []
    plain = language._deepstack_process

    def process(hidden, where, features):
        assert len(features) == where.sum()
        added.append(where)
        return plain(hidden, where, features)

    language._deepstack_process = process
    policy = vismem.invocation.Forced([(0, 1, "short"), (1, 0, "long"), (2, 3, "short")])
    out = model.generate(**batch, max_new_tokens=6, invocation=policy, return_dict_in_generate=True)
    assert len(added) == 2 and all(torch.equal(where, places) for where in added)  # two layers, the prompt once
    mask = torch.cat([batch["attention_mask"], torch.ones_like(out.sequences[:, places.shape[1] :])], dim=1)
    inputs = {**batch, "input_ids": out.sequences, "attention_mask": mask}
    added.clear()
    with torch.no_grad():
        model(**inputs, prompt_length=places.shape[1])
    assert len(added) == 2 and all(torch.equal(where, places[:, : where.shape[1]]) for where in added)
    # The query is built from the projector's outputs as they are.
    features = model.backbone.image_features(**{name: batch[name] for name in model.backbone.image_inputs})
    assert torch.equal(torch.cat(model.backbone.visual_states(places, features)), torch.cat(features.pooler_output))


def test_without_deepstack_the_base_reads_something_else():
    """The test above and the replay of answers can fail."""
    model = tiny.equip("qwen3_vl")
    batch = tiny.mixed_batch(model.processor)
    plain, prompt = model.backbone.image_features, batch["input_ids"].shape[1]

    def shallow(**vision):
        features = plain(**vision)
        features.deepstack_features = [[torch.zeros_like(f) for f in layer] for layer in features.deepstack_features]
        return features

    with torch.no_grad():
        expected = model(**batch, prompt_length=prompt).logits
        model.backbone.image_features = shallow
        found = model(**batch, prompt_length=prompt).logits
    assert not torch.allclose(found[:, -1], expected[:, -1], atol=1e-3)


def test_a_mixture_of_experts_is_adapted_in_its_attention_alone():
    model = tiny.equip("qwen3_vl_moe")
    names = set(model.memory.long.adapter.layers)
    layers = range(len(model.backbone.language_model.layers))
    assert names == {f"layers/{i}/self_attn/{part}_proj" for i in layers for part in "qv"}


def test_llava_onevision1_5_encodes_an_image_once_and_sees_its_class_token():
    model = tiny.equip("llavaonevision1_5")
    batch, _, images = one_image(model, (48, 32))
    own, encoded = model.base.model, []
    plain = own.get_image_features
    own.get_image_features = lambda *args, **kwargs: encoded.append(1) or plain(*args, **kwargs)
    model.generate(**batch, max_new_tokens=4, invocation=vismem.invocation.Forced([(0, 1, "short")]))
    assert len(encoded) == 1  # for the prompt and for the query
    query = torch.randn(1, 4, 48)
    with torch.no_grad():
        before = model.memory.short.encode(images)
        assert before[0].keys_values[0].shape[2] == 97 and before[0].embedded.shape == (8, 12, 32)
        for layer in before[0].keys_values:
            layer[:, :, 0] += 1  # the class token's keys and values alone
        after = model.memory.short.encode(images)
        assert not torch.allclose(model.memory.short(query, [before]), model.memory.short(query, [after]), atol=1e-4)


def test_llava_onevision1_5_refuses_a_video():
    model = tiny.equip("llavaonevision1_5")
    batch, _, _ = one_image(model)
    with pytest.raises(ValueError, match="reads images only; leave pixel_values_videos out"):
        model.generate(**batch, pixel_values_videos=torch.zeros(4, 48), max_new_tokens=1)


def test_llava_onevision1_5_refuses_a_tower_without_its_frequencies():
    """Loading the code as written for transformers 4 leaves them uninitialised."""
    base = tiny.FAMILIES["llavaonevision1_5"].build()
    base.model.visual.rotary_pos_emb.inv_freq.fill_(1e-16)
    with pytest.raises(ValueError, match="inv_freq starts with 1e-16, not 1") as error:
        backbone_of(base)
    assert "\n" not in str(error.value)


# Families that are not here.


def test_the_guides_example_passes_its_checks(monkeypatch):
    """The family that docs/extend.md defines passes the checks that it names."""
    guide = (Path(__file__).parents[2] / "docs" / "extend.md").read_text(encoding="utf-8")
    written: dict = {}
    exec(guide.split("```python\n")[1].split("```")[0], written)
    monkeypatch.setattr(backbones, "FAMILIES", [])
    monkeypatch.setattr(tiny, "MADE", {})  # no copies of models with another backbone, and none of these for others
    backbones.register(written["InternVLBackbone"])
    for variant in ({}, *tiny.FAMILIES["internvl"].VARIANTS):
        assert type(tiny.equip("internvl", base=variant).backbone) is written["InternVLBackbone"]
        test_patches_are_the_towers_own("internvl", variant, (48, 32))
        test_projection_and_raster_order_are_the_bases("internvl", variant)


def test_unsupported_family_says_what_is_supported():
    class Stranger(nn.Module):
        class config:
            model_type = "stranger"

    with pytest.raises(ValueError, match=r"'stranger'.*gemma3.*idefics3.*qwen2_5_vl.*extend\.md") as error:
        backbone_of(Stranger())
    assert "\n" not in str(error.value)


def test_a_text_only_model_is_refused_by_name():
    text = tiny.FAMILIES["internvl"].build().model.language_model
    with pytest.raises(ValueError, match=r"'qwen2'.*vision-language model.*extend\.md"):
        vismem.VisMem(text, tiny.FAMILIES["internvl"].processor())


def test_a_custom_family_can_be_registered(monkeypatch):
    monkeypatch.setattr(backbones, "FAMILIES", list(FAMILIES))

    @backbones.register
    class Own(backbones.Backbone):
        model_types = ("stranger", "idefics3")

    class Stranger(nn.Module):
        class config:
            model_type = "stranger"

    assert type(backbone_of(Stranger())) is Own
    assert type(backbone_of(tiny.FAMILIES["idefics3"].build())) is Own  # before those of the package
    assert type(backbone_of(tiny.FAMILIES["internvl"].build())) is not Own
    for nothing in (Image, nn.Module, backbones.Backbone, "idefics3"):
        with pytest.raises(TypeError, match="model_types"):
            backbones.register(nothing)


def test_every_family_has_tests():
    covered = set(tiny.FAMILIES)
    assert all(covered & set(family.model_types) for family in FAMILIES)


def test_fused_projection_leaves_keys_alone():
    """LoRA on a fused projection changes queries and values only (Tab. 4 names these two)."""
    model = tiny.equip("qwen2_5_vl")
    adapter = model.memory.short.adapter
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    block, x = model.backbone.blocks[0], torch.randn(5, 32)
    plain = block.attn.qkv(x)
    with adapter.on():
        adapted = block.attn.qkv(x)
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(plain.chunk(3, -1), adapted.chunk(3, -1), strict=True)]
    assert same == [False, True, False]
