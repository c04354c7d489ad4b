"""The pocket world: scenes, answers, conversations, their encoding, and the shipped base."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

pytest.importorskip("sklearn")

from pocket_base.conversations import sample_training_conversation
from pocket_base.handwriting import render_varied
from vismem.pocket import BASE_PATH, load_base
from vismem.pocket.conversations import sample_conversation
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


def test_varied_handwriting_changes_the_digits_alone():
    scene = sample_scene(Random(3))
    plain, varied = render_array(scene), render_varied(scene)
    assert np.array_equal(varied, render_varied(scene))
    changed = (plain != varied).any(-1).reshape(SIDE, 16, SIDE, 16)
    assert changed.any((1, 3)).all()  # every digit
    changed[:, :13, :, 5:] = False
    assert not changed.any()  # no tag and no label


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
    """The answers, recomputed from the scenes in another way."""
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
            name = conversation.answer_text.split(": ")[1]
            r = cells[0][0]
            assert scene.labels[r] == name == question.label
            rule = next(rule for rule in RULES if f": {rule.words}." in conversation.answer_text)
            assert f"{rule.words}." in question.text  # stated
            assert int(conversation.answer) == sum(rule.apply(list(scene.prices[r])))
        else:
            for r in range(SIDE):
                line = conversation.answer_text.split(f"Row {r + 1}:")[1].split(".")[0]
                digits = [int(word) for word in line.replace(",", " ").split() if word.isdigit()]
                assert digits == ([] if task == "describe_tags" else list(scene.prices[r]))
        assert score(task, conversation.answer_text, conversation.answer) == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_replies_begin_with_an_echo_of_the_place(task):
    """One wording however the question words the place, and the score reads past it, colon or not."""
    for seed in range(30):
        question = sample_conversation(Random(seed), task=task).turns[-1].question
        first = min(question.cells)
        row, cell = f"Row {first[0] + 1}", f"Row {first[0] + 1} column {first[1] + 1}"
        if task.startswith("describe"):
            assert question.echo == "" and question.reply.startswith("Row 1: ")
        elif task == "basket":
            places = {tuple(int(c) - 1 for c in part.split()[1::2]) for part in question.echo.lower().split(" and ")}
            assert places == question.cells
        elif task == "column":
            assert question.echo == f"Column {first[1] + 1}"
        else:
            assert question.echo == (row if len(question.cells) == SIDE else cell)
        assert question.reply.startswith(f"{question.echo}: " if question.echo else "Row 1: ")
        said = question.reply.removeprefix(f"{question.echo}: ")
        without_colon = question.reply.replace(":", "")
        for completion in (said, without_colon, question.reply.replace(":", "<ms_I><ms_E>", 1)):
            assert score(task, completion, question.answer) == 1.0, completion


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
    assert score("digit", "Row 2 column 3: 4.", "4") == score("digit", "Row 2 column 3 4.", "4") == 1.0
    assert score("digit", "Row 2 column 3.", "3") == score("digit", "Row 2 column 3:", "3") == 0.0
    assert score("digit", "Row 2 column 3: 4.", "3") == score("digit", "Row 2 column 3: 4.", "2") == 0.0
    assert score("row", "Row 2: 4 7 0 2.", "2 4 7 0 2") == 0.0
    assert score("difference", "Row 2: 4 7 0 2, then 4 7 1 2. So column 3.", "column 3") == 1.0
    assert score("difference", "Row 2: 4 7 0 2, then 4 7 1 2. So column 2.", "column 3") == 0.0
    assert score("promotion", "Row 2 striped first free. 4 7 0 2, pay 0 7 0 2. 7, 7, 9. So 9.", "9") == 1.0
    assert score("promotion", "Row 2 striped first free. 4 7 0 2, pay 0 7 0 2. 7, 7, 9", "9") == 0.0
    description = "Row 1: 1 2 3 4. Row 2: 5 6 7 8. Row 3: 0 0 0 0. Row 4: 9 9 9 9"
    assert score("describe_prices", description.replace("5", "4"), description) == 0.75
    assert score("describe_prices", description.replace(":", "<ms_I><ms_E>"), description) == 1.0
    assert score("describe_prices", "", description) == 0.0


def test_unstated_promotions_leak_nothing():
    """The text does not say the rule, and the rules applied to a label are not its hidden one more than by chance."""
    applied = {name: [] for name in LABEL_NAMES}
    for seed in range(1500):
        rng = Random(seed)
        scene = sample_scene(rng)
        question = promotion(scene, rng, "unstated")
        assert not any(rule.words in question.text.lower() for rule in RULES)
        assert question.note == ""
        _, name, rest = question.reply.split(": ", 2)
        applied[name].append(rest.split(".")[0])
    for name, rules in applied.items():
        assert len(set(rules)) == len(RULES)
        assert rules.count(PROMOTION_RULES[name].words) / len(rules) < 3 / len(RULES)
    hidden = [promotion(sample_scene(Random(s)), Random(s), "hidden-truth") for s in range(50)]
    for question in hidden:
        _, name, rest = question.reply.split(": ", 2)
        assert rest.split(".")[0] == PROMOTION_RULES[name].words
        assert not any(rule.words in question.text.lower() for rule in RULES)


def test_noted_promotions_apply_the_rule_of_their_note():
    """The note alone says the rule; by design no label means one rule more often than another."""
    applied = {name: [] for name in LABEL_NAMES}
    for seed in range(1500):
        rng = Random(seed)
        scene = sample_scene(rng)
        question = promotion(scene, rng, "noted")
        rule = next(rule for rule in RULES if rule.words == question.note)
        r = min(question.cells)[0]
        assert question.label == scene.labels[r]
        assert question.reply.startswith(f"Row {r + 1}: {question.label}: {question.note}. ")
        assert int(question.answer) == sum(rule.apply(list(scene.prices[r])))
        assert not any(rule.words in question.text.lower() for rule in RULES)
        applied[question.label].append(question.note)
    for name, rules in applied.items():
        assert len(set(rules)) == len(RULES)
        assert rules.count(PROMOTION_RULES[name].words) / len(rules) < 3 / len(RULES)
    true = promotion(sample_scene(Random(1)), Random(1), "noted-truth")
    assert true.note == PROMOTION_RULES[true.label].words


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
    from pocket_base.batches import Encoder, normalise

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


@pytest.fixture(scope="module")
def encoder():
    from pocket_base.batches import Encoder
    from pocket_base.tokenizer import corpus, train_tokenizer

    return Encoder(train_tokenizer(corpus(300)))


def augmented(encoder, question, seed, since=2):
    """A reply with what training puts into it, and the reply's own tokens."""
    from pocket_base.batches import Encoded

    out = Encoded()
    out.add([encoder.user, encoder.assistant])
    encoder.add_reply(out, question, since=since, again=0, rng=Random(seed))
    return out, [*encoder.text(question.reply), encoder.end]


