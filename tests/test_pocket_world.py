"""The pocket world: scenes, answers, conversations, their encoding, and the shipped base."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

pytest.importorskip("sklearn")

from vismem.pocket import BASE_PATH, load_base
from vismem.pocket.conversations import sample_conversation, sample_training_conversation
from vismem.pocket.tasks import TASKS, final_result, promotion, score
from vismem.pocket.world import (
    LABEL_NAMES,
    PROMOTION_RULES,
    RULES,
    SIDE,
    Rule,
    digit_indices,
    load_handwriting,
    render_array,
    sample_scene,
)

needs_base = pytest.mark.skipif(not (BASE_PATH / "config.json").is_file(), reason="no pocket base yet")


@pytest.fixture(scope="module")
def base():
    return load_base()


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(BASE_PATH)


def test_scenes_and_pictures_are_determined_by_the_seed():
    first, second, other = (sample_scene(Random(seed)) for seed in (3, 3, 4))
    assert first == second != other
    assert np.array_equal(render_array(first), render_array(second))
    assert not np.array_equal(render_array(first), render_array(other))
    assert render_array(first).shape == (64, 64, 3)


def test_train_and_test_handwriting_are_disjoint_and_labelled_right():
    train, test = digit_indices("train"), digit_indices("test")
    assert not {i for ids in train.values() for i in ids} & {i for ids in test.values() for i in ids}
    values = load_handwriting()[1]
    assert sum(map(len, train.values())) + sum(map(len, test.values())) == len(values)
    for split in ("train", "test"):
        scene = sample_scene(Random(0), split)
        for r in range(SIDE):
            for c in range(SIDE):
                assert scene.digits[r][c] in digit_indices(split)[scene.prices[r][c]]
                assert values[scene.digits[r][c]] == scene.prices[r][c]
    with pytest.raises(ValueError, match="split"):
        digit_indices("validation")


def test_tidy_shelves_are_alike_in_rows_or_columns_and_others_are_not():
    def alike(scene):
        return all(len(set(row)) == 1 for row in scene.colours) or len(set(scene.colours)) == 1

    assert all(alike(sample_scene(Random(seed), tidy=1.0)) for seed in range(20))
    assert not any(alike(sample_scene(Random(seed))) for seed in range(20))


def test_every_cell_is_drawn_in_its_own_block():
    """Changing one cell's tag changes its own 16x16 block of the picture and no other."""
    from dataclasses import replace

    scene = sample_scene(Random(5))
    colours = [list(row) for row in scene.colours]
    colours[1][2] = "green" if colours[1][2] != "green" else "red"
    changed = (render_array(scene) != render_array(replace(scene, colours=tuple(map(tuple, colours))))).any(-1)
    assert changed[16:32, 32:48].any()
    changed[16:32, 32:48] = False
    assert not changed.any()


@pytest.mark.parametrize("task", TASKS)
def test_answers_follow_from_the_scene(task):
    """The answers, worked out again from the scenes by other means."""
    for seed in range(40):
        conversation = sample_conversation(Random(seed), task=task)
        question, scenes = conversation.turns[-1].question, conversation.scenes
        scene, cells = scenes[0], sorted(question.cells)
        words = question.text.lower()
        if task in ("colour", "shape", "digit", "item"):
            ((r, c),) = cells
            known = {"colour": scene.colours, "shape": scene.shapes, "digit": scene.prices}
            wanted = " ".join(str(known[k][r][c]) for k in ((task,) if task in known else known))
            assert conversation.answer == wanted
            named = (str(r + 1), ("one", "two", "three", "four")[r], ("first", "second", "third", "fourth")[r])
            assert any(name in words for name in named)
        elif task in ("row", "column"):
            assert conversation.answer.split() == [str(scene.prices[r][c]) for r, c in cells]
        elif task in ("colours", "shapes"):
            grid = scene.colours if task == "colours" else scene.shapes
            assert conversation.answer.split() == [grid[r][c] for r, c in cells]
        elif task == "sum":
            assert int(conversation.answer) == sum(scene.prices[r][c] for r, c in cells)
        elif task == "label":
            assert conversation.answer in scene.labels
        elif task == "basket":
            total = sum(scene.prices[r][c] for r, c in cells) * (2 if len(cells) == 1 else 1)
            assert int(conversation.answer) == total
        elif task == "compare":
            ((r, c),) = cells
            one, two = (s.prices[r][c] for s in scenes)
            assert conversation.answer == ("the first" if one > two else "the second" if one < two else "same")
        elif task == "difference":
            column = int(conversation.answer.split()[-1]) - 1
            r = cells[0][0]
            assert [a != b for a, b in zip(scenes[0].prices[r], scenes[1].prices[r], strict=True)] == [
                c == column for c in range(SIDE)
            ]
        elif task == "promotion":
            name = conversation.answer_text.split(":")[0].lower()
            r = cells[0][0]
            assert scene.labels[r] == name
            rule = next(rule for rule in RULES if f": {rule.words}." in conversation.answer_text)
            assert f"{rule.words}." in question.text  # stated
            assert int(conversation.answer) == sum(rule.apply(list(scene.prices[r])))
        else:
            for r in range(SIDE):
                line = conversation.answer_text.split(f"Row {r + 1}:")[1].split(".")[0]
                digits = [int(word) for word in line.replace(",", " ").split() if word.isdigit()]
                assert digits == ([] if task == "describe_tags" else list(scene.prices[r]))
        assert score(task, conversation.answer_text, conversation.answer) == 1.0


