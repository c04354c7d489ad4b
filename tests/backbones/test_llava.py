"""What is specific to LLaVA's families: the layer that features come from, class tokens, tiles and padding."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers.models.llava_next.modeling_llava_next import unpad_image

import vismem
from vismem.backbones import backbone_of
from vismem.backbones.llava_next import deal, inside, overlap

TILED = ["llava_next", "llava_onevision"]
SHORT = vismem.invocation.Forced([(0, 1, "short"), (0, 4, "long"), (0, 9, "short")])


def seen(model, *conversation):
    """A batch, its image inputs, and its images row by row."""
    batch = tiny.prompts(model.processor, list(conversation))
    inputs = {name: batch[name] for name in model.backbone.image_inputs}
    places = batch["input_ids"] == model.backbone.image_token_id
    return batch, inputs, model.backbone.rows_of_images(places, model.backbone.images(**inputs))


def writes_as_the_base(model, batch) -> None:
    """Off is the base's words; with memory, the training forward gives the log-probabilities of decoding."""
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.base.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, **settings, invocation="off"), expected)
    wanted = {"invocation": SHORT, "return_dict_in_generate": True, "output_logits": True}
    out = model.generate(**batch, **settings, **wanted)
    assert [found.kind for found in out.invocations[0]] == ["short", "long", "short"]
    prompt, length = batch["input_ids"].shape[1], out.sequences.shape[1]
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, length - prompt), value=1)
    inputs = {**batch, "input_ids": out.sequences, "attention_mask": mask}
    with torch.no_grad():
        replayed = model(**inputs, prompt_length=prompt)
    width = min(model.tokens.ids)
    put_in = {place for found in out.invocations[0] for place in (found.position, found.position + 1)}
    for step in set(range(len(out.logits))) - put_in:
        ours = replayed.logits[0, prompt + step - 1, :width].log_softmax(-1)
        assert torch.allclose(ours, out.logits[step][0, :width].log_softmax(-1), atol=1e-4)


# The layer and the class token.


@pytest.mark.parametrize(("layer", "count"), [(-1, 3), (-2, 2), (-3, 1), (1, 1), (3, 3)])
def test_blocks_are_those_that_features_come_from(layer, count):
    """Later blocks are not run and carry no adapter: it would never learn."""
    model = tiny.equip("llava", base={"layer": layer})
    assert len(model.backbone.blocks) == count
    assert len(model.memory.short.adapter.layers) == 2 * count
    with torch.no_grad():
        for block in model.backbone.tower.encoder.layers[count:]:
            for parameter in block.parameters():
                parameter.fill_(float("nan"))
    _, _, rows = seen(model, tiny.message("look", tiny.picture(0)))
    memory = model.memory.short(torch.randn(1, 4, 48), [model.memory.short.encode(rows[0])])
    assert not memory.isnan().any()


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_the_class_token_is_seen_and_not_pooled(family):
    model = tiny.equip(family)
    _, _, rows = seen(model, tiny.message("look", tiny.picture(0)))
    query = torch.randn(1, 4, 48)
    with torch.no_grad():
        before, after = (model.memory.short.encode(rows[0]) for _ in range(2))
        assert all(patches.keys_values[0].shape[2] == 17 for patches in before)
        assert all(patches.embedded.shape == (4, 4, 32) for patches in before)
        for patches in after:
            for layer in patches.keys_values:
                layer[:, :, 0] += 1  # the class token's keys and values alone
        assert not torch.allclose(model.memory.short(query, [before]), model.memory.short(query, [after]), atol=1e-4)


def test_a_class_token_that_the_base_keeps_is_one_more_token():
    model = tiny.equip("llava", base={"strategy": "full"})
    model.processor.vision_feature_select_strategy = "full"
    batch, _, rows = seen(model, tiny.message("look", tiny.picture(0), tiny.picture(1)))
    assert [image.tokens for image in rows[0]] == [17, 17]
    writes_as_the_base(model, batch)


