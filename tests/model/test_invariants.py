"""The ten invariants of docs/method.md, on tiny real models of every family. Each fails when it is broken."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain, pairwise
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

import vismem
from vismem.decoding.policies import Forced, Random

EVERY_FAMILY = True
SCHEDULE = Forced([(0, 0, "short"), (0, 7, "long"), (1, 3, "long"), (1, 3, "short"), (1, 9, "short"), (2, 5, "short")])
SAMPLING = [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"do_sample": True, "repetition_penalty": 1.3, "min_p": 0.2},
    {"do_sample": True, "num_return_sequences": 2},
    # Many tokens end an answer, so the least length is what keeps it going.
    {"do_sample": False, "no_repeat_ngram_size": 2, "min_new_tokens": 10, "eos_token_id": list(range(20, 120))},
]


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    now = module.state_dict()
    assert now.keys() == before.keys()
    return {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}


def answers(model, batch, policy, **kwargs) -> vismem.VisMemOutput:
    """Answers under that policy, until shortly after the schedule's last place."""
    settings = {"max_new_tokens": 12, "return_dict_in_generate": True, **kwargs}
    return model.generate(**batch, invocation=policy, **settings)


def one_row(batch: dict, row: int, processor) -> dict:
    """That row's prompt made anew, alone and without padding."""
    conversations = [
        tiny.message("What is on the table?", tiny.picture(0)),
        tiny.message(
            "Describe the image: a red cup, a blue book and two green pens.", tiny.picture(1), tiny.picture(2)
        ),
        tiny.message("look again!", tiny.picture(3, (48, 32))),
    ]
    return tiny.prompts(processor, [conversations[row]])


