"""What is said of each family is true of transformers' own classes: patches, keys and values, projection, order."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from vismem.backbones import FAMILIES, backbone_of
from vismem.memory.short_term import averaging, coarse_grid, pool, share

EVERY_FAMILY = True


def one_image(model, size=(32, 32)):
    batch = tiny.prompts(model.processor, [tiny.message("look", tiny.picture(0, size))])
    inputs = {name: batch[name] for name in model.backbone.image_inputs}
    return batch, inputs, model.backbone.images(**inputs)


def native_keys_and_values(model, inputs) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the base's own tower computes as values, block by block, for one image."""
    found = []

    def keep(_module, _args, output):
        found.append(output.detach())

    blocks = model.backbone.blocks
    modules = [b.attn.qkv for b in blocks] if model.backbone.fused_qkv else [b.self_attn.v_proj for b in blocks]
    handles = [module.register_forward_hook(keep) for module in modules]
    model.base.get_image_features(**inputs)
    for handle in handles:
        handle.remove()
    width = model.backbone.vision_size
    return [output.reshape(-1, output.shape[-1])[:, -width:] for output in found]


@pytest.mark.parametrize("size", [(32, 32), (48, 32), (24, 56)])
def test_patches_are_the_towers_own(family, size):
    """With the adapter off, every block's values equal those of the base's tower: masks, windows and rotation fit."""
    model = tiny.equip(family)
    _, inputs, images = one_image(model, size)
    with torch.no_grad():
        patches = model.backbone.encode(images)[0]
        native = native_keys_and_values(model, inputs)
    for depth, values in enumerate(native):
        ours = patches.keys_values[depth][1].transpose(0, 1).flatten(1)
        if len(values) > len(ours):  # the native tower also runs the processor's padding
            side = round(len(values) ** 0.5)
            values = values.view(side, side, -1)[: images[0].grid[0], : images[0].grid[1]].flatten(0, 1)
        assert torch.allclose(ours, values, atol=1e-4)


def test_projection_and_raster_order_are_the_bases(family):
    """Patches in raster order, gathered into blocks, project to exactly the base's visual tokens."""
    model = tiny.equip(family)
    backbone, side = model.backbone, model.backbone.merge
    _, inputs, images = one_image(model)
    with torch.no_grad():
        grid = images[0].grid
        hidden, rotary = backbone.embed_patches(images), backbone.patch_rotary(grid)
        for depth, block in enumerate(backbone.blocks):
            q, k, v = backbone.qkv(block, hidden, rotary)
            hidden = backbone.finish(block, hidden, backbone.attend_patches(depth, grid, q, k, v))
        raster = backbone.to_raster(hidden, grid)[0]
        blocks = raster.reshape(grid[0] // side, side, grid[1] // side, side, -1).transpose(1, 2).reshape(1, -1, 32)
        ours = backbone.project(blocks)[0]
        native = torch.cat([*model.base.get_image_features(**inputs).pooler_output])
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
def test_share(total, weights, expected):
    assert share(total, weights) == expected
    assert sum(share(total, weights)) == total


def test_coarse_grid_keeps_the_shape():
    assert coarse_grid(16, (8, 8)) == (4, 4)
    assert coarse_grid(8, (4, 8)) == (2, 4)
    assert coarse_grid(8, (40, 5)) == (8, 1)


def test_pooled_untrained_memory_resembles_the_image(family):
    """An untrained memory at full length is close to a second look: nearer to its own image than to another."""
    model = tiny.equip(family)
    with torch.no_grad():
        for name, parameter in model.memory.short.named_parameters():
            if "adapter" in name or name in ("memory_init", "query_mix"):
                parameter.zero_()
        batch, inputs, images = one_image(model)
        tokens = images[0].tokens
        model.memory.short.memory_init = nn.Parameter(torch.zeros(tokens * model.backbone.merge**2, 32))
        model.memory.short.query_mix = nn.Parameter(torch.zeros(tokens * model.backbone.merge**2, 4))
        own = torch.cat([*model.base.get_image_features(**inputs).pooler_output])
        memory = model.memory.short(torch.randn(1, 4, 48), [model.memory.short.encode(images)])[0]
        batch = tiny.prompts(model.processor, [tiny.message("look", tiny.picture(7))])
        features = model.base.get_image_features(**{n: batch[n] for n in model.backbone.image_inputs})
        other = torch.cat([*features.pooler_output])
    assert (memory - own).norm() < 0.5 * (memory - other).norm()


def test_unsupported_family_says_what_is_supported():
    class Stranger(nn.Module):
        class config:
            model_type = "stranger"

    with pytest.raises(ValueError, match=r"'stranger'.*idefics3.*qwen2_5_vl"):
        backbone_of(Stranger())


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
