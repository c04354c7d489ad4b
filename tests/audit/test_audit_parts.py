"""The audit's parts: replacements, the store, probes, similarity, attention, statistics and verdicts."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import tiny
import torch
from picture_questions import TEXTS, even, question

from vismem.analysis.replacement import next_token_kl
from vismem.analysis.slot_attention import attention_to_slots
from vismem.audit import activations as banks
from vismem.audit.activations import ActivationStore
from vismem.audit.attention import PARTS, measure_attention, summarize_attention, uniform_attention
from vismem.audit.effects import effect
from vismem.audit.interventions import (
    STAND_INS,
    Intervention,
    formed_by,
    former_of,
    possible,
    replaced,
    resampled,
    stand_ins,
)
from vismem.audit.names import INTERVENTIONS, OFF
from vismem.audit.probes import FOLDS, folds_of, probe
from vismem.audit.questions import questions, questions_and_unread, sample_rows
from vismem.audit.reference import intact_answers
from vismem.audit.replay import replay
from vismem.audit.statistics import change, share
from vismem.audit.structure import structure
from vismem.audit.targets import Target, targets
from vismem.audit.verdicts import NO, OPEN, UNTESTED, YES, depends, readable, verdicts
from vismem.config import KINDS
from vismem.decoding.policies import Forced
from vismem.decoding.trace import Invocation, Rollout
from vismem.evaluation.answering import requests_for
from vismem.evaluation.intervals import wilson
from vismem.evaluation.records import Record, RecordFile, ResultFile
from vismem.training.rewards import load_rewards

BOTH = Forced([(0, 1, "short"), (0, 3, "long")])


def filled(model, rows, folder, invocation=BOTH, **options) -> ActivationStore:
    """A store after its reference pass."""
    bank = ActivationStore(model, rows, folder / "bank", **options)
    store = RecordFile(folder / "intact.jsonl", {})
    intact_answers(bank, load_rewards([even]), store, invocation=invocation, batch_size=4, max_new_tokens=6)
    return bank


def written(bank, rows, batch_size, intervention=None, invocation=BOTH):
    """Tokens and memories of rows, by id, decoded in one live batch."""
    found = {}
    requests = list(requests_for(bank.model, rows, invocation, 0, lambda record: pytest.fail(str(record.error))))

    def decode():
        for one in bank.model.stream_batch(requests, batch_size, max_new_tokens=6, do_sample=False):
            found[one.tag] = (list(one.tokens), [each.memory for each in one.invocations])

    if intervention is None:
        decode()
    else:
        with replaced(bank, intervention):
            decode()
    return found


@pytest.fixture(scope="module")
def model():
    return tiny.equip("idefics3")


@pytest.fixture(scope="module")
def rows():
    return [question(number) for number in range(6)]


@pytest.fixture(scope="module")
def bank(model, rows, tmp_path_factory):
    return filled(model, rows, tmp_path_factory.mktemp("audit"))


# Replacements.


def test_stored_activations_form_the_same_memories(bank):
    for row_id, entry in bank.entries.items():
        assert [one.kind for one in entry.rollout.invocations] == list(KINDS)
        for index, one in enumerate(entry.rollout.invocations):
            with torch.no_grad():
                again = bank.model.memory.form(one.kind, [bank.observation(row_id, index)]).vectors[0]
                query = bank.model.memory.builder([bank.observation(row_id, index).visual], [one.states])[0]
            assert torch.allclose(again, one.memory, atol=1e-4)
            assert torch.allclose(query, entry.queries[index], atol=1e-4)
        assert torch.allclose(entry.visual, bank.encoded_images(row_id).visual, atol=1e-4)


def test_every_family_can_be_stored(family, tmp_path):
    model = tiny.equip(family)
    bank = filled(model, [question(0), question(1)], tmp_path)
    lines = ResultFile(tmp_path / "replay.jsonl", {})
    replay(bank, INTERVENTIONS, ["row0", "row1"], lines, 14, "")
    shifts = [shift for line in lines.rows.values() for shift in line["shifts"]]
    assert len(shifts) == 2 * 2 * (1 + len(INTERVENTIONS))
    assert all(shift["moved"] < 1e-4 for shift in shifts if shift["name"] == "intact")
    assert all(shift["first"] >= -1e-6 for shift in shifts if shift["name"] != "intact")


def test_another_image_replaces_only_the_image(bank, rows):
    seen = {}  # the observations that rows were really decoded with, by id and invocation

    def noting(form):
        def watching(kind, observations):
            seen.update({one.origin: one for one in observations})
            return form(kind, observations)

        return watching

    with formed_by(bank.model, noting):
        written(bank, rows, 4)
    found = written(bank, rows, 3, Intervention("another_image", ("short",)))
    for one in rows:
        other = bank.other_image(one.id)
        assert bank.image[other] != bank.image[one.id]
        mine, theirs = seen[one.id, 0], seen[other, 0]
        with torch.no_grad():
            mixed = replace(mine, visual=theirs.visual, patches=theirs.patches)
            expected = bank.model.memory.form("short", [mixed]).vectors[0]
        own = bank.entries[one.id].rollout.invocations[0].memory
        assert torch.allclose(found[one.id][1][0], expected, atol=1e-4)
        assert (expected - own).norm() > 0.05 * own.norm()
        with torch.no_grad():  # that row's own memory is another one: its words differ
            assert (expected - bank.model.memory.form("short", [theirs]).vectors[0]).norm() > 1e-3 * own.norm()


def test_another_question_replaces_states_and_segment(bank, rows):
    found = written(bank, rows, 3, Intervention("another_question", ("long",)))
    for one in rows:
        other, index = bank.other_question(one.id, "long")
        assert bank.question[other] != bank.question[one.id]
        theirs, mine = bank.observation(other, index), bank.observation(one.id, 1)
        seen = replace(mine, states=theirs.states, segment=theirs.segment)
        with torch.no_grad():
            assert torch.allclose(found[one.id][1][1], bank.model.memory.form("long", [seen]).vectors[0], atol=1e-4)
        own = bank.entries[one.id].rollout.invocations
        assert torch.allclose(found[one.id][1][0], own[0].memory, atol=1e-4)  # the other kind is left alone
        assert (found[one.id][1][1] - own[1].memory).norm() > 1e-3 * own[1].memory.norm()


def test_replacements_are_what_their_names_say(bank, rows):
    observations = [bank.observation(one.id, 0) for one in rows]
    form = former_of(bank.model)
    own = [bank.entries[one.id].rollout.invocations[0].memory for one in rows]
    got = {name: stand_ins(bank, form, name, "short", observations) for name in INTERVENTIONS}
    assert all(not memory.any() for memory in got["zeros"])
    for memory, noisy, mixed in zip(own, got["noise"], got["shuffled"], strict=True):
        assert torch.allclose(noisy.norm(dim=-1), memory.norm(dim=-1), atol=1e-4)
        assert abs(torch.nn.functional.cosine_similarity(noisy.flatten(), memory.flatten(), dim=0)) < 0.5
        assert not torch.allclose(mixed, memory, atol=1e-3)
        assert torch.allclose(mixed.sort(0).values, memory.sort(0).values, atol=1e-4)
    for number, memory in enumerate(got["mean"]):
        others = torch.stack([each for at, each in enumerate(own) if at != number])
        assert torch.allclose(memory, others.mean(0), atol=1e-4)
    with torch.no_grad():
        long = form("long", observations)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got["other_kind"], long, strict=True))
    assert resampled(torch.arange(8.0)[:, None], 4).flatten().tolist() == [0, 2, 5, 7]
    assert resampled(torch.arange(2.0)[:, None], 4).flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_a_row_s_replacement_does_not_depend_on_the_batch(bank, rows, name):
    alone = written(bank, rows, 1, Intervention(name))
    for order, size in ((rows, 4), (rows[::-1], 6)):
        together = written(bank, order, size, Intervention(name))
        for row_id, (tokens, memories) in alone.items():
            assert tokens == together[row_id][0]
            for one, other in zip(memories, together[row_id][1], strict=True):
                assert torch.allclose(one, other, atol=1e-4), (name, row_id)


def test_noise_depends_on_the_seed_and_the_row(model, rows, bank, tmp_path):
    other = filled(model, rows, tmp_path, seed=1)
    one, two = (written(each, rows, 4, Intervention("noise")) for each in (bank, other))
    assert not torch.allclose(one["row0"][1][0], two["row0"][1][0], atol=1e-2)
    directions = [memories[0] / memories[0].norm(dim=-1, keepdim=True) for _, memories in one.values()]
    assert all((a - b).norm() > 0.5 for at, a in enumerate(directions) for b in directions[:at])
    kinds = [memories[1] / memories[1].norm(dim=-1, keepdim=True) for _, memories in one.values()]
    assert (kinds[0] - directions[0]).norm() > 0.5  # another invocation, another draw


def test_one_kind_is_replaced_until_the_context_ends(bank, rows):
    found = written(bank, rows, 4, Intervention("zeros", ("short",)))
    assert all(not memories[0].any() and memories[1].any() for _, memories in found.values())
    assert "form" not in vars(bank.model.memory)
    with formed_by(bank.model, lambda form: lambda kind, seen: [m * 0 + 1 for m in form(kind, seen)]):
        assert all((memories[1] == 1).all() for _, memories in written(bank, rows[:1], 1).values())
        inner = written(bank, rows[:1], 1, Intervention("shuffled"))
        assert all((memories[0] == 1).all() for _, memories in inner.values())  # an outer context is kept
        assert (written(bank, rows[:1], 1)["row0"][1][0] == 1).all()
    assert "form" not in vars(bank.model.memory)


def test_questions_about_the_same_image_come_first(model, tmp_path):
    rows = [question(0, 0, TEXTS[0]), question(1, 0, TEXTS[1]), question(2, 5, TEXTS[2]), question(3, 6, TEXTS[3])]
    bank = filled(model, rows, tmp_path)
    assert bank.other_question("row0", "short") == ("row1", 0) and bank.other_question("row1", "long") == ("row0", 1)
    assert bank.other_image("row0") in ("row2", "row3")
    mine = [bank.entries[f"row{n}"].rollout.invocations[0].memory for n in (2, 3)]
    assert torch.allclose(
        bank.mean("short", "row0").float(), (mine[0] + mine[1]) / 2, atol=1e-5
    )  # no memory of its own image


def test_memory_stays_where_no_replacement_exists(model, tmp_path):
    lonely = [question(0, 0, TEXTS[0]), question(1, 0, TEXTS[0]), question(2, -1, TEXTS[0])]
    bank = filled(model, lonely[:2], tmp_path / "one")
    for name in ("mean", "another_image", "another_question"):
        assert not possible(bank, Intervention(name), "row0")
        kept = written(bank, lonely[:2], 2, Intervention(name))["row0"]
        assert torch.allclose(kept[1][0], bank.entries["row0"].rollout.invocations[0].memory, atol=1e-4)
    assert all(possible(bank, Intervention(name), "row0") for name in ("zeros", "noise", "other_kind", "shuffled"))
    blind = filled(model, lonely[2:], tmp_path / "blind", Forced([(0, 1, "long")]))
    assert not possible(blind, Intervention("other_kind"), "row2") and possible(blind, Intervention("zeros"), "row2")
    assert not possible(blind, Intervention("zeros", ("short",)), "row2")
    assert written(blind, lonely[2:], 1, Intervention("other_kind"), Forced([(0, 1, "long")]))["row2"][1][0].any()


def test_rows_without_a_tag_raise(bank, rows):
    with replaced(bank, Intervention("zeros")), pytest.raises(ValueError, match="requests with tags"):
        bank.model.generate(**bank.inputs(rows[:1]), invocation=BOTH, max_new_tokens=4)
    with pytest.raises(ValueError, match="no row 'elsewhere'"):
        stand_ins(
            bank,
            former_of(bank.model),
            "zeros",
            "short",
            [replace(bank.observation("row0", 0), origin=("elsewhere", 0))],
        )
    with pytest.raises(ValueError, match="unknown intervention"):
        Intervention("ones")
    assert tuple(STAND_INS) == INTERVENTIONS


def test_entries_are_loaded_only_for_their_rows(bank, rows):
    again = ActivationStore(bank.model, rows, bank.folder)
    assert all(again.load(one.id) for one in rows)
    for row_id, entry in bank.entries.items():
        other = again.entries[row_id]
        assert other.rollout.tokens.tolist() == entry.rollout.tokens.tolist()
        assert other.rollout.allowed.equal(entry.rollout.allowed) and other.visual.equal(entry.visual)
        for one, two in zip(entry.rollout.invocations, other.rollout.invocations, strict=True):
            assert one == two and one.memory.equal(two.memory) and one.states.equal(two.states)
        assert all(a.equal(b) for a, b in zip(entry.queries, other.queries, strict=True))
    moved = ActivationStore(bank.model, [rows[1], rows[0]], bank.folder)
    assert not moved.load(rows[0].id)


def test_replays_measure_kl_and_distance(bank, rows, tmp_path):
    lines = ResultFile(tmp_path / "replay.jsonl", {"a": 1})
    ids = [one.id for one in rows]
    replay(bank, ["zeros", "shuffled"], ids[:4], lines, 6, "")
    before = (tmp_path / "replay.jsonl").read_text()
    replay(bank, ["zeros", "shuffled"], ids, lines, 4, "")
    assert (tmp_path / "replay.jsonl").read_text().startswith(before)  # went on
    for one in rows:
        shifts = {(s["name"], s["index"]): s for s in lines.rows[one.id]["shifts"]}
        assert len(shifts) == 6
        assert shifts["intact", 0]["moved"] < 1e-4 and shifts["zeros", 0]["moved"] == 1
        assert shifts["zeros", 0]["first"] > 0
        # Read by itself, with nothing else in the batch.
        rollout, inputs = bank.entries[one.id].rollout, bank.inputs([one])
        (alone, _) = next_token_kl(bank.model, inputs, [rollout], lambda row, index, old: torch.zeros_like(old.memory))
        assert shifts["zeros", 0]["first"] == pytest.approx(alone.first, abs=1e-5)
        assert shifts["zeros", 0]["rest"] == pytest.approx(alone.rest, abs=1e-5)
    with pytest.raises(ValueError, match="a=1, not 2"):
        ResultFile(tmp_path / "replay.jsonl", {"a": 2})


# Attention.


def test_uniform_attention_matches_a_count():
    one = Invocation("short", 1, 2, False)
    rollout = Rollout(torch.zeros(5), torch.ones(5), torch.ones(5, 2), torch.zeros(5), [one])
    # prompt 3; then token 0, invocation, 2 slots, end token, tokens 3 and 4: places 0..9, slots at 5 and 6
    assert uniform_attention(rollout, [0], 3, 2, [None])[0].tolist() == pytest.approx([2 / 8, 2 / 9, 2 / 10])
    assert uniform_attention(rollout, [0], 3, 2, [3])[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0])


def test_attention_sums_to_one_for_each_kind(bank, rows, tmp_path):
    lines = ResultFile(tmp_path / "attention.jsonl", {})
    measure_attention(bank, [one.id for one in rows], lines, 4, "")
    found = summarize_attention(lines.rows, bank)
    assert set(found) == set(KINDS)
    for kind in found.values():
        assert kind["n"] == len(rows) and kind["layers"] == 2
        for depth in range(2):
            assert sum(kind["by_layer"][part][depth]["value"] for part in PARTS) == pytest.approx(1, abs=1e-3)
        assert 0 < kind["share"]["slots"]["value"] < 1
        assert kind["most"]["value"] == max(layer["value"] for layer in kind["by_layer"]["slots"])
    alone = attention_to_slots(bank.model, bank.inputs(rows[:1]), [bank.entries["row0"].rollout])[0]
    expected = alone.after(1).sum(-1).mean(1)  # from long memory's end token on
    assert lines.rows["row0"]["kinds"]["long"]["slots"] == pytest.approx(expected.tolist(), abs=1e-4)
    # Long memory came second: before it there was short memory, and only that is other memory to it.
    first = lines.rows["row0"]["kinds"]
    assert all(value > 0 for value in first["long"]["other memory"])


# Probes and similarity.


def dealt(count=120, images=120, seed=0):
    rng = np.random.default_rng(seed)
    labels = [f"class{n}" for n in rng.integers(0, 3, images)]
    groups = [f"image{n % images}" for n in range(count)]
    return rng, groups, [labels[n % images] for n in range(count)]


def test_a_probe_finds_only_what_is_encoded():
    rng, groups, values = dealt()
    other = [f"class{n}" for n in rng.integers(0, 3, len(groups))]
    marks = np.eye(3)[[int(value[-1]) for value in values]]
    carrying = np.concatenate([rng.normal(size=(120, 40)), 3 * marks], axis=1).astype(np.float32)
    empty = rng.normal(size=(120, 43)).astype(np.float32)
    wanted = [Target("there 1", "there", values), Target("absent 1", "absent", other)]
    found = probe({"memory": carrying, "query": empty}, wanted, groups)["families"]
    assert found["there"]["memory"]["value"] > 0.9 and found["there"]["query"]["value"] < 0.5
    assert found["there"]["memory shuffled"]["value"] < 0.5 and found["there"]["selectivity"]["low"] > 0.3
    assert found["there"]["against query"]["low"] > 0.3
    assert found["absent"]["gain"]["low"] < 0.05
    assert readable({"rows": 120, "families": found}, "short").answer == YES
    absent = readable({"rows": 120, "families": {"absent": found["absent"]}}, "short")
    assert absent.answer in (NO, OPEN)


def test_no_image_is_split_between_folds():
    # Four rows of every image that look alike; values belong to images by chance, so only leaking could find them.
    rng, groups, values = dealt(160, 40)
    looks = {group: rng.normal(size=20) for group in groups}
    vectors = np.stack([looks[group] + 0.01 * rng.normal(size=20) for group in groups]).astype(np.float32)
    found = probe({"memory": vectors}, [Target("x 1", "x", values)], groups)["families"]["x"]
    assert found["memory"]["value"] < 0.6
    folds = folds_of(groups, 0)
    assert all(len({folds[at] for at, each in enumerate(groups) if each == group}) == 1 for group in groups)
    assert set(folds) == set(range(FOLDS))


def test_unlearnable_targets_are_skipped_with_a_reason():
    rng, groups, values = dealt(60, 60)
    wanted = [
        Target("same", "same", ["a"] * 60),
        Target("rare", "rare", [f"v{n}" for n in range(60)]),
        Target("unknown", "unknown", [None] * 30 + values[30:]),
    ]
    found = probe({"memory": rng.normal(size=(60, 8)).astype(np.float32)}, wanted, groups)
    assert found["families"] == {}
    assert found["skipped"]["same"] == "always the same" and "too many" in found["skipped"]["rare"]
    assert "30 rows" in found["skipped"]["unknown"]


def test_targets_come_from_attributes_columns_and_questions():
    facts = {"colour r1c1": "red", "colour r1c2": "blue", "label r1": "gold", "label r2": "mint"}
    given = [question(n, attributes=facts, asked=[(0, 1)], kind=n % 2, place={"x": 1}) for n in range(3)]
    found = {target.name: target.values for target in targets(given, ["kind", "place", "answer"])}
    assert found["colour asked about"] == ["blue"] * 3 and found["colour not asked about"] == ["red"] * 3
    assert found["label asked about"] == ["gold"] * 3 and found["label not asked about"] == ["mint"] * 3
    assert found["kind"] == ["0", "1", "0"] and found["place x"] == ["1"] * 3 and found["answer"] == ["x"] * 3
    with pytest.raises(ValueError, match="no row has a column 'colours'"):
        targets(given, ["colours"])
    with pytest.raises(ValueError, match="holds lists"):
        targets(given, ["asked"])


def test_memories_of_one_image_are_more_similar(model, tmp_path):
    rows = [question(n, n // 2, TEXTS[n % 2]) for n in range(8)]
    bank = filled(model, rows, tmp_path)
    wanted = [Target("half", "half", ["a"] * 4 + ["b"] * 4)]
    found = structure(bank, [one.id for one in rows], wanted)
    pairs = found["kinds"]["short"]["pairs"]
    assert pairs["same image, other question"]["n"] == 4 and pairs["other image, same question"]["n"] == 12
    assert pairs["same image, other question"]["centred"]["mean"] > 0.9
    assert pairs["other image, same question"]["centred"]["mean"] < 0.3
    assert sum(pairs["other image, other question"]["raw"]["counts"]) == 12
    assert found["maps"]["short"]["colour"] == "image" and len(set(found["maps"]["short"]["values"])) == 4
    assert len(found["maps"]["kinds"]["points"]) == 16 and found["between kinds"]["n"] == 8
    near = structure(bank, [one.id for one in rows], wanted, "tsne")["maps"]["short"]
    assert near["how"] == "tsne" and np.isfinite(near["points"]).all()


# Statistics and verdicts.


def test_intervals_of_equal_values_have_a_width():
    exact = scipy.stats.binomtest(3, 40).proportion_ci(method="wilson")
    assert wilson(3 / 40, 40) == pytest.approx((exact.low, exact.high), abs=1e-6)
    groups = [str(n) for n in range(20)]
    none = share([False] * 20, groups)
    assert (none["value"], none["low"]) == (0, 0) and 0.15 < none["high"] < 0.17
    assert share([False] * 20, ["one", "two"] * 10)["high"] > 0.6  # two images are two, whatever is asked of them
    still = change([1.0] * 20, [1.0] * 20, groups)
    assert still["value"] == 0 and still["low"] == -still["high"] and still["high"] == none["high"]
    fallen = change([0.0] * 15 + [1.0] * 5, [1.0] * 20, groups)
    assert fallen["value"] == -0.75 and fallen["low"] < -0.75 < fallen["high"] < 0


def test_an_effect_compares_each_question_with_itself(bank, rows):
    invoked = [{"kind": kind, "position": 1, "length": 4, "forced": True} for kind in KINDS]
    intact = {one.id: Record(one.id, float(n % 2), f"said {n}", 5, 3, 0, invoked) for n, one in enumerate(rows)}
    same = dict(reversed(intact.items()))
    still = effect("zeros", KINDS, intact, same, bank)
    assert still["n"] == 6 and still["flips"]["value"] == still["score_flips"]["value"] == still["change"]["value"] == 0
    changed = {**same, "row3": Record("row3", 0.0, "said nothing", 5, 3, 0, invoked)}
    moved = effect("zeros", KINDS, intact, changed, bank)
    assert moved["flips"]["value"] == pytest.approx(1 / 6, abs=1e-4) and moved["intact"]["value"] == 0.5
    assert moved["change"]["value"] == pytest.approx(-1 / 6, abs=1e-4) and moved["accuracy"]["value"] < 0.4
    fewer = effect("zeros", KINDS, intact, {"row0": same["row0"]}, bank)
    assert (fewer["n"], fewer["not_possible"]) == (1, 5)
    assert effect(OFF, ("short",), intact, same, bank)["n"] == 6
    quiet = {i: replace(record, invocations=[]) for i, record in intact.items()}
    assert effect("zeros", KINDS, quiet, same, bank) == {
        "name": "zeros",
        "kinds": ["short", "long"],
        "n": 0,
        "not_possible": 0,
    }


def estimate(value, low, high):
    return {"value": value, "low": low, "high": high, "n": 100}


@pytest.mark.parametrize(
    ("flips", "moved", "n", "answer", "large"),
    [
        ((0.7, 0.6, 0.8), (0.9, 0.8, 1.0), 100, YES, True),
        ((0.2, 0.1, 0.3), (0.9, 0.8, 1.0), 100, YES, False),
        ((0.01, 0.0, 0.04), (0.9, 0.8, 1.0), 100, NO, False),
        ((0.06, 0.02, 0.2), (0.9, 0.8, 1.0), 100, OPEN, False),
        ((0.0, 0.0, 0.2), (0.0, 0.0, 0.005), 100, NO, False),  # the memory is the same
        ((0.7, 0.6, 0.8), (0.9, 0.8, 1.0), 9, OPEN, False),
        (None, None, 0, UNTESTED, False),
    ],
)
def test_a_verdict_needs_the_whole_interval(flips, moved, n, answer, large):
    given = {"name": "another_image", "n": n, "not_possible": 3}
    if flips:
        given |= {"flips": estimate(*flips), "moved": estimate(*moved), "change": estimate(-0.5, -0.6, -0.4)}
    found = depends("Does it?", "another", given, "all")
    assert (found.answer, found.large) == (answer, large)
    assert ("the memory is the same" in found.text) == (moved is not None and moved[2] < 0.01)
    if answer in (YES, NO):
        assert f"{100 * flips[0]:.0f}" in found.text and f"n = {n}" in found.text and "costs 50 points" in found.text


def test_content_must_beat_every_content_free_replacement():
    def effects(*costs):
        common = {"n": 100, "intact": estimate(0.9, 0.85, 0.95), "flips": estimate(0.9, 0.85, 0.95)}
        rows = zip(("zeros", "mean", "noise"), costs, strict=True)
        return {"effects": {"all": [{"name": name, "change": estimate(*cost), **common} for name, cost in rows]}}

    far, near, unsure = (-0.6, -0.7, -0.5), (-0.01, -0.03, 0.01), (-0.06, -0.12, 0.0)

    def answer(*costs):
        return next(v for v in verdicts(effects(*costs)) if "computation" in v.question)

    assert answer(far, far, far).answer == YES and answer(far, far, far).large
    assert answer(far, near, far).answer == NO and "mean" in answer(far, near, far).text
    assert answer(far, far, unsure).answer == OPEN


# Questions.


def test_questions_about_one_image_are_sampled_together():
    rows = [question(n, n // 3) for n in range(30)]
    taken = sample_rows(rows, 9, 4)
    counts = [sum(banks.image_digest(one) == banks.image_digest(each) for each in taken) for one in taken]
    assert counts == [3] * 9
    assert [one.id for one in sample_rows(rows, 9, 4)] == [one.id for one in taken]
    assert [one.id for one in sample_rows(rows, 5, 4)] == [one.id for one in taken[:5]]
    assert [one.id for one in sample_rows(rows, 9, 5)] != [one.id for one in taken]
    assert len(sample_rows(rows, 99, 0)) == 30


def test_unreadable_rows_are_reported(tmp_path):
    tiny.picture(0).save(tmp_path / "a.png")
    raw = [{"prompt": "?", "answer": 1, "image": name} for name in ("a.png", "gone.png", "a.png")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(one) + "\n" for one in raw))
    rows, unread = questions_and_unread(str(tmp_path / "t.jsonl"), 9)
    assert {row.id for row in rows} == {"t.jsonl:1", "t.jsonl:3"}
    assert [record.id for record in unread] == ["t.jsonl:2"] and "no such image" in unread[0].error


def test_pocket_questions_alternate_between_cells():
    found = questions("pocket:late", 23, 3)
    assert len(found) == 23 and len({one.columns["cell"] for one in found[:20]}) == 20
    assert [one.id for one in questions("pocket:late", 20, 3)] == [one.id for one in found[:20]]
    with pytest.raises(ValueError, match="unknown pocket suite 'lte'"):
        questions("pocket:lte", 3)