def test_late_replies_look_again_mostly_after_the_first_colon(encoder):
    counts = dict.fromkeys(
        ("looks", "first colon", "start", "plain", "opened", "replaced", "whole", "partial", "colon"), 0
    )
    for seed in range(600):
        question = sample_conversation(Random(seed), task=("colour", "sum", "row")[seed % 3]).turns[-1].question
        out, reply = augmented(encoder, question, seed)
        assert len(out.ids) == len(out.weights) and sum(map(len, out.cells)) == out.ids.count(encoder.image)
        assert out.shown == [0] * len(out.cells) and len(out.shown) <= 1
        if not out.shown:
            continue
        counts["looks"] += 1
        first = out.ids.index(encoder.image)
        end = first + len(out.cells[0])
        before, after = out.ids[2:first], out.ids[end + 1 :]
        assert not any(out.weights[first : end + 1])  # neither the cells nor the closing mark are to be predicted
        if out.ids[first - 1] == encoder.fake or out.ids[first - 1] == encoder.overview:
            counts["whole"] += 1
            continue
        assert out.ids[end] in encoder.delimiters
        assert all(weight in (0.0, 1.0) for weight in out.weights[end:])  # what follows a look counts in full
        counts["colon"] += out.ids[end] == encoder.colon
        counts["partial"] += len(out.cells[0]) < 16
        echo = encoder.echo(question)
        counts["start"] += not set(before) & set(echo[:-1])
        if after == reply[len(echo) :]:
            counts["first colon"] += 1
            counts["opened"] += before[: len(echo)] == echo and len(before) == len(echo) + 1
            counts["replaced"] += before[:-1] == echo[:-1] and out.weights[first - 1] == 0.0
            counts["plain"] += before == echo and out.weights[first - 1] == 1.0
    share = {name: count / counts["looks"] for name, count in counts.items()}
    assert 0.65 < counts["looks"] / 600 < 0.85
    assert share["first colon"] > 0.5 and 0.02 < share["start"] < 0.2
    assert share["plain"] > 0.1 and share["opened"] > 0.1 and 0.05 < share["replaced"] < 0.3
    assert sum(share[name] for name in ("plain", "opened", "replaced")) > 0.9 * share["first colon"]
    assert 0.08 < share["whole"] < 0.23 and 0.1 < share["partial"] < 0.3 and 0.4 < share["colon"] < 0.8