# 1. Memory off: the base's own words.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_off_writes_what_the_base_writes(family, dtype):
    model = tiny.equip(family, dtype)
    alone, _ = tiny.base_and_processor(family, dtype)  # a base that never met a memory
    batch = tiny.mixed_batch(model.processor)
    answers(model, batch, SCHEDULE)  # memory was at work before
    # Sampling is the same for all families: two different ones try all of it in both precisions, the others half each.
    turn = list(tiny.FAMILIES).index(family) + (dtype == torch.bfloat16)
    for number, settings in enumerate(SAMPLING):
        if number % 2 != turn % 2 and family not in tiny.UNLIKE:
            continue
        policy = ("off", Forced([]))[(number // 2 + (dtype == torch.bfloat16)) % 2]  # both ways to have no memory
        torch.manual_seed(5)
        expected = alone.generate(**batch, max_new_tokens=12, **settings)
        torch.manual_seed(5)
        found = model.generate(**batch, max_new_tokens=12, invocation=policy, **settings)
        assert torch.equal(found, expected), (settings, policy)


def test_off_gives_the_base_scores(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    settings = {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    settings |= {"do_sample": True, "temperature": 0.7, "eos_token_id": None}
    torch.manual_seed(0)
    expected = model.base.generate(**batch, **settings)
    torch.manual_seed(0)
    found = model.generate(**batch, invocation="off", **settings)
    for name in ("scores", "logits"):
        for ours, theirs in zip(found[name], expected[name], strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)


def test_off_with_a_sliding_window():
    """A base with local attention, whose cache forgets: memory and text still fit together."""
    model = tiny.equip("idefics3", base={"sliding_window": 12})
    alone = tiny.FAMILIES["idefics3"].build(sliding_window=12)
    batch = tiny.mixed_batch(model.processor)
    expected = alone.generate(**batch, max_new_tokens=40, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=40, do_sample=False, invocation="off"), expected)


def test_adapter_left_on_would_change_the_base(family):
    """The guard of invariant 1 can fail: with an adapter still in place the base writes something else."""
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    expected = model.base.generate(**batch, max_new_tokens=12, do_sample=False)
    with torch.no_grad():
        for parameter in model.memory.long.adapter.parameters():
            parameter.normal_(std=0.5)
    answers(model, batch, SCHEDULE)
    assert torch.equal(model.base.generate(**batch, max_new_tokens=12, do_sample=False), expected)
    with model.memory.long.adapter.on():
        assert not torch.equal(model.base.generate(**batch, max_new_tokens=12, do_sample=False), expected)


def test_adapter_is_taken_out_after_an_error(family):
    model = tiny.equip(family)
    names = [name for name, _ in model.base.named_modules()]
    with pytest.raises(RuntimeError), model.memory.short.adapter.on(), model.memory.long.adapter.on():
        raise RuntimeError("on purpose")
    assert [name for name, _ in model.base.named_modules()] == names


# 2 and 8. Training touches its own part, and never the base.


def test_training_changes_its_own_part_only(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    prompt = batch["input_ids"].shape[1]
    # A row of its own for each kind, and one whose sampled answer holds both.
    out = answers(model, batch, SCHEDULE, eos_token_id=None)
    model.train()
    labels = out.sequences.clone()
    labels[:, :prompt] = -100
    for stage, parts in (("one", ("builder", "short", "long")), ("two", ("tokens",))):
        base, memory, tokens = (snapshot(m) for m in (model.base, model.memory, model.tokens))
        optimizer = torch.optim.AdamW([p for part in parts for p in model.parameters_of(part)], lr=1e-2, weight_decay=0)
        for _ in range(2):
            found = model(**full(batch, out.sequences), labels=labels, prompt_length=prompt)
            optimizer.zero_grad()
            found.loss.backward()
            optimizer.step()
        assert not changed(model.base, base)
        assert all(parameter.grad is None for parameter in model.base.parameters())
        if stage == "one":
            assert not changed(model.tokens, tokens)
            assert changed(model.memory, memory) == set(memory)
        else:
            assert not changed(model.memory, memory)
            # End tokens are never sampled, so where the head is untied their output rows have nothing to learn from.
            assert changed(model.tokens, tokens) == set(tokens) - {"end_output"}


def full(batch: dict, sequences: torch.Tensor, pad: int | None = None) -> dict:
    """The training forward's inputs for finished sequences: the prompt's images, and a mask over what is real."""
    mask = torch.ones_like(sequences)
    prompt = batch["input_ids"].shape[1]
    mask[:, :prompt] = batch["attention_mask"]
    if pad is not None:
        mask[:, prompt:] = (sequences[:, prompt:] != pad).long()
    rest = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
    return {"input_ids": sequences, "attention_mask": mask, **rest}


# 3. Batch invariance.


def test_rows_do_not_depend_on_their_neighbours(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    prompt = batch["input_ids"].shape[1]
    together = answers(model, batch, SCHEDULE, do_sample=False)
    for row in range(3):
        schedule = Forced([(0, step, kind) for r, step, kind in SCHEDULE.schedule if r == row])
        alone = answers(model, one_row(batch, row, model.processor), schedule, do_sample=False)
        own = alone.sequences.shape[1] - (one_row(batch, row, model.processor)["input_ids"].shape[1])
        assert torch.equal(together.sequences[row, prompt : prompt + own], alone.sequences[0, -own:])
        assert together.invocations[row] == alone.invocations[0]
        for ours, theirs in zip(together.invocations[row], alone.invocations[0], strict=True):
            assert torch.allclose(ours.memory, theirs.memory, atol=1e-4)


def test_random_invocations_do_not_depend_on_neighbours(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    policy = Random(0.5, where="anywhere", seed=3)
    together = answers(model, batch, policy, do_sample=False, eos_token_id=None)
    again = answers(model, batch, policy, do_sample=False, eos_token_id=None)
    assert torch.equal(together.sequences, again.sequences)
    alone = answers(model, one_row(batch, 0, model.processor), policy, do_sample=False, eos_token_id=None)
    assert together.invocations[0] == alone.invocations[0]
    assert alone.invocations[0]


# 4. Replay.


def test_replay_gives_the_log_probabilities_of_decoding(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    prompt = batch["input_ids"].shape[1]
    settings = {"do_sample": True, "seed": 1, "output_logits": True, "eos_token_id": None}
    out = answers(model, batch, SCHEDULE, max_new_tokens=24, **settings)
    inputs = full(batch, out.sequences)
    recomputed = model(**inputs, prompt_length=prompt)
    recorded = model(**inputs, prompt_length=prompt, states=recomputed.states)
    for found in (recomputed, recorded):
        compared = 0
        for row, invocations in enumerate(out.invocations):
            put_in = {p for i in invocations for p in (i.position, i.position + 1)}
            for place in range(len(out.logits)):
                if place in put_in or prompt + place >= out.sequences.shape[1]:
                    continue
                if len(invocations) and place >= len(out.logits) - 2 * sum(map(len, out.invocations)):
                    continue  # rows with fewer invocations end earlier
                width = min(model.tokens.base_vocabulary, *model.tokens.ids)
                seen = out.logits[place][row][:width].log_softmax(-1)
                replayed = found.logits[row, prompt + place - 1][:width].log_softmax(-1)
                assert torch.allclose(seen, replayed, atol=1e-4)
                compared += 1
        assert compared > 30
        for row, invocations in enumerate(out.invocations):
            for seen, replayed in zip(invocations, found.memories[row], strict=True):
                assert torch.allclose(seen.memory, replayed, atol=1e-4)


# 5. Mask direction.


def test_builder_mask_direction():
    builder = tiny.equip("idefics3").memory.builder
    visual, states = [torch.randn(5, 48), torch.randn(0, 48)], [torch.randn(3, 48), torch.randn(6, 48)]
    before = builder.encode(visual, states)
    queries = builder.query_init.shape[0]
    with torch.no_grad():
        builder.query_init.add_(1.0)
    after = builder.encode(visual, states)
    assert torch.equal(before[:, :-queries], after[:, :-queries])
    assert not torch.allclose(before[:, -queries:], after[:, -queries:], atol=1e-3)
    assert torch.allclose(builder.encode(visual, states, queries_only=True), after[:, -queries:], atol=1e-5)
    moved = builder.encode([v + torch.randn_like(v) for v in visual], [s + torch.randn_like(s) for s in states])
    assert (moved[:, -queries:] - after[:, -queries:]).abs().amax((1, 2)).min() > 1e-3


def test_builder_does_not_see_padding():
    builder = tiny.equip("idefics3").memory.builder
    visual, states = [torch.randn(5, 48), torch.randn(2, 48)], [torch.randn(9, 48), torch.randn(1, 48)]
    together = builder(visual, states)
    alone = torch.cat([builder([v], [s]) for v, s in zip(visual, states, strict=True)])
    assert torch.allclose(together, alone, atol=1e-5)


# 6. Short memory depends on the image; patches do not depend on the query.


@pytest.mark.parametrize("memory_init", ["pooled", "learned"])
def test_short_memory_depends_on_image_and_query(family, memory_init):
    model = tiny.equip(family, memory_init=memory_init)
    former, backbone = model.memory.short, model.backbone
    batches = [tiny.prompts(model.processor, [tiny.message("look", tiny.picture(i))]) for i in (0, 1)]
    images = [backbone.images(**{k: b[k] for k in backbone.image_inputs}) for b in batches]
    one, other = (former.encode(found) for found in images)
    query = torch.randn(1, 4, backbone.hidden_size)
    memory = former(query, [one])
    assert not torch.allclose(memory, former(query, [other]), atol=1e-3)
    assert not torch.allclose(memory, former(query + 1, [one]), atol=1e-3)
    # The look leaves the patches as they were, whatever was asked.
    again = former.encode(images[0])[0].keys_values
    assert all(map(torch.equal, one[0].keys_values, again))


# 7. Cached patches.


def test_cached_patches_give_the_same_memory(family):
    model = tiny.equip(family)
    batch = tiny.mixed_batch(model.processor)
    policy = Forced([(1, 2, "short"), (1, 8, "short"), (0, 4, "short")])
    encoded = []
    encode = model.memory.short.encode
    model.memory.short.encode = lambda images: encoded.append(len(images)) or encode(images)
    cached = answers(model, batch, policy, do_sample=False, eos_token_id=None)
    images = model.backbone.images(**{name: batch[name] for name in model.backbone.image_inputs})
    rows = model.backbone.rows_of_images(batch["input_ids"] == model.backbone.image_token_id, images)
    assert sum(encoded) == len(rows[0]) + len(rows[1])  # the second look at row 1 encodes nothing
    sizes = len(encoded)
    engine = sys.modules["vismem.decoding.decoder"]
    observe = engine.Decoder.observe

    def forgetful(self, row, kind, states):
        row.images.patches = None
        return observe(self, row, kind, states)

    engine.Decoder.observe = forgetful
    try:
        fresh = answers(model, batch, policy, do_sample=False, eos_token_id=None)
    finally:
        engine.Decoder.observe = observe
    assert len(encoded) > 2 * sizes
    assert torch.equal(cached.sequences, fresh.sequences)
    for ours, theirs in zip(chain(*cached.invocations), chain(*fresh.invocations), strict=True):
        assert torch.allclose(ours.memory, theirs.memory, atol=1e-5)


# 9. Save, load in a new process.


def test_saved_models_answer_alike_in_a_new_process(tmp_path):
    """All families share one new process, since starting it takes longest."""
    for family in tiny.FAMILIES:
        folder = tmp_path / family
        model = tiny.equip(family)
        model.base.save_pretrained(folder / "base")
        model.processor.save_pretrained(folder / "base")
        model.base.config._name_or_path = model.base.name_or_path = str(folder / "base")
        model.save_pretrained(folder / "memory")
        assert {path.suffix for path in (folder / "memory").iterdir()} == {".json", ".safetensors", ".md"}
        out = answers(model, tiny.mixed_batch(model.processor), SCHEDULE, do_sample=False)
        save_file({"expected": out.sequences}, folder / "expected.safetensors")
    code = (
        "import sys; from pathlib import Path; sys.path[:0] = sys.argv[1:3]\n"
        "import tiny, torch, vismem, test_invariants as t; from safetensors.torch import load_file\n"
        "for family in tiny.FAMILIES:\n"
        "    folder = Path(sys.argv[3]) / family\n"
        "    loading = getattr(tiny.FAMILIES[family], 'LOADING', {})\n"
        "    model = vismem.VisMem.from_pretrained(folder / 'memory', **loading)\n"
        "    out = t.answers(model, tiny.mixed_batch(model.processor), t.SCHEDULE, do_sample=False)\n"
        "    expected = load_file(folder / 'expected.safetensors')['expected']\n"
        "    assert torch.equal(out.sequences, expected), family + ' writes other words'\n"
    )
    places = [str(Path(place).parent) for place in (__file__, tiny.__file__)]
    ran = subprocess.run([sys.executable, "-c", code, *places, str(tmp_path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


# 10. Only invocation tokens can be sampled, and every invocation is well-formed.


def test_answers_are_well_formed(family):
    model = tiny.equip(family, min_gap=2, max_invocations=3)
    with torch.no_grad():  # make the four tokens as tempting as they can be
        for name, parameter in model.tokens.named_parameters():
            if name.endswith("output") or model.tokens.tied:
                parameter.mul_(15)
    batch = tiny.mixed_batch(model.processor)
    prompt = batch["input_ids"].shape[1]
    tokens = model.tokens
    for invocation, formed in (("learned", ("short", "long")), ("short", ("short",)), ("long", ("long",))):
        out = answers(model, batch, invocation, do_sample=True, seed=2, max_new_tokens=20, eos_token_id=None)
        assert sum(map(len, out.invocations)) > 3
        for row, invocations in zip(out.sequences[:, prompt:].tolist(), out.invocations, strict=True):
            starts = [i for i, token in enumerate(row) if token in tokens.kind_of]
            ends = [i for i, token in enumerate(row) if token in tokens.end_ids.values()]
            assert starts == [i.position for i in invocations]
            assert ends == [i + 1 for i in starts]
            assert len(starts) <= 3
            assert all(second - first >= 4 for first, second in pairwise(starts))
            for found in invocations:
                assert row[found.position] == tokens.invocation_ids[found.kind]
                assert row[found.position + 1] == tokens.end_ids[found.kind]
                assert found.length == (4 if found.kind in formed else 0)
                assert not found.forced
            new = 20 + len(invocations)  # end tokens are free
            assert len(row) >= new and set(row[new:]) <= {model.processor.tokenizer.pad_token_id}


def test_end_tokens_cannot_be_sampled(family):
    model = tiny.equip(family)
    logits = torch.zeros(2, model.tokens.vocabulary)
    forbidden = model.tokens.forbid(logits, torch.tensor([[True, False], [False, True]]))
    ends = list(model.tokens.end_ids.values())
    assert torch.isinf(forbidden[:, ends]).all()
    short, long = (model.tokens.invocation_ids[kind] for kind in ("short", "long"))
    assert torch.isinf(forbidden[[0, 1], [long, short]]).all()
    assert (forbidden[[0, 1], [short, long]] == 0).all()
