"""`memory_init="attended"`: short memory starts from blocks of the image that the query chooses."""

from __future__ import annotations

import pytest
import tiny
import torch

from vismem.decoding.policies import Forced
from vismem.decoding.queue import Request
from vismem.memory import Observation
from vismem.memory.choice import Choice, sampled_blocks
from vismem.memory.short_term import block_patches

EVERY_FAMILY = True
LOOKS = [(0, "short"), (4, "short")]


def attended(family, **config):
    return tiny.equip(family, memory_init="attended", **config)


def observations(model, batch) -> list[Observation]:
    """What each row's first short memory would be formed from."""
    backbone, ids = model.backbone, batch["input_ids"]
    images, visual = backbone.prompt_images(ids, batch), backbone.prompt_visual_states(ids, batch)
    rng = torch.Generator().manual_seed(0)
    return [
        Observation(states, torch.randn(5, 48, generator=rng), torch.randn(5, 48), model.memory.short.encode(shown))
        for states, shown in zip(visual, images, strict=True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 32), (24, 56)])
def test_every_block_has_its_own_visual_token(family, size):
    """The visual state that stands for a block is what the projector made of that block's patches."""
    model = tiny.equip(family)
    batch = tiny.prompts(model.processor, [tiny.message("look", tiny.picture(3, size))])
    (images,) = model.backbone.prompt_images(batch["input_ids"], batch)
    (visual,) = model.backbone.prompt_visual_states(batch["input_ids"], batch)
    vision = model.backbone.vision_inputs(batch)
    if hasattr(tiny.FAMILIES[family], "projected"):
        views = list(tiny.FAMILIES[family].projected(model.base, vision).unflatten(0, (len(images), -1)))
    else:
        views = list(visual.split([image.tokens for image in images]))
    first, side = 0, model.backbone.merge
    for image, view in zip(images, views, strict=True):
        patches = model.memory.short.encode([image])[0]
        rows, columns = (cells // side for cells in patches.embedded.shape[:2])
        assert patches.blocks.shape == (rows, columns)
        whole = view.reshape(*(cells // side for cells in image.grid), -1)[image.part]
        if first and family == "llava_onevision" and size == (64, 64):  # thinned: several blocks share a token
            assert len(patches.blocks.unique()) < patches.blocks.numel()
            assert patches.blocks.max() + first < len(visual) and (patches.blocks + first).min() >= images[0].tokens
            assert (patches.blocks.diff(dim=0) >= 0).all() and (patches.blocks.diff(dim=1) >= 0).all()
        else:
            assert torch.allclose(visual[first + patches.blocks], whole, atol=1e-6)
        first += image.tokens


@torch.no_grad()
def test_a_vector_starts_from_all_patches_of_its_block(family):
    """Taking every block in order gives the patches of the whole image, block by block, with their coordinates."""
    model = attended(family)
    for seen in observations(model, tiny.mixed_batch(model.processor)):
        side = model.backbone.merge
        count = sum(image.blocks.numel() for image in seen.patches)
        vectors, coordinates = block_patches(seen.patches, torch.arange(count), side)
        expected, places = [], []
        for image in seen.patches:
            rows, columns = image.blocks.shape
            for row in range(rows):
                for column in range(columns):
                    part = image.embedded[row * side : (row + 1) * side, column * side : (column + 1) * side]
                    expected.append(part.reshape(side**2, -1))
                    places += [[row * side + y, column * side + x] for y in range(side) for x in range(side)]
        assert torch.equal(vectors, torch.cat(expected))
        assert torch.equal(coordinates, torch.tensor(places).float())


@torch.no_grad()
def test_the_choice_is_the_likeliest_block_of_the_formula(family):
    """A = s <W_i LN(mix_i Q) + o_i, W_v LN(v_p)> / sqrt(w), written out again."""
    model = attended(family)
    batch = tiny.mixed_batch(model.processor)
    seen, choice = observations(model, batch), model.memory.short.choice
    query = model.memory.builder([o.visual for o in seen], [o.states for o in seen])
    for each, own, found in zip(seen, query, model.memory.choose(query, seen), strict=True):
        keys, first = [], 0
        for image in each.patches:
            keys += [each.visual[first + token] for token in image.blocks.flatten().tolist()]
            first += image.tokens
        keys = choice.key(choice.norm_key(torch.stack(keys)))
        for vector in range(4):
            asked = sum(choice.mix[vector, k] * own[k] for k in range(len(own)))
            asked = choice.norm_query(asked) @ choice.query[vector] + choice.offset[vector]
            scores = choice.log_scale.exp() * (keys @ asked) / 8
            assert torch.allclose(found.scores[vector], scores, atol=1e-4)
            assert found.blocks[vector] == scores.argmax()
        image, row, column = found.places[0]
        before = sum(rows * columns for rows, columns in found.grids[:image])
        assert before + row * found.grids[image][1] + column == found.blocks[0]


def test_words_gradient_never_enters_the_choice(family):
    """The loss of the words reaches builder, offset and query mix, but no parameter of the choice."""
    model = attended(family)
    short = model.memory.short
    vectors = model.memory.form("short", observations(model, tiny.mixed_batch(model.processor))).vectors
    vectors.square().sum().backward()
    assert all(parameter.grad is None for parameter in short.choice.parameters())
    assert short.memory_init.grad.abs().sum() > 0 and short.query_mix.grad.abs().sum() > 0
    assert model.memory.builder.query_init.grad.abs().sum() > 0


def test_the_choice_trains_by_its_log_probabilities(family):
    model = attended(family)
    _, choices = model.memory.form("short", observations(model, tiny.mixed_batch(model.processor)))
    sum(choice.log_probs.sum() for choice in choices).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.memory.short.choice.parameters())
    assert model.memory.builder.query_init.grad.abs().sum() > 0


def test_text_rows_have_no_short_memory(family):
    model = attended(family)
    batch = tiny.prompts(model.processor, [tiny.message("no picture")])
    with pytest.raises(ValueError, match="image"):
        model.generate(**batch, invocation=Forced([(0, 0, "short")]), max_new_tokens=4)


def decoded(model, batch, **settings):
    kwargs = {"max_new_tokens": 10, "do_sample": False, "record": True, "return_dict_in_generate": True, **settings}
    policy = Forced([(row, at, kind) for row in range(len(batch["input_ids"])) for at, kind in LOOKS])
    return model.generate(**batch, invocation=policy, **kwargs)


def first_alone(processor):
    """The first row of `tiny.mixed_batch`, alone and without padding."""
    return tiny.prompts(processor, [tiny.message("What is on the table?", tiny.picture(0))])


def last_alone(processor):
    """Its third row."""
    return tiny.prompts(processor, [tiny.message("look again!", tiny.picture(3, (48, 32)))])


def test_a_rows_choice_does_not_depend_on_its_batch(family):
    """Rows of different lengths and images choose in a batch as they choose alone, and tokens are the same."""
    model = attended(family)
    together = decoded(model, tiny.mixed_batch(model.processor))
    for row, alone in ((0, first_alone), (2, last_alone)):
        single = decoded(model, alone(model.processor))
        for ours, theirs in zip(together.invocations[row], single.invocations[0], strict=True):
            assert torch.equal(ours.choice.blocks, theirs.choice.blocks)
            assert torch.allclose(ours.choice.scores, theirs.choice.scores, atol=1e-4)
            assert torch.allclose(ours.memory, theirs.memory, atol=1e-4)
        found, expected = together.rollout[row].tokens, single.rollout[0].tokens
        assert torch.equal(found[: len(expected)], expected)


def test_sampled_blocks_come_from_the_rows_own_seed(family):
    """The same seed gives the same blocks in any batch, another seed others; tokens draw from another stream."""
    model = attended(family)
    batch = tiny.mixed_batch(model.processor)
    settings = {"do_sample": True, "temperature": 1.0, "sample_blocks": True}
    together = decoded(model, batch, seed=[3, 4, 5], **settings)
    single = decoded(model, last_alone(model.processor), seed=[5], **settings)
    other = decoded(model, batch, seed=[6, 7, 8], **settings)

    def blocks(out, row):
        return [i.choice.blocks.tolist() for i in out.invocations[row]]

    assert blocks(together, 2) == blocks(single, 0)
    assert any(blocks(together, row) != blocks(other, row) for row in range(3))
    assert blocks(together, 0)[0] != blocks(together, 0)[1] or blocks(together, 1)[0] != blocks(together, 1)[1]


@torch.no_grad()
def test_replay_with_recorded_blocks_gives_the_decoded_log_probabilities(family):
    """Invariant 4 with sampled looks: forming again from recorded blocks and states gives what decoding saw."""
    from vismem.training.replay import collate, decoded_log_probs

    model = attended(family)
    batch = tiny.mixed_batch(model.processor)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "sample_blocks": True, "seed": [1, 2, 3]}
    rollouts = decoded(model, batch, **settings).rollout
    call = collate(batch, rollouts, 0, 1.0, formed=False)
    out = model(**call)
    expected = decoded_log_probs(rollouts, call["sampled"])
    assert torch.allclose(out.log_probs[call["sampled"]], expected[call["sampled"]], atol=1e-3)
    for row, rollout in enumerate(rollouts):
        for found, invocation in zip(out.choices[row], rollout.invocations, strict=True):
            assert torch.equal(found.blocks.cpu(), invocation.choice.blocks)
            assert torch.allclose(found.log_probs.cpu(), invocation.choice.log_probs, atol=1e-4)


def test_sampling_follows_the_probabilities():
    scores = torch.tensor([0.5, 0.3, 0.2]).log().expand(20_000, 3)
    counts = sampled_blocks(scores, torch.Generator().manual_seed(0)).bincount(minlength=3) / 20_000
    assert torch.allclose(counts, torch.tensor([0.5, 0.3, 0.2]), atol=0.02)


def test_scores_that_are_not_finite_give_some_block():
    scores = torch.full((4, 3), float("nan"))
    assert sampled_blocks(scores, None).max() < 3


def test_a_choice_names_image_row_and_column():
    choice = Choice(torch.zeros(3, 10), torch.tensor([0, 5, 9]), [(2, 3), (2, 2)])
    assert choice.places == [(0, 0, 0), (0, 1, 2), (1, 1, 1)]
    assert torch.allclose(choice.log_probs, torch.full((3,), -torch.tensor(10.0).log()))


def test_long_memory_starts_as_it_does_with_pooled_patches(family):
    """Only short memory chooses: with the same seed, long memories are equal."""
    inits = ("pooled", "attended", "learned")
    models = [tiny.equip(family, memory_init=init) for init in inits]
    with torch.no_grad():
        for model in models:
            for parameter in model.memory.long.adapter.parameters():
                parameter.zero_()
            model.memory.long.memory_init.zero_()
            model.memory.long.log_gain.zero_()
        pooled, attended, learned = (model.memory.long(torch.ones(1, 4, 48), [torch.ones(3, 48)]) for model in models)
    assert torch.allclose(pooled, attended) and not torch.allclose(pooled, learned, atol=1e-3)


def test_the_live_batch_chooses_as_generate_does(family):
    """Rows that enter and leave at different steps take the blocks that they take alone."""
    model = attended(family)
    prompts = [first_alone(model.processor), last_alone(model.processor), first_alone(model.processor)]
    policy = Forced([(0, 0, "short"), (0, 4, "short")])
    settings = {"max_new_tokens": 8, "do_sample": False, "invocation": policy}
    answers = {a.tag: a for a in model.stream_batch([Request(p, tag=i) for i, p in enumerate(prompts)], 2, **settings)}
    for index, prompt in enumerate(prompts):
        alone = model.generate(**prompt, **settings, return_dict_in_generate=True).invocations[0]
        for ours, theirs in zip(answers[index].invocations, alone, strict=True):
            assert torch.equal(ours.choice.blocks, theirs.choice.blocks)
            assert torch.allclose(ours.memory, theirs.memory, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("init", ["attended", "pooled"])
def test_queries_begin_at_the_mean_of_the_segment(family, init):
    """Where memory chooses, the builder's first layer sees them there; elsewhere at their learned start alone."""
    builder, seen = tiny.equip(family, memory_init=init).memory.builder, []
    builder.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    states = [torch.randn(3, 48), torch.randn(5, 48)]
    builder([torch.randn(6, 48), torch.randn(2, 48)], states)
    for found, segment in zip(seen[0], states, strict=True):
        start = builder.query_init + builder.types[2]
        if init == "attended":
            start = start + builder.project_in(builder.norm_in(segment.mean(0)))
        assert torch.allclose(found[-len(start) :], start, atol=1e-5)