def test_a_siglip_tower_has_no_class_token():
    model = tiny.equip("llava", base=tiny.FAMILIES["llava"].SIGLIP)
    model.processor.vision_feature_select_strategy, model.processor.num_additional_image_tokens = "full", 0
    batch, _, rows = seen(model, tiny.message("look", tiny.picture(0)))
    assert [image.tokens for image in rows[0]] == [16]
    assert model.memory.short.encode(rows[0])[0].keys_values[0].shape[2] == 16
    writes_as_the_base(model, batch)


@pytest.mark.parametrize("family", ["llava", *TILED])
@pytest.mark.parametrize("layer", [[-2, -1], 0, 4, -4])
def test_other_layers_are_refused(family, layer):
    base = tiny.FAMILIES[family].build()
    base.config.vision_feature_layer = layer
    with pytest.raises(ValueError, match=r"one layer.*vision_feature_layer=.*extend\.md") as error:
        backbone_of(base)
    assert "\n" not in str(error.value)


def test_other_towers_are_refused():
    base = tiny.FAMILIES["llava"].build()
    base.config.vision_config.model_type = "pixtral"
    with pytest.raises(ValueError, match=r"clip_vision_model, siglip_vision_model.*'pixtral'"):
        backbone_of(base)
    base.config.vision_config.model_type = "siglip_vision_model"
    with pytest.raises(ValueError, match=r"'default' drops the class token.*'full'"):
        backbone_of(base)


def test_a_class_token_among_tiles_is_refused():
    base = tiny.FAMILIES["llava_next"].build()
    base.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match=r"lays tiles side by side.*'default'"):
        backbone_of(base)


# Tiles.


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (32, 48), (24, 56), (20, 60), (64, 64), (44, 64), (64, 44)])
@pytest.mark.parametrize("family", TILED)
def test_tiles_put_together_are_the_bases_tokens(family, size):
    """Views in order, padding where the base finds it, newlines counted: what each view shows is what is read."""
    model = tiny.equip(family)
    base, (batch, inputs, rows) = model.base, seen(model, tiny.message("look", tiny.picture(0, size)))
    images = rows[0]
    assert (batch["input_ids"] == model.backbone.image_token_id).sum() == sum(image.tokens for image in images)
    with torch.no_grad():
        native = torch.cat([*model.backbone.image_features(**inputs).pooler_output])
        views = tiny.FAMILIES[family].projected(base, inputs).view(-1, 4, 4, 48)
    high, wide = model.backbone.tiles((size[1], size[0]))
    assert len(images) == 1 + high * wide and images[0].tokens == 16
    assert torch.allclose(views[0].flatten(0, 1), native[:16])
    # The tiles' parts, row by row, are the picture without its padding.
    tiles = [view[image.part] for view, image in zip(views[1:], images[1:], strict=True)]
    lines = [torch.cat(tiles[row * wide : (row + 1) * wide], dim=1) for row in range(high)]
    picture = torch.cat(lines)
    height, width = picture.shape[:2]
    rest = native[16:]
    if len(rest) == height * (width + 1):
        assert torch.allclose(picture, rest.view(height, width + 1, -1)[:, :-1], atol=1e-5)
    else:  # thinned out
        assert family == "llava_onevision" and len(rest) < height * width
    shares = [len(tile.flatten(0, 1)) * len(rest) / (height * width) for tile in tiles]
    assert all(abs(image.tokens - share) < 1 for image, share in zip(images[1:], shares, strict=True))


@pytest.mark.parametrize("size", [(64, 64), (24, 56)])
@pytest.mark.parametrize("family", TILED)
def test_a_picture_in_tiles_is_read_as_the_base_reads_it(family, size):
    """Thinned tokens, padding and, in the next row, no picture at all."""
    model = tiny.equip(family)
    batch, _, rows = seen(model, tiny.message("look", tiny.picture(0, size)), tiny.message("again"))
    assert len(rows[0]) >= 3 and not rows[1]
    writes_as_the_base(model, batch)


def test_thinned_tokens_are_fewer_than_patches():
    model = tiny.equip("llava_onevision")
    _, _, rows = seen(model, tiny.message("look", tiny.picture(0, (64, 64))))
    assert [image.tokens for image in rows[0]] == [16, 10, 11, 11, 10]  # six rows of six and a newline, and not 8 of 8
    assert len(model.memory.short.encode(rows[0])) == 5


