"""The gaze teacher: where the frozen base looks while it reads a reply is what the choice of blocks learns."""

from __future__ import annotations

from random import Random

import pytest
import tiny
import torch

from vismem.memory import Choice
from vismem.reading import forward as reading
from vismem.reading.gaze import full_layers, gaze_loss, gaze_targets, looked_at
from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.supervised import supervised_batch

EVERY_FAMILY = True
REPLY = "a red <ms_I>cup, and <ml_I>two green <ms_I>pens."


def batch_of(model, tmp_path, count=2) -> dict:
    """Rows with a reply in which two short memories and a long one stand."""
    words = tiny.message("What is on the table?", tiny.picture(0)), tiny.message("look again!", tiny.picture(3))
    prompts = tiny.prompts(model.processor, list(words[:count]))
    args = MemoryTrainingArguments(str(tmp_path), stage="warmup", use_cpu=True, report_to="none", max_new_tokens=64)
    rngs = [Random(0)] * count
    return supervised_batch(model, prompts, [REPLY] * count, [True] * count, rngs, "delimiter", args)


def located(model, batch):
    """A batch as `VisMem.forward` finds it, with its patches."""
    call = {name: value for name, value in batch.items() if name not in ("sampled", "allowed")}
    ids, mask, start = call.pop("input_ids"), call.pop("attention_mask"), call.pop("prompt_length")
    found, reader = reading.locate(model, ids, mask, [start] * len(ids), 1, call)
    found.patches = reading.encode_patches(model, found)
    return found, reader


@torch.no_grad()
def test_targets_are_the_bases_own_attention(tmp_path):
    """The same from one eager pass of the base over the whole prompt and reply, written out again."""
    model = tiny.equip("qwen2_5_vl", memory_init="attended")
    batch = batch_of(model, tmp_path, 1)
    found, reader = located(model, batch)
    (targets,) = gaze_targets(model, found, reader, batch["sampled"])
    base, ids = model.base, batch["input_ids"]
    memory = torch.isin(ids[0], torch.tensor(model.tokens.ids))
    # Tokens of memory are rows that the base lacks: give it the embeddings.
    embeds = model.tokens.embed(ids)
    places = (ids == model.backbone.image_token_id)[..., None]
    vision = model.backbone.vision_inputs(batch)
    visual = torch.cat([*base.get_image_features(**vision, return_dict=True).pooler_output])
    embeds = embeds.masked_scatter(places, visual)
    position = reading.position_ids(model, ids, batch["attention_mask"], {**batch})
    base.set_attn_implementation("eager")
    weights = base.model.language_model(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], position_ids=position, output_attentions=True
    ).attentions
    mean = torch.stack([each[0].mean(0) for each in weights]).mean(0)[:, places[0, :, 0]]  # [L, visual tokens]
    said = [t for t in range(len(ids[0]) - 1) if batch["sampled"][0, t + 1]]
    looks = [t for t in range(len(ids[0])) if ids[0, t] == model.tokens.invocation_ids["short"]]
    assert len(looks) == 2 and memory.sum() == 6
    for look, end, target in zip(looks, (looks[1], len(ids[0])), (targets[0], targets[2]), strict=True):
        rows = mean[[t for t in said if look < t < end]].amax(0)
        assert torch.equal(target, looked_at(rows - mean[said].mean(0), 4))
    assert targets[1] is None  # the long memory