def test_rules_do_what_they_say():
    assert Rule("first", "free").apply([4, 7, 0, 2]) == [0, 7, 0, 2]
    assert Rule("last", "double").apply([4, 7, 0, 2]) == [4, 7, 0, 4]
    assert Rule("each", "plus 2").apply([4, 7, 0, 2]) == [6, 9, 2, 4]
    assert set(PROMOTION_RULES) == set(LABEL_NAMES)
    assert len(set(PROMOTION_RULES.values())) == len(LABEL_NAMES)
    assert set(PROMOTION_RULES.values()) <= set(RULES)


def test_score_reads_the_result_after_the_last_so():
    assert final_result("4 7 0 2. 11, 11, 13. So 13.") == "13"
    assert score("sum", "4 7 0 2. 11, 11, 13. So 13.", "13") == 1.0
    assert score("sum", "So 13. So 14.", "13") == 0.0
    assert score("sum", "13, 14", "13") == 0.0
    assert score("colour", " Red. ", "red") == 1.0
    assert score("colour", "Red or blue.", "red") == 0.0
    description = "Row 1: 1 2 3 4. Row 2: 5 6 7 8. Row 3: 0 0 0 0. Row 4: 9 9 9 9"
    assert score("describe_prices", description.replace("5", "4"), description) == 0.75
    assert score("describe_prices", "", description) == 0.0


def test_unstated_promotions_leak_nothing():
    """The text does not say the rule, and the rules applied to a label are not its hidden one more than by chance."""
    applied = {name: [] for name in LABEL_NAMES}
    for seed in range(1500):
        rng = Random(seed)
        scene = sample_scene(rng)
        question = promotion(scene, rng, "unstated")
        assert not any(rule.words in question.text.lower() for rule in RULES)
        name, rest = question.reply.split(":", 1)
        applied[name.lower()].append(rest.split(".")[0].strip())
    for name, rules in applied.items():
        assert len(set(rules)) == len(RULES)
        assert rules.count(PROMOTION_RULES[name].words) / len(rules) < 3 / len(RULES)
    hidden = [promotion(sample_scene(Random(s)), Random(s), "hidden-truth") for s in range(50)]
    for question in hidden:
        name, rest = question.reply.split(":", 1)
        assert rest.split(".")[0].strip() == PROMOTION_RULES[name.lower()].words
        assert not any(rule.words in question.text.lower() for rule in RULES)


@pytest.mark.parametrize("distance", [0, 1, 4])
@pytest.mark.parametrize("again", [False, True])
def test_conversations_have_the_asked_shape(distance, again):
    for task in ("row", "compare", "promotion"):
        conversation = sample_conversation(Random(1), task=task, distance=distance, shown_again=again)
        users = [m for m in conversation.messages if m["role"] == "user"]
        with_image = [any(part["type"] == "image" for part in m["content"]) for m in users]
        assert len(users) == distance + 1 and conversation.messages[-1]["role"] == "user"
        assert with_image == [i == 0 or (again and i == distance) for i in range(distance + 1)]
        for turn in conversation.turns[:-1]:
            assert not turn.question.cells & conversation.turns[-1].question.cells


def test_a_description_before_the_question_keeps_its_answer_to_itself():
    for task in ("colour", "shapes", "digit", "sum", "label"):
        conversation = sample_conversation(Random(2), task=task, after_description=True)
        assert conversation.turns[-2].question.task.startswith("describe")
        assert conversation.turns[-2].question.task == (
            "describe_prices" if task in ("colour", "shapes") else "describe_tags"
        )