def test_images_in_view_are_seldom_looked_at_again_and_pairs_never(encoder):
    looks = 0
    for seed in range(300):
        question = sample_conversation(Random(seed), task="digit").turns[-1].question
        looks += len(augmented(encoder, question, seed, since=0)[0].shown)
    assert 10 < looks < 70
    for seed in range(40):
        conversation = sample_conversation(Random(seed), task="compare", distance=2)
        out = encoder.encode(conversation, Random(seed), limit=10_000)
        assert out.shown == [0, 1]


def test_descriptions_look_again_after_several_rows(encoder):
    found = [0] * 5
    for seed in range(200):
        question = sample_conversation(Random(seed), task="describe_prices").turns[-1].question
        out, _ = augmented(encoder, question, seed, since=0)
        assert all(len(cells) == 16 for cells in out.cells)
        found[len(out.cells)] += 1
    assert 60 < found[0] < 140 and found[4] > 20 and found[1] and found[2]


def test_partial_looks_hold_the_cells_that_the_question_needs(encoder):
    sizes = set()
    for seed in range(1500):
        task = ("colour", "label", "row", "basket", "column")[seed % 5]
        question = sample_conversation(Random(seed), task=task).turns[-1].question
        for cells in augmented(encoder, question, seed)[0].cells:
            assert {row * SIDE + column for row, column in question.cells} <= set(cells)
            assert list(cells) == sorted(set(cells))
            sizes.add((task, len(cells)))
    assert {size for task, size in sizes if task == "colour"} == {2, 4, 8, 16}
    assert {size for task, size in sizes if task == "row"} == {4, 8, 16}


def test_batches_point_at_the_cells_of_each_look(encoder):
    from pocket_base.batches import Encoded, collate

    conversations = [sample_conversation(Random(seed), task="compare") for seed in range(2)]
    encoded = [encoder.encode(conversation) for conversation in conversations]
    encoded[1] = Encoded([encoder.image] * 18, [0.0] * 18, [1, 0], [tuple(range(16)), (3, 7)])
    batch = collate(conversations, encoded, 0)
    assert len(batch.visual) == (batch.ids == encoder.image).sum() == 32 + 18
    assert batch.visual.tolist() == [*range(32), *range(48, 64), 32 + 3, 32 + 7]


