"""Where short-term memory looked: the right patch of the right view of the right picture, and the memory unchanged."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image

from vismem.analysis.image_geometry import views
from vismem.analysis.short_attention import block_weights, short_term_attention
from vismem.decoding.policies import Forced

EVERY_FAMILY = True
WRITING = {"return_dict_in_generate": True, "record": True, "eos_token_id": None, "max_new_tokens": 8}
PICTURES = [[tiny.picture(0)], [tiny.picture(1), tiny.picture(2)], [tiny.picture(3, (48, 32))]]
SCHEDULE = Forced([(0, 1, "short"), (0, 3, "long"), (0, 5, "short"), (1, 2, "short"), (2, 4, "short")])


def written(model, batch, schedule=SCHEDULE, **more):
    return model.generate(**batch, invocation=schedule, **{"do_sample": False, **WRITING, **more})


def test_weights_sum_to_one_and_memories_are_unchanged(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    found = short_term_attention(model, batch, out.invocations, PICTURES)
    assert [(look.row, look.index) for look in found] == [(0, 0), (0, 2), (1, 0), (2, 0)]
    positions = 4 * model.backbone.merge**2
    image = model.backbone.images(**vision(model, batch))[0]
    has_class = model.backbone.encode([image])[0].keys_values[0].shape[2] > image.grid[0] * image.grid[1]
    for look in found:
        assert torch.allclose(look.memory, out.invocations[look.row][look.index].memory, atol=1e-5)
        assert look.layers == len(model.backbone.blocks)
        for view, weights in zip(look.views, look.weights, strict=True):
            assert weights.shape == (look.layers, positions, *view.grid) and weights.dtype == torch.float32
            assert weights.min() >= 0
        shares = look.shares()
        assert set(shares) == {"picture", "padding", "class token", "query", "memory"}
        assert torch.allclose(sum(shares.values()), torch.ones(look.layers, positions), atol=1e-5)
        assert all(share.shape == (look.layers, positions) for share in shares.values())
        assert all(shares[name].min() > 0 for name in ("picture", "query", "memory"))
        assert bool((shares["class token"] > 0).all()) == bool(shares["class token"].any()) == has_class
        # Means are means of their parts.
        assert look.vectors(0).shape[1] == 4
        apart = torch.stack([look.mean(0, layer, vector) for layer in range(look.layers) for vector in range(4)])
        assert torch.allclose(apart.mean(0), look.mean(0), atol=1e-5)
        assert torch.allclose(look.mean(0, vector=1), look.vectors(0)[:, 1].mean(0), atol=1e-5)
        side = model.backbone.merge**2
        assert torch.allclose(look.vectors(0)[:, 1], look.weights[0][:, side : 2 * side].mean(1), atol=1e-5)
        for picture in {view.picture for view in look.views}:
            assert look.on(picture).shape == PICTURES[look.row][picture].size[::-1]
        heats = [look.on(picture, (40, 40), vector=2) for picture in range(len(PICTURES[look.row]))]
        assert np.mean(heats) == pytest.approx(1, abs=0.12)  # what falls off a padded edge is lost
    assert [look.views[-1].picture for look in found] == [0, 0, 1, 0]


def whole(view) -> bool:
    """Whether the view shows its whole picture, within 2 %."""
    (left, top, right, bottom), (wide, high) = view.box, view.size
    slack = 0.02 * max(wide, high) + 0.5
    return left <= slack and top <= slack and right >= wide - slack and bottom >= high - slack


def vision(model, batch):
    return {name: batch[name] for name in model.backbone.image_inputs if name in batch}


def test_recording_changes_nothing(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    former, images = model.memory.short, model.backbone.images(**vision(model, batch))
    patches = former.encode(images)
    query = torch.randn(2, 4, model.backbone.hidden_size)
    rows = [patches[:1], patches]  # of different lengths, so that one is padded
    memory, expected = former(query, rows), []

    def by_torch(query, key, mask):  # with one-hot values its outputs are its weights
        each = torch.eye(key.shape[2]).expand(*key.shape[:2], -1, -1)
        expected.append(F.scaled_dot_product_attention(query, key, each, attn_mask=mask).mean(1))

    former.watch = by_torch
    former(query, rows)
    former.watch = None
    with block_weights(former) as layers:
        assert torch.equal(former(query, rows), memory)
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(layers, expected, strict=True))
    assert former.watch is None and len(layers) == len(model.backbone.blocks)
    assert torch.equal(former(query, rows), memory) and len(layers) == len(model.backbone.blocks)
    length = patches[0].keys_values[0].shape[2]
    for weights in layers:
        assert torch.allclose(weights.sum(-1), torch.ones(weights.shape[:2]), atol=1e-5)
        assert not weights[0, :, length : sum(image.keys_values[0].shape[2] for image in patches)].any()
    with pytest.raises(RuntimeError), block_weights(former):
        raise RuntimeError("on purpose")
    assert former.watch is None


@pytest.mark.parametrize("where", [(5, 3), (43, 27), (27, 12)], ids=["top-left", "bottom-right", "middle"])
def test_a_changed_spot_is_attended_to_where_it_is(family, where):
    """Two pictures that differ in one spot: in the first block, attention changes at the patch with that spot.

    Memory positions start from constants there, and patches have not looked at each other yet.
    """
    model = tiny.equip(family, memory_init="learned")
    with torch.no_grad():
        model.memory.short.memory_init.normal_(std=2.0)
    one = np.asarray(tiny.picture(3, (48, 32))).copy()
    two = one.copy()
    x, y = where
    two[y - 1 : y + 2, x - 1 : x + 2] = 255 - two[y - 1 : y + 2, x - 1 : x + 2] // 2
    batches, found = [], []
    for picture in (one, two):
        batches.append(tiny.prompts(model.processor, [tiny.message("look", Image.fromarray(picture))]))
        out = written(model, batches[-1], Forced([(0, 0, "short")]), max_new_tokens=2)
        found += short_term_attention(model, batches[-1], out.invocations, [[(48, 32)]])
    before, after = found
    scale = 0.0
    for index, view in enumerate(before.views):
        change = (after.weights[index][0] / before.weights[index][0] - 1).abs().mean(0)
        left, top, right, bottom = view.box
        if left < x < right and top < y < bottom:
            row, column = divmod(int(change.argmax()), view.grid[1])
            left, top, right, bottom = view.patch(row, column)
            slack = 1.6  # the spot is three pixels wide, and resizing smears it
            assert left - slack < x < right + slack and top - slack < y < bottom + slack, (where, view, row, column)
            assert change.max() > 3 * change.median()
            scale = float(change.max())
    assert scale > 0.01


def test_heat_lies_over_its_patches():
    """Weights planted in one patch of a tile come out in that part of the picture and nowhere else."""
    model = tiny.equip("llava_next")
    picture = tiny.picture(3, (48, 32))
    batch = tiny.prompts(model.processor, [tiny.message("look", picture)])
    out = written(model, batch, Forced([(0, 0, "short")]))
    (look,) = short_term_attention(model, batch, out.invocations, [[picture]])
    assert [whole(view) for view in look.views] == [True, False, False]
    for weights in look.weights:
        weights.zero_()
    look.weights[2][:, :, 1, 2] = 0.5  # of the right-hand tile, which shows 24 to 56
    heat = look.on(0)
    left, top, right, bottom = look.views[2].patch(1, 2)
    assert (left, top, right, bottom) == pytest.approx((40, 8, 48, 16), abs=0.1)
    assert heat[8:16, 40:48].min() > 20 and heat.sum() == pytest.approx(heat[8:16, 40:48].sum())
    assert heat.mean() == pytest.approx(1, abs=0.03)
    look.weights[2][:, :, 1, 2] = 0
    look.weights[2][:, :, 0, 3] = 0.5  # beyond the picture
    assert not look.on(0).any() and look.shares()["padding"].min() == 0.5 and not look.shares()["picture"].any()
    with pytest.raises(ValueError, match="no picture 1"):
        look.on(1)


@pytest.mark.parametrize("init", ["pooled", "attended"])
def test_vectors_start_from_their_regions(family, init):
    """The middle of each region is the mean of the coordinates that the former itself starts at."""
    model = tiny.equip(family, memory_init=init)
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    found = short_term_attention(model, batch, out.invocations, PICTURES)
    place = batch["input_ids"] == model.backbone.image_token_id
    images = model.backbone.rows_of_images(place, model.backbone.images(**vision(model, batch)))
    for look in found:
        choice = out.invocations[look.row][look.index].choice
        assert (choice is None) == (look.certainty is None) == (init == "pooled")
        patches = model.memory.short.encode(images[look.row])
        _, centres = model.memory.short.start(patches, None if choice is None else choice.blocks)
        if choice is not None:
            assert [view for view, _ in look.starts] == [image for image, _, _ in choice.places]
            assert torch.allclose(look.certainty, choice.log_probs.exp())
        centres = centres.unflatten(0, (4, -1)).mean(1).tolist()
        assert len(look.starts) == 4
        for (view, (left, top, right, bottom)), (row, column) in zip(look.starts, centres, strict=True):
            part = images[look.row][view].part
            up, across = (range(n)[p][0] for n, p in zip(look.views[view].grid, part, strict=True))
            box = look.views[view].patch(row + up, column + across)
            assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx(
                ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), abs=0.1
            )
        shown = [look.views[view].picture for view, _ in look.starts]
        heats = [look.read(torch.full((4,), 0.1), picture) for picture in range(len(PICTURES[look.row]))]
        if sorted(set(shown)) == list(range(len(heats))):
            assert np.mean([heat.mean() for heat in heats]) == pytest.approx(1, abs=0.05)
        view, (left, top, right, bottom) = look.starts[2]
        heat = look.read(torch.tensor([0, 0, 0.3, 0]), look.views[view].picture)
        inside = heat[max(round(top), 0) : round(bottom), max(round(left), 0) : round(right)]
        assert inside.min() > 1 and inside.sum() == pytest.approx(heat.sum(), rel=0.01)
    learned = tiny.equip(family, memory_init="learned")
    (look, *_) = short_term_attention(learned, batch, written(learned, batch).invocations, PICTURES)
    with pytest.raises(ValueError, match="do not start"):
        look.read(torch.ones(4), 0)


# Views.


@pytest.mark.parametrize("sizes", [[(32, 32)], [(48, 32)], [(90, 40)], [(32, 32), (64, 20)]], ids=str)
def test_views_match_the_processors_layout(family, sizes):
    """A bright square in a dark picture: every patch is as bright as the square covers the box that its view gives."""
    model = tiny.equip(family)
    found = views(model, sizes)
    assert {view.picture for view in found} == set(range(len(sizes)))
    for picture, (wide, high) in enumerate(sizes):
        square = left, top, right, bottom = round(0.5 * wide), round(0.25 * high), round(0.9 * wide), round(0.8 * high)
        drawn = [np.full((h, w, 3), 40, dtype=np.uint8) for w, h in sizes]
        drawn[picture][top:bottom, left:right] = 220
        batch = tiny.prompts(model.processor, [tiny.message("look", *map(Image.fromarray, drawn))])
        images = model.backbone.images(**vision(model, batch))
        assert [image.grid for image in images] == [view.grid for view in found]
        for image, view in zip(images, found, strict=True):
            if view.picture != picture:
                continue
            rows, columns = view.grid
            laid = model.backbone.laid_out(image).unflatten(1, (rows, -1)).unflatten(3, (columns, -1))
            bright, shown = laid.mean((0, 2, 4)).numpy(), view.shown
            boxes = [[view.patch(row, column) for column in range(columns)] for row in range(rows)]
            covered = np.array([[overlap(box, square) for box in line] for line in boxes])
            if covered[shown].std() > 0.05:
                assert np.corrcoef(covered[shown], bright[shown])[0, 1] > 0.97, view


def overlap(box, other) -> float:
    """The share of a box that the other covers."""
    left, top, right, bottom = box
    wide, high = min(right, other[2]) - max(left, other[0]), min(bottom, other[3]) - max(top, other[1])
    return max(wide, 0) * max(high, 0) / ((right - left) * (bottom - top))


def test_pixels_are_in_picture_order(family):
    """A ramp from left to right rises from left to right, pixel by pixel, and every line is like the first."""
    model = tiny.equip(family)
    ramp = np.tile(np.linspace(40, 220, 48).astype(np.uint8)[None, :, None], (32, 1, 3))
    batch = tiny.prompts(model.processor, [tiny.message("look", Image.fromarray(ramp))])
    for image, view in zip(model.backbone.images(**vision(model, batch)), views(model, [(48, 32)]), strict=True):
        if view.shown.all():
            laid = model.backbone.laid_out(image)
            assert laid.diff(dim=2).min() > -0.02 and laid.diff(dim=1).abs().max() < 0.02
            assert (laid[:, :, -1] - laid[:, :, 0]).min() > 0.2


def test_views_of_a_large_picture_are_exact():
    """Ramps have only 224 steps; a line fitted to them is finer than a patch of a picture thousands of pixels wide."""
    model = tiny.equip("internvl")
    found = views(model, [(4000, 3000)])
    tiles = [view for view in found if not whole(view)]
    assert len(tiles) == len(found) - 1 > 2
    lefts = sorted({round(view.box[0] / 10) * 10 for view in tiles})
    assert all(abs(view.box[0] - min(lefts, key=lambda x: abs(x - view.box[0]))) < 8 for view in tiles)
    assert max(view.box[2] for view in tiles) == pytest.approx(4000, abs=12)
    assert max(view.box[3] for view in tiles) == pytest.approx(3000, abs=12)


def test_views_follow_the_processors_arguments():
    model = tiny.equip("smolvlm")
    assert len(views(model, [(48, 32)])) > 1
    assert [whole(view) for view in views(model, [(48, 32)], do_image_splitting=False)] == [True]
    assert views(model, []) == []


def test_mismatched_inputs_raise():
    model = tiny.equip("qwen2_5_vl")
    batch = tiny.mixed_batch(model.processor)
    out = written(model, batch)
    with pytest.raises(ValueError, match="patch grids"):
        short_term_attention(model, batch, out.invocations, [[(90, 40)], *PICTURES[1:]])
    with pytest.raises(ValueError, match="do not match"):
        short_term_attention(model, batch, out.invocations[:2], PICTURES)
    with pytest.raises(ValueError, match="record=True"):
        short_term_attention(model, batch, written(model, batch, record=False).invocations, PICTURES)
    long = written(model, batch, Forced([(0, 1, "long")])).invocations
    assert short_term_attention(model, batch, long, PICTURES) == []
    with pytest.raises(ValueError, match="content='soft'"):
        short_term_attention(tiny.equip("qwen2_5_vl", content="soft"), batch, out.invocations, PICTURES)


def test_copies_of_a_prompt_are_matched_with_its_pictures():
    model = tiny.equip("idefics3")
    batch = tiny.prompts(model.processor, [tiny.message("look", *pictures) for pictures in PICTURES])
    schedule = Forced([(0, 1, "short"), (3, 1, "short"), (5, 2, "short")])
    out = written(model, batch, schedule, num_return_sequences=2)
    found = short_term_attention(model, batch, out.invocations, PICTURES)
    assert [(look.row, look.index) for look in found] == [(0, 0), (3, 0), (5, 0)]
    for look in found:
        assert torch.allclose(look.memory, out.invocations[look.row][look.index].memory, atol=1e-5)