def test_bad_requests_say_what_is_wrong():
    with pytest.raises(ValueError, match="unknown task"):
        sample_conversation(Random(0), task="poetry")
    with pytest.raises(ValueError, match="distance"):
        sample_conversation(Random(0), distance=-1)
    with pytest.raises(ValueError, match="rule"):
        sample_conversation(Random(0), task="promotion", rule="guess")


@needs_base
def test_tokenizer_gives_every_text_back(processor):
    tokenizer = processor.tokenizer
    texts = {"Ünïcode, 漢字 and\nnew lines  too"}
    for seed in range(200):
        for turn in sample_training_conversation(Random(seed)).turns:
            texts |= {turn.question.text, turn.question.reply}
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text
    for delimiter in (".", ",", ":", "\n"):
        assert len(tokenizer.encode(delimiter, add_special_tokens=False)) == 1
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id != tokenizer.eos_token_id


@needs_base
@pytest.mark.parametrize("task,distance,again", [("sum", 0, False), ("compare", 2, True), ("describe_full", 3, True)])
def test_training_ids_are_those_of_the_chat_template(processor, task, distance, again):
    from vismem.pocket.batches import Encoder, normalise

    conversation = sample_conversation(Random(7), task=task, distance=distance, shown_again=again)
    inputs = processor.apply_chat_template(
        conversation.messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    encoder = Encoder(processor.tokenizer)
    ids = encoder.encode(conversation, limit=10_000).ids
    reply = encoder.text(conversation.answer_text)
    assert inputs["input_ids"][0].tolist() + reply + [processor.tokenizer.eos_token_id] == ids
    ours = normalise(np.stack(conversation.pictures))
    assert np.allclose(inputs["pixel_values"][0, : len(ours)], ours, atol=1e-5)


def test_packed_questions_do_not_see_each_other():
    """A question packed with others gets the logits that it gets alone after the same image."""
    import torch

    from vismem.pocket.architecture import WINDOW, build_model
    from vismem.pocket.batches import Batch, Encoder
    from vismem.pocket.build import visual_tokens
    from vismem.pocket.packing import collate_rows, pack
    from vismem.pocket.tokenizer import corpus, train_tokenizer

    tokenizer = train_tokenizer(corpus(200))
    torch.manual_seed(0)
    model = build_model(tokenizer).eval()
    model.set_attn_implementation("eager")

    @torch.no_grad()
    def logits(batch):
        embeddings = model.get_input_embeddings()(batch.ids)
        slots = (batch.ids == model.config.image_token_id)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(slots, visual_tokens(model, batch.pixels)[batch.shown])
        text = model.model.text_model(inputs_embeds=embeddings, attention_mask=batch.mask, position_ids=batch.positions)
        return model.lm_head(text.last_hidden_state)

    rows = [pack(Random(seed), Encoder(tokenizer), early=False) for seed in range(8)]
    rows = [row for row in rows if row.pictures][:3]
    packed = collate_rows(rows, tokenizer.pad_token_id, WINDOW)
    together = logits(packed)
    first = 0
    for number, row in enumerate(rows):
        pictures = len(row.pictures)
        for block in (1, max(row.blocks)):
            places = [i for i, b in enumerate(row.blocks) if b in (0, block)]
            pixels = packed.pixels[first : first + pictures]
            alone = Batch(torch.tensor([row.ids])[:, places], None, pixels, torch.arange(pictures), None)
            assert torch.allclose(together[number, places], logits(alone)[0], atol=1e-4)
        first += pictures


@needs_base
def test_any_picture_goes_through(base):
    import torch
    from PIL import Image

    model, processor = base
    sizes = [((300, 200), "teal"), ((1, 1), "white"), ((64, 64), "black"), ((64, 64), (127, 127, 127))]
    for size, colour in sizes:
        content = [
            {"type": "image", "image": Image.new("RGB", size, colour)},
            {"type": "text", "text": "Hello"},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        assert inputs["pixel_values"].shape == (1, 1, 3, 64, 64)
        with torch.inference_mode():
            assert torch.isfinite(model(**inputs).logits).all()


@needs_base
def test_the_base_answers_about_unseen_scenes(base):
    from vismem.pocket.evaluate import Answerer

    model, processor = base
    assert model.config.text_config.sliding_window and model.vocab_size == len(processor.tokenizer)
    answerer = Answerer(model, processor.tokenizer)
    tasks = ("colour", "digit", "row")
    shown = [sample_conversation(Random(i), "test", task=tasks[i % 3]) for i in range(24)]
    assert answerer.measure(shown)["accuracy"] > 0.75
    gone = [sample_conversation(Random(i), "test", task=tasks[i % 3], distance=8) for i in range(24)]
    assert answerer.measure(gone)["accuracy"] < 0.5
