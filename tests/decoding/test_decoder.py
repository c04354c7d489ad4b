"""The decoder as a user meets it: schedules, budgets, processors, criteria, streamers, seeds, and what it refuses."""

from __future__ import annotations

from itertools import pairwise

import pytest
import tiny
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, pipeline
from transformers.generation.streamers import BaseStreamer

import vismem
from vismem.decoding.policies import Forced, Random, policy_of


@pytest.fixture
def model(family):
    return tiny.equip(family)


def run(model, batch, policy="learned", **kwargs):
    settings = {"max_new_tokens": 12, "return_dict_in_generate": True, "do_sample": False, "eos_token_id": None}
    return model.generate(**batch, invocation=policy, **{**settings, **kwargs})


def words(model, batch, out, row=0):
    """A row's new tokens without the inserted ones."""
    new = out.sequences[row, batch["input_ids"].shape[1] :].tolist()
    put_in = {
        p for i in out.invocations[row] for p in ((i.position, i.position + 1) if i.forced else (i.position + 1,))
    }
    return [token for place, token in enumerate(new) if place not in put_in]


def test_transformers_is_called_without_deprecated_arguments(model, monkeypatch):
    batch = tiny.mixed_batch(model.processor)
    said = []
    monkeypatch.setattr("transformers.generation.utils.logger.warning_once", lambda *told: said.append(told))
    sampled = {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4}
    assert len(model.generate(**batch, **sampled)) == 2 * len(batch["input_ids"])
    assert len(model.generate(**batch, generation_config=GenerationConfig(**sampled))) == 2 * len(batch["input_ids"])
    model.generate(**batch, do_sample=False, max_new_tokens=4, stop_strings=["."])
    assert said == []


def test_forced_goes_before_its_step_and_costs_no_budget(model):
    batch = tiny.mixed_batch(model.processor)
    plain = run(model, batch, "off")
    out = run(model, batch, Forced([(0, 5, "short"), (1, 0, "long"), (1, 0, "short"), (2, 11, "long")]))
    assert [[i.position for i in row] for row in out.invocations] == [[5], [0, 2], [11]]
    assert [[i.kind for i in row] for row in out.invocations] == [["short"], ["long", "short"], ["long"]]
    assert all(i.forced and i.length == 4 for row in out.invocations for i in row)
    for row, before in enumerate((5, 0, 11)):
        found = words(model, batch, out, row)
        assert found[:before] == words(model, batch, plain, row)[:before]
        assert len(found) >= 12 and set(found[12:]) <= {model.processor.tokenizer.pad_token_id}
    # Memory makes a difference to what follows.
    assert words(model, batch, out, 0)[5:12] != words(model, batch, plain, 0)[5:12]


def test_one_invocation_costs_one_policy_forward(model):
    """N + 2 positions in one forward of the base, which also replaces the step of the invocation token."""
    batch = tiny.prompts(model.processor, [tiny.message("look", tiny.picture(0))])
    widths = []
    forward = model.base.model.forward

    def counted(*args, **kwargs):
        widths.append(kwargs["inputs_embeds"].shape[1] if kwargs.get("inputs_embeds") is not None else "prompt")
        return forward(*args, **kwargs)

    model.base.model.forward = counted
    run(model, batch, "off", max_new_tokens=6)
    plain, widths[:] = list(widths), []
    run(model, batch, Forced([(0, 3, "short")]), max_new_tokens=6)
    assert len(widths) == len(plain) + 1
    assert sorted(str(w) for w in widths) == sorted([*map(str, plain), "6"])
    widths[:] = []
    run(model, batch, Forced([(0, 3, "long")]), max_new_tokens=6)
    assert len(widths) == len(plain) + 1