def test_notes_stand_after_the_label_and_are_not_in_the_loss(encoder):
    both = broken = 0
    for seed in range(300):
        rng = Random(seed)
        question = promotion(sample_scene(rng), rng, "noted")
        out, reply = augmented(encoder, question, seed)
        learned = [token for token, weight in zip(out.ids, out.weights, strict=True) if weight]
        note = encoder.text(f" {question.note}")
        lead = encoder.text(f"{question.echo}: {question.label}:")
        rest = reply[len(lead) :]
        assert "".join(map(encoder.tokenizer.decode, learned)).count(question.note) == 1
        both += bool(out.shown)
        if out.ids[-len(rest) :] != rest:  # a late look or a stray delimiter came after the note
            broken += 1
            continue
        assert out.ids[-len(rest) - 1] in encoder.delimiters
        before = out.ids[: -len(rest) - 1]
        assert before[-len(note) :] == note and not any(out.weights[len(before) - len(note) : len(before) + 1])
        start = max(place for place, weight in enumerate(out.weights[: len(before)]) if weight)  # in the lead still
        others = {*encoder.delimiters, *encoder.image_block()}
        inside = [token for token in before[start + 1 :] if token not in others]
        assert len(note) <= len(inside) <= 16
    assert both > 100 and broken < 90  # both: a look and a note in one reply


def test_some_other_replies_hold_a_note_to_be_ignored(encoder):
    found = 0
    for seed in range(500):
        question = sample_conversation(Random(seed), task="colour").turns[-1].question
        out, reply = augmented(encoder, question, seed, since=0)
        texts = encoder.tokenizer.decode([token for token in out.ids if token != encoder.image])
        noted = any(rule.words in texts for rule in RULES)
        found += noted
        learned = [token for token, weight in zip(out.ids, out.weights, strict=True) if weight]
        missing = len(reply) - len(learned)
        assert missing in (0, 1) and (missing == 0 or noted or out.shown)
    assert 5 < found < 45


def test_drills_reply_as_if_to_an_image():
    from pocket_base import drills

    noted = 0
    for seed in range(300):
        question = drills.sample(Random(seed))
        if question.task == "drill":
            assert question.reply.startswith(f"{question.echo}: ")
            assert score("drill", question.reply, question.answer) == 1.0
            noted += bool(question.note)
            assert (question.note in question.text) == (question.note == "")
    assert 30 < noted < 120


def test_packed_questions_do_not_see_each_other():
    """A question packed with others gets the logits that it gets alone after the same image."""
    import torch

    from pocket_base.architecture import WINDOW, build_model
    from pocket_base.batches import Batch, Encoder
    from pocket_base.build import visual_tokens
    from pocket_base.packing import collate_rows, pack
    from pocket_base.tokenizer import corpus, train_tokenizer

    tokenizer = train_tokenizer(corpus(200))
    torch.manual_seed(0)
    model = build_model(tokenizer).eval()
    model.set_attn_implementation("eager")

    @torch.no_grad()
    def logits(batch):
        embeddings = model.get_input_embeddings()(batch.ids)
        slots = (batch.ids == model.config.image_token_id)[..., None].expand_as(embeddings)
        embeddings = embeddings.masked_scatter(slots, visual_tokens(model, batch.pixels).flatten(0, 1)[batch.visual])
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
            ids = torch.tensor([row.encoded.ids])[:, places]
            runs = [i for i, token in enumerate(row.encoded.ids) if token == model.config.image_token_id]
            visual = [cell for i, cell in zip(runs, row.encoded.visual(), strict=True) if i in set(places)]
            alone = Batch(ids, None, pixels, torch.tensor(visual), None)
            assert torch.allclose(together[number, places], logits(alone)[0], atol=1e-4)
        first += pictures


@needs_base
def test_any_picture_is_answered(base):
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
    from pocket_base.evaluate import Answerer

    model, processor = base
    assert model.config.text_config.sliding_window and model.vocab_size == len(processor.tokenizer)
    answerer = Answerer(model, processor.tokenizer)
    tasks = ("colour", "digit", "row")
    shown = [sample_conversation(Random(i), "test", task=tasks[i % 3]) for i in range(24)]
    assert answerer.measure(shown)["accuracy"] > 0.75
    gone = [sample_conversation(Random(i), "test", task=tasks[i % 3], distance=8) for i in range(24)]
    assert answerer.measure(gone)["accuracy"] < 0.5
