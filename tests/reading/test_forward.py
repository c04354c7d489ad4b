"""The training forward: what is read once, where gradients go, and how invocations are found."""

from __future__ import annotations

import pytest
import tiny
import torch

from vismem.decoding.policies import Forced
from vismem.reading.splice import Reader, Splice, batches_of_similar_length, find_invocations

SCHEDULE = Forced([(0, 2, "short"), (0, 7, "long"), (1, 5, "long"), (2, 3, "short")])


def finished(model) -> dict:
    """A finished batch with labels on its answers."""
    batch = tiny.mixed_batch(model.processor)
    settings = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    sequences = model.generate(**batch, invocation=SCHEDULE, **settings)
    prompt = batch["input_ids"].shape[1]
    mask = torch.ones_like(sequences)
    mask[:, :prompt] = batch["attention_mask"]
    labels = sequences.clone()
    labels[:, :prompt] = -100
    rest = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    return {"input_ids": sequences, "attention_mask": mask, "labels": labels, "prompt_length": prompt, **rest}


@pytest.mark.parametrize("base", [{}, {"sliding_window": 12}], ids=["full", "sliding"])
def test_reading_the_prefix_once_changes_nothing(family, base, monkeypatch):
    if base and family != "idefics3":
        pytest.skip("the tiny Qwen has full attention")
    model = tiny.equip(family, base=base)
    batch = finished(model)

    def gradients():
        model.zero_grad()
        out = model(**batch)
        out.loss.backward()
        return out, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    once, ours = gradients()
    monkeypatch.setattr(Reader, "read_prefix", lambda self, length: None)
    whole, theirs = gradients()
    assert torch.allclose(once.loss, whole.loss, atol=1e-5)
    assert torch.allclose(once.logits[:, -5:], whole.logits[:, -5:], atol=1e-4)
    assert len(ours) == len(theirs) > 20
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-4, rtol=1e-3)


def test_loss_reaches_memory_only_through_its_slots(family):
    """A row's loss moves memory parameters; labels before its first invocation alone move none of them."""
    model = tiny.equip(family)
    batch = finished(model)
    batch["labels"][:, batch["prompt_length"] + 2 :] = -100
    model(**batch).loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.memory.parameters())


def test_labels_tell_where_answers_start(family):
    model = tiny.equip(family)
    batch = finished(model)
    given = model(**batch)
    del batch["prompt_length"]
    assert torch.equal(model(**batch).logits, given.logits)
    del batch["labels"]
    with pytest.raises(ValueError, match="prompt_length"):
        model(**batch)


def test_logits_to_keep_gives_the_last_logits(family):
    model = tiny.equip(family)
    batch = finished(model)
    assert torch.allclose(model(**batch, logits_to_keep=4).logits, model(**batch).logits[:, -4:], atol=1e-5)


def test_kinds_not_in_forms_form_nothing(family):
    model = tiny.equip(family)
    batch = finished(model)
    out = model(**batch, forms=("long",))
    assert [[m is None for m in row] for row in out.memories] == [[True, False], [False], [True]]


def test_short_memory_without_an_image_is_refused(family):
    model = tiny.equip(family)
    batch = tiny.prompts(model.processor, [tiny.message("A red cup?")])
    pair = torch.tensor([[model.tokens.invocation_ids["short"], model.tokens.end_ids["short"], 5]])
    ids = torch.cat([batch["input_ids"], pair], 1)
    with pytest.raises(ValueError, match="no image"):
        model(ids, prompt_length=batch["input_ids"].shape[1])


def test_invocations_are_found_in_finished_answers():
    ids = torch.tensor([[7, 8, 1, 50, 60, 2, 51, 61, 3], [50, 60, 1, 50, 2, 51, 61, 50, 60]])
    found = find_invocations(ids, [2, 1], {"short": 50, "long": 51}, {"short": 60, "long": 61})
    assert [(p.kind, p.index, p.segment_start) for p in found[0]] == [("short", 3, 2), ("long", 6, 5)]
    # The pair before the answer is text; an invocation without its end is a word.
    assert [(p.kind, p.index, p.segment_start) for p in found[1]] == [("long", 5, 1), ("short", 7, 7)]


def test_batches_have_similar_lengths():
    assert batches_of_similar_length([3, 40, 5, 4, 38]) == [[0, 3, 2], [4, 1]]
    assert batches_of_similar_length([30, 40, 35]) == [[0, 2, 1]]  # little to spare
    for lengths, batches in (([0, 0], [[0, 1]]), ([7], [[0]]), ([], [])):
        assert batches_of_similar_length(lengths) == batches


def test_splice_puts_memories_in_place():
    places = find_invocations(torch.tensor([[1, 50, 60, 2], [1, 2, 3, 4]]), [0, 0], {"short": 50}, {"short": 60})
    splice = Splice(places, [[torch.full((2, 1), 9.0)], []], 4)
    embeds = torch.arange(8.0).view(2, 4, 1)
    assert splice.embeddings(embeds).squeeze(-1).tolist() == [[0, 1, 9, 9, 2, 3], [4, 5, 6, 7, 4, 4]]
    assert splice.mask(torch.ones(2, 4)).tolist() == [[1] * 6, [1] * 4 + [0, 0]]
    positions = torch.tensor([[3, 4, 5, 6], [0, 1, 2, 3]])
    assert splice.positions(positions)[0].tolist() == [3, 4, 5, 6, 7, 8]
    assert splice.positions(positions)[1, :4].tolist() == [0, 1, 2, 3]
    assert torch.equal(splice.gather(splice.embeddings(embeds)), embeds)