def test_text_only_rows_have_long_memory_alone(model):
    """Nothing to look at: long-term memory works, short-term is refused when forced and left out otherwise."""
    batch = tiny.prompts(
        model.processor, [tiny.message("A red cup?"), tiny.message("What is on the table?", tiny.picture(0))]
    )
    out = run(model, batch, Forced([(0, 2, "long"), (1, 2, "short")]))
    assert [[i.kind for i in row] for row in out.invocations] == [["long"], ["short"]]
    with pytest.raises(ValueError, match=r"row 0 .*no image"):
        run(model, batch, Forced([(0, 2, "short")]))
    out = run(model, batch, Random(1.0, where="anywhere", seed=1, kinds=("short",)))
    assert not out.invocations[0] and out.invocations[1]
    only_text = tiny.prompts(model.processor, [tiny.message("A red cup?")])
    assert run(model, only_text, Forced([(0, 1, "long")])).invocations[0][0].length == 4
    expected = model.base.generate(**only_text, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(run(model, only_text, "off").sequences, expected)


def test_learned_never_looks_without_an_image(model):
    with torch.no_grad():
        for name, parameter in model.tokens.named_parameters():
            if name.endswith("output") or model.tokens.tied:
                parameter.mul_(6)
    batch = tiny.prompts(model.processor, [tiny.message("A red cup?")] * 4)
    out = run(model, batch, do_sample=True, seed=0, max_new_tokens=40)
    kinds = {i.kind for row in out.invocations for i in row}
    assert kinds == {"long"}


def test_forced_outside_the_batch_is_refused(model):
    batch = tiny.prompts(model.processor, [tiny.message("A red cup?")])
    with pytest.raises(ValueError, match="row 3"):
        run(model, batch, Forced([(3, 0, "long")]))


def test_random_keeps_to_its_rate_and_places(model):
    batch = tiny.mixed_batch(model.processor)
    assert not any(run(model, batch, Random(0.0)).invocations)
    every = run(model, batch, Random(1.0, where="anywhere"), max_new_tokens=30)
    gaps = [b.position - a.position for row in every.invocations for a, b in pairwise(row)]
    assert gaps and min(gaps) == 2 + model.memory_config.min_gap
    assert max(map(len, every.invocations)) <= model.memory_config.max_invocations
    at_delimiters = run(model, batch, Random(1.0, where="delimiter"), max_new_tokens=30)
    prompt = batch["input_ids"].shape[1]
    for row, invocations in enumerate(at_delimiters.invocations):
        new = at_delimiters.sequences[row, prompt:].tolist()
        assert invocations[0].position == 0
        assert all(new[i.position - 1] in model.delimiters for i in invocations[1:])


def test_a_seed_or_generator_decides_the_tokens(model):
    batch = tiny.mixed_batch(model.processor)
    policy = Forced([(0, 2, "short")])
    first, second = (run(model, batch, policy, do_sample=True, seed=4) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    generator = torch.Generator().manual_seed(4)
    assert torch.equal(run(model, batch, policy, do_sample=True, generator=generator).sequences, first.sequences)
    assert not torch.equal(run(model, batch, policy, do_sample=True, seed=5).sequences, first.sequences)


def test_processors_see_each_row_at_its_own_length(model):
    """A row with a memory behind it is processed as if it were alone."""

    class Lengths(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, input_ids.shape[1] % 50] += 100  # what is written depends on the length alone
            return scores

    batch = tiny.mixed_batch(model.processor)
    prompt = batch["input_ids"].shape[1]
    processors = LogitsProcessorList([Lengths()])
    out = run(model, batch, Forced([(1, 3, "short")]), logits_processor=processors)
    for row in range(3):
        new = out.sequences[row, prompt:].tolist()
        put_in = {p for i in out.invocations[row] for p in (i.position, i.position + 1)}
        own = [(place, token) for place, token in enumerate(new[: 12 + len(put_in)]) if place not in put_in]
        assert all(token == (prompt + place) % 50 for place, token in own)


@pytest.mark.parametrize(
    "settings", [{"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"bad_words_ids": [[9]]}]
)
def test_processors_that_look_tokens_up_accept_memory_tokens(model, settings):
    batch = tiny.mixed_batch(model.processor)
    for policy in (Forced([(0, 2, "short"), (1, 4, "long")]), Random(0.5, where="anywhere"), "learned"):
        assert run(model, batch, policy, **settings).sequences.shape[0] == 3


def test_stopping(model):
    class Third(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            done = [False, False, False]
            done[1] = input_ids.shape[1] - prompt >= 5
            return torch.tensor(done)

    batch = tiny.mixed_batch(model.processor)
    prompt = batch["input_ids"].shape[1]
    plain = run(model, batch, "off").sequences
    out = run(model, batch, Forced([(0, 8, "long")]), stopping_criteria=[Third()])
    assert torch.equal(out.sequences[1, prompt : prompt + 5], plain[1, prompt : prompt + 5])
    assert (out.sequences[1, prompt + 5 :] == model.processor.tokenizer.pad_token_id).all()
    stop = model.processor.tokenizer.decode(plain[0, prompt + 3 : prompt + 5])
    expected = model.base.generate(
        **batch, max_new_tokens=12, do_sample=False, stop_strings=[stop], tokenizer=model.processor.tokenizer
    )
    assert torch.equal(
        model.generate(**batch, max_new_tokens=12, do_sample=False, stop_strings=[stop], invocation="off"), expected
    )
    eos = int(plain[2, prompt + 4])
    ended = run(model, batch, Forced([(0, 2, "short")]), eos_token_id=eos)
    assert eos in ended.sequences[2, prompt : prompt + 5].tolist()


def test_streamer_gets_every_token(model):
    class Keep(BaseStreamer):
        def __init__(self):
            self.values, self.ended = [], False

        def put(self, value):
            self.values += value.flatten().tolist()

        def end(self):
            self.ended = True

    batch = tiny.prompts(model.processor, [tiny.message("look", tiny.picture(0))])
    streamer = Keep()
    out = run(model, batch, Forced([(0, 4, "short")]), streamer=streamer)
    assert streamer.ended and streamer.values == out.sequences[0].tolist()


def test_scores_of_inserted_tokens_are_certain(model):
    batch = tiny.mixed_batch(model.processor)
    prompt = batch["input_ids"].shape[1]
    out = run(model, batch, Forced([(0, 2, "short")]), output_scores=True, output_logits=True)
    for place in (2, 3):
        token = out.sequences[0, prompt + place]
        assert out.scores[place][0].log_softmax(-1)[token] == 0
        assert torch.isinf(out.scores[place][0]).sum() == out.scores[place].shape[1] - 1
    for place in (0, 1, 4, 5, 13):
        assert out.scores[place][0].argmax() == out.sequences[0, prompt + place]


def test_earlier_memory_tokens_in_a_prompt_are_read(model):
    """An answer with memory tokens can stand in the next turn's prompt: their rows live beside the base's table."""
    marks = "<ms_I><ms_E>"
    talk = [
        *tiny.message("look", tiny.picture(0)),
        {"role": "assistant", "content": [{"type": "text", "text": f"A red cup{marks}."}]},
        {"role": "user", "content": [{"type": "text", "text": "look again!"}]},
    ]
    batch = tiny.prompts(model.processor, [talk])
    assert model.tokens.present(batch["input_ids"])
    assert run(model, batch, Forced([(0, 1, "short")])).invocations[0][0].length == 4


def test_a_generation_config_object_is_honoured(model):
    batch = tiny.mixed_batch(model.processor)
    config = GenerationConfig(
        max_new_tokens=5, do_sample=True, num_return_sequences=2, eos_token_id=None, pad_token_id=0
    )
    out = model.generate(**batch, generation_config=config, seed=0, return_dict_in_generate=True)
    assert out.sequences.shape[0] == 6 and len(out.invocations) == 6
    forced = Forced([(5, 1, "short")])
    out = model.generate(**batch, generation_config=config, invocation=forced, seed=0, return_dict_in_generate=True)
    assert [len(row) for row in out.invocations] == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 2}, "greedily or by sampling"),
        ({"assistant_model": "x"}, "assisted"),
        ({"prompt_lookup_num_tokens": 3}, "greedily or by sampling"),
        ({"output_attentions": True}, "output_attentions"),
        ({"custom_generate": "some/repo"}, "custom_generate"),
        ({"policy": "sometimes"}, "unknown invocation 'sometimes'"),
    ],
)
def test_refusals_are_one_clear_line(model, settings, message):
    batch = tiny.prompts(model.processor, [tiny.message("look", tiny.picture(0))])
    with pytest.raises(ValueError, match=message) as caught:
        run(model, batch, **settings)
    assert "\n" not in str(caught.value)


def test_images_that_do_not_fit_the_prompt_are_refused(model):
    batch = tiny.mixed_batch(model.processor)
    places = batch["input_ids"] == model.backbone.image_token_id
    batch["input_ids"][places.nonzero()[0, 0], places.nonzero()[0, 1]] = 100
    with pytest.raises(ValueError, match="image tokens"):
        run(model, batch)


def test_no_prompt_is_refused(model):
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(max_new_tokens=3)


@pytest.mark.parametrize("bad", [(0, 1, "medium"), (-1, 0, "short"), (0, 1)])
def test_bad_schedules_are_refused(bad):
    with pytest.raises(ValueError, match="Forced takes"):
        Forced([bad])


def test_bad_rates_are_refused():
    with pytest.raises(ValueError, match="between 0 and 1"):
        Random(1.5)
    with pytest.raises(ValueError, match="delimiter"):
        Random(0.5, where="somewhere")
    with pytest.raises(ValueError, match="policy"):
        policy_of(3)


def test_swapped_exchanges_the_kinds_of_a_schedule():
    assert Forced([(0, 1, "short"), (2, 3, "long")]).swapped().schedule == [(0, 1, "long"), (2, 3, "short")]


def test_memory_follows_the_base_to_bf16(family):
    """Every memory module follows the base: built in bf16, or moved there later."""
    born = tiny.equip(family, torch.bfloat16)
    moved = tiny.equip(family).to(torch.bfloat16)
    for model in (born, moved):
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        batch = tiny.mixed_batch(model.processor)
        out = run(model, batch, Forced([(0, 2, "short"), (1, 3, "long"), (1, 8, "short")]))
        assert [len(row) for row in out.invocations] == [1, 2, 0]
        assert all(i.memory.dtype == torch.bfloat16 and i.memory.isfinite().all() for r in out.invocations for i in r)
        labels = out.sequences.clone()
        labels[:, : batch["input_ids"].shape[1]] = -100
        rest = {k: v for k, v in batch.items() if k not in ("input_ids", "attention_mask")}
        loss = model.train()(out.sequences, labels=labels, prompt_length=batch["input_ids"].shape[1], **rest).loss
        loss.backward()
        gradients = [p.grad for p in model.memory.parameters()]
        assert all(g is not None and g.isfinite().all() for g in gradients)


def test_works_in_a_pipeline(model):
    ask = pipeline("image-text-to-text", model=model, processor=model.processor)
    found = ask(text=tiny.message("look", tiny.picture(0)), max_new_tokens=4, return_full_text=False)
    assert isinstance(found[0]["generated_text"], str)


def test_public_names_exist():
    assert all(hasattr(vismem, name) for name in vismem.__all__)
    assert vismem.invocation.Random is Random and vismem.invocation.Forced is Forced
    assert {"VisMem", "VisMemConfig", "Invocation", "invocation"} <= set(vismem.__all__)
    found = vismem.Invocation(kind="short", position=3, length=8, forced=False)
    assert found.to_dict() == {"kind": "short", "position": 3, "length": 8, "forced": False}


def test_a_schedule_samples_as_the_base_until_its_first_invocation(model):
    """With a schedule, sampling uses the base's vocabulary, so the same seed gives the same tokens before it."""
    batch = tiny.mixed_batch(model.processor)
    settings = {"max_new_tokens": 12, "do_sample": True, "eos_token_id": None}
    torch.manual_seed(3)
    expected = model.base.generate(**batch, **settings)
    torch.manual_seed(3)
    found = model.generate(**batch, invocation=Forced([(row, 10, "long") for row in range(3)]), **settings)
    until = batch["input_ids"].shape[1] + 10
    assert torch.equal(found[:, :until], expected[:, :until])


@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {"encoder_repetition_penalty": 1.5}])
def test_processors_that_hold_the_prompts_work_with_copies(model, settings):
    """Several answers to each prompt of a padded batch are as the base gives them, each with its prompt's padding."""
    batch = tiny.mixed_batch(model.processor)
    settings = {**settings, "max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2, "eos_token_id": None}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    torch.manual_seed(3)
    expected = model.base.generate(**batch, **settings)
    for cache in ("dynamic", "static"):
        torch.manual_seed(3)
        found = model.generate(**batch, invocation="off", cache_implementation=cache, **settings)
        assert torch.equal(found.sequences, expected.sequences)
        for ours, theirs in zip(found.scores, expected.scores, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-4)