@torch.no_grad()
def test_a_base_with_local_attention_is_shown_the_image_again(tmp_path):
    """Its targets come from the words' attention to a second showing; the prompt's image may be out of reach."""
    model = tiny.equip("idefics3", base={"sliding_window": 12}, memory_init="attended")
    assert full_layers(model.base.config.get_text_config()) == set()
    batch = batch_of(model, tmp_path)
    found, reader = located(model, batch)
    targets = gaze_targets(model, found, reader, batch["sampled"])
    for row, each in zip(targets, found.visual, strict=True):
        assert row[1] is None
        for target in (row[0], row[2]):
            assert len(target) == len(each)
            assert abs(float(target.sum()) - 1) < 1e-6 and (target > 0).sum() <= 4
    # Another image at the second showing alone changes what is looked at.
    found.visual = [states.flip(0) for states in found.visual]
    assert any(
        not torch.equal(a, b)
        for before, now in zip(targets, gaze_targets(model, found, reader, batch["sampled"]), strict=True)
        for a, b in zip(before, now, strict=True)
        if a is not None
    )


def test_the_teacher_trains_the_choice_and_nothing_else_of_the_formers(family, tmp_path):
    model = tiny.equip(family, memory_init="attended")
    model.requires_grad_(False)
    model.memory.requires_grad_(True)
    batch = batch_of(model, tmp_path)
    out = model(**batch, gaze=True)
    assert out.gaze_loss.shape == (2,) and (out.gaze_loss > 0).all()
    out.gaze_loss.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.memory.short.choice.parameters())
    assert model.memory.builder.query_init.grad.abs().sum() > 0
    assert model.memory.short.memory_init.grad is None
    assert all(parameter.grad is None for parameter in model.memory.long.parameters())


@torch.no_grad()
def test_the_teacher_leaves_the_policys_log_probabilities_alone(family, tmp_path):
    model = tiny.equip(family, memory_init="attended")
    batch = batch_of(model, tmp_path)
    implementation = model.backbone.language_model.config._attn_implementation
    assert torch.equal(model(**batch, gaze=True).log_probs, model(**batch).log_probs)
    assert model.backbone.language_model.config._attn_implementation == implementation


def test_learning_the_gaze_lowers_its_loss(tmp_path):
    model = tiny.equip("idefics3", memory_init="attended")
    batch = batch_of(model, tmp_path)
    optimizer = torch.optim.Adam(model.memory.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(**batch, gaze=True).gaze_loss.mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def test_other_starts_have_no_gaze(tmp_path):
    model = tiny.equip("idefics3")
    assert model(**batch_of(model, tmp_path), gaze=True).gaze_loss is None


def test_a_target_is_dealt_out_in_reading_order():
    """Two blocks for four vectors: the first two learn the first block, the others the second."""
    target = torch.tensor([0.0, 0.5, 0.0, 0.5])
    scores = torch.zeros(4, 4)
    scores[:2, 1] = scores[2:, 3] = 20.0
    assert gaze_loss(Choice(scores, scores.argmax(-1), [(2, 2)]), target) < 1e-6
    crossed = scores.flip(0)
    assert gaze_loss(Choice(crossed, crossed.argmax(-1), [(2, 2)]), target) > 10
    # Three blocks for two vectors: each takes one and a half of them.
    third = torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0])
    log_probs = torch.randn(2, 4).log_softmax(-1)
    expected = -(
        (2 / 3 * log_probs[0, 0] + 1 / 3 * log_probs[0, 1]) + (1 / 3 * log_probs[1, 1] + 2 / 3 * log_probs[1, 2])
    )
    found = gaze_loss(Choice(log_probs, torch.tensor([0, 0]), [(2, 2)]), third)
    assert torch.allclose(found, expected / 2, atol=1e-5)


@pytest.mark.parametrize(
    ("weight", "most", "expected"),
    [
        ([0.1, 0.8, 0.5, 0.3], 4, [0, 0.5, 0.5, 0]),
        ([0.7, 0.8, 0.5, 0.6], 2, [0.5, 0.5, 0, 0]),
        ([0.0, 0.0], 4, None),
    ],
)
def test_what_is_looked_at_is_half_of_the_strongest_or_more(weight, most, expected):
    found = looked_at(torch.tensor(weight), most)
    assert found is None if expected is None else torch.allclose(found, torch.tensor(expected, dtype=torch.float32))