def test_of_several_pictures_each_is_one_padded_view():
    model = tiny.equip("llava_onevision")
    several = tiny.message("look", tiny.picture(0, (64, 32)), tiny.picture(1, (32, 64)))
    batch, _, rows = seen(model, several, tiny.message("again", tiny.picture(2, (64, 64))))
    assert len(rows[1]) == 5
    assert [image.tokens for image in rows[0]] == [17, 17]
    assert [image.part for image in rows[0]] == [(slice(1, 3), slice(0, 4)), (slice(0, 4), slice(1, 3))]
    shapes = [patches.embedded.shape for patches in model.memory.short.encode(rows[0])]
    assert shapes == [(2, 4, 32), (4, 2, 32)]
    writes_as_the_base(model, batch)


def test_padding_is_seen_and_not_pooled():
    """Another colour of padding: the start of memory stays, and memory changes as the patches do."""
    model = tiny.equip("llava_next")
    _, _, rows = seen(model, tiny.message("look", tiny.picture(0, (48, 32))))
    tile = rows[0][1]
    assert tile.part != (slice(0, 4), slice(0, 4)) and tile.tokens < 20
    start = model.memory.short.start(model.memory.short.encode([tile]))[0]
    patches = torch.ones(4, 4)
    patches[tile.part] = 0
    with torch.no_grad():
        pixels = tile.pixels + 3 * patches.repeat_interleave(8, 0).repeat_interleave(8, 1)
        other = model.memory.short.encode([type(tile)(pixels, tile.grid, tile.tokens, tile.part)])
        assert torch.allclose(model.memory.short.start(other)[0], start, atol=1e-5)
        query = torch.randn(1, 4, 48)
        own = model.memory.short(query, [model.memory.short.encode([tile])])
        assert not torch.allclose(model.memory.short(query, [other]), own, atol=1e-4)


@pytest.mark.parametrize("family", TILED)
def test_a_tile_of_padding_alone_is_left_out(family, monkeypatch):
    """Only where the list of resolutions has nothing better for a thin picture."""
    model = tiny.equip(family)
    for config in (model.base.config, model.processor.image_processor):
        monkeypatch.setattr(config, "image_grid_pinpoints", [[96, 96]])
    batch, _, rows = seen(model, tiny.message("look", tiny.picture(0, (96, 16))))
    assert len(rows[0]) == 4  # the whole, and the middle line of three by three
    writes_as_the_base(model, batch)


@pytest.mark.parametrize("grid", [(8, 8), (4, 12), (12, 4), (27, 54)])
@pytest.mark.parametrize("size", [(10, 10), (7, 31), (31, 7), (1, 100)])
def test_inside_is_the_bases_unpadding(grid, size):
    cells = torch.randn(grid)
    assert torch.equal(cells[inside(grid, size)], unpad_image(cells[None], size)[0])


@pytest.mark.parametrize("family", TILED)
@pytest.mark.parametrize("size", [(200, 4), (4, 200)])
@pytest.mark.parametrize("pictures", [1, 2])
def test_a_picture_that_is_a_line_is_seen_whole(family, size, pictures):
    """So thin that the base finds no patch of it among its tiles, and keeps newlines at most."""
    model = tiny.equip(family)
    batch, _, rows = seen(model, tiny.message("look", *[tiny.picture(0, size)] * pictures))
    assert len(rows[0]) == pictures
    assert not any(patches.embedded.numel() == 0 for patches in model.memory.short.encode(rows[0]))
    writes_as_the_base(model, batch)


def test_tokens_are_shared_out_in_whole_numbers():
    assert deal(10, [2, 2, 1]) == [4, 4, 2]
    assert deal(42, [16, 16, 16, 16]) == [10, 11, 11, 10]
    assert deal(7, [0, 5, 0, 5, 0]) == [0, 4, 0, 3, 0]
    assert [overlap(slice(3, 9), start, 4) for start in (0, 4, 8)] == [slice(3, 4), slice(0, 4), slice(0, 1)]
    empty = overlap(slice(3, 4), 8, 4)
    assert empty.start == empty.stop
