"""Experience: the returns that an RL stage learns from, checked against numbers worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

from vismem.data import Row
from vismem.decoding.policies import Named, Random
from vismem.decoding.trace import Invocation, Rollout
from vismem.training import experience
from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.experience import Collector
from vismem.training.metrics import Metrics
from vismem.training.rewards import load_rewards
from vismem.training.rollout import seed_of
from vismem.training.supervised import named_places

WRONG = 10  # a token that no score is read from
ALPHA, GROUP = 0.5, 3


def row(name: str, *images) -> Row:
    parts = [*({"type": "image"} for _ in images), {"type": "text", "text": "What is it?"}]
    return Row(name, [{"role": "user", "content": parts}], list(images), "a cup", "a cup", {})


ROWS = [row("seen", tiny.picture(0)), row("blind")]


def answer(score: int, *kinds: str) -> Rollout:
    """An answer of one token, which names its score in tenths, after invocations of these kinds."""
    tokens = torch.tensor([*([WRONG] * len(kinds)), 20 + score])
    chosen = torch.ones(len(tokens), dtype=torch.bool)
    invocations = [Invocation(kind, index, 4, forced=False) for index, kind in enumerate(kinds)]
    return Rollout(tokens, chosen, torch.zeros(len(tokens), 2, dtype=torch.bool), torch.zeros(len(tokens)), invocations)


def tenths(completion_ids, **columns) -> list[float]:
    return [(ids[-1] - 20) / 10 for ids in completion_ids]


class Decoded:
    """Stands in for decoding: fixed answers, and a record of what was asked for."""

    def __init__(self, answers: list[Rollout], baselines: list[Rollout], swapped: dict[int, Rollout]) -> None:
        self.answers, self.baselines, self.swapped = answers, baselines, swapped
        self.seeds: list[list[int]] = []
        self.places: list[str] = []
        self.policies: list = []
        self.again: list[list[Rollout]] = []  # of prompts that are decoded again

    def write(self, model, inputs, policy, settings, seeds=None, copies=1, *, sample_blocks=False):
        if policy == "off":
            return self.baselines
        self.seeds.append(list(seeds))
        self.places.append(getattr(policy, "where", policy))
        self.policies.append(policy)
        return self.answers if len(seeds) == len(self.answers) else self.again.pop(0)

    def counterfactuals(self, model, inputs, rollouts, copies, sighted, settings, seeds):
        assert rollouts is self.answers and sighted == [True, False] and copies == len(self.answers) // 2
        self.seeds.append(seeds)
        return self.swapped


@pytest.fixture
def collected(tmp_path, monkeypatch):
    """Collects one experience of `ROWS` from given answers."""

    def collect(decoded: Decoded, step: int = 0, **changes):
        monkeypatch.setattr(experience, "write", decoded.write)
        monkeypatch.setattr(experience, "counterfactuals", decoded.counterfactuals)
        values = {"stage": "stage2", "group_size": GROUP, "penalty_coef": ALPHA, "use_cpu": True, "seed": 7, **changes}
        args, metrics = MemoryTrainingArguments(str(tmp_path), **values), Metrics()
        collector = Collector(tiny.equip("idefics3"), args, load_rewards(tenths), metrics, None)
        return collector.collect(ROWS, step, "delimiter"), metrics.means(1)

    return collect


def test_stage_two_returns_by_hand(collected):
    """One group that sees an image and invokes in two of three answers, and one without an image."""
    answers = [answer(2, "short"), answer(8, "long"), answer(5), answer(6, "long"), answer(0), answer(0, "long")]
    # With kinds swapped the first answer would score .9 (so p_type = .7) and the second .3 (so p_type = 0).
    decoded = Decoded(answers, [answer(4), answer(1)], {0: answer(9, "long"), 1: answer(3, "short")})
    found, metrics = collected(decoded)
    # Means of the groups: .5 and .2. p_neg of answers that invoked: .3, 0 | 0 and .2; answers 2 and 4 did not invoke.
    returns = torch.tensor(
        [
            [0.2 - 0.4 - ALPHA * (0.7 + 0.3), 0.8 - 0.4, 0.5 - 0.4],
            [0.6 - 0.1, 0.0 - 0.1, 0.0 - 0.1 - ALPHA * 0.2],
        ]
    )
    expected = (returns - returns.mean(1, keepdim=True)) / (returns.std(1, keepdim=True) + 1e-4)
    assert found.advantages.tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-4)
    assert metrics["penalties/type"] == pytest.approx(0.7 / 6, abs=1e-5)
    assert metrics["penalties/negative"] == pytest.approx((0.3 + 0.2) / 6, abs=1e-5)
    assert metrics["reward"] == pytest.approx(2.1 / 6, abs=1e-5)
    assert metrics["baseline"] == pytest.approx(0.25, abs=1e-5)
    assert metrics["improvement"] == pytest.approx(2.1 / 6 - 0.25, abs=1e-5)
    assert found.trained == [True, True]


def test_stage_one_learns_from_scores_without_penalties(collected):
    answers = [answer(2, "short"), answer(8, "long"), answer(5), answer(6, "long"), answer(0), answer(0, "long")]
    decoded = Decoded(answers, [answer(4), answer(1)], {})
    found, metrics = collected(decoded, stage="stage1")
    scores = torch.tensor([[0.2, 0.8, 0.5], [0.6, 0.0, 0.0]])
    expected = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
    assert found.advantages.tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-4)
    assert "penalties/type" not in metrics and decoded.places == ["delimiter"]


def test_counterfactuals_draw_the_random_numbers_of_their_own_answer(collected):
    decoded = Decoded([answer(i) for i in range(6)], [answer(0), answer(0)], {})
    collected(decoded, step=4)
    own, swapped = decoded.seeds
    assert own == swapped == [seed_of(7, 4, one.id, copy) for one in ROWS for copy in range(GROUP)]
    assert len(set(own)) == len(own)
    other = Decoded([answer(i) for i in range(6)], [answer(0), answer(0)], {})
    collected(other, step=5)
    assert not set(own) & set(other.seeds[0])


@pytest.mark.parametrize(
    ("scores", "baseline", "skip", "trained"),
    [
        ((10, 10, 10), 10, True, False),  # solved with and without memory: nothing to learn
        ((10, 10, 10), 10, False, True),
        ((10, 10, 10), 9, True, True),  # the base alone does not solve it
        ((10, 10, 9), 10, True, True),
        ((9, 9, 9), 10, True, True),  # no spread, but not solved either
    ],
)
def test_only_solved_prompts_are_left_out(collected, scores, baseline, skip, trained):
    answers = [*(answer(score) for score in scores), answer(1), answer(2), answer(3)]
    found, metrics = collected(Decoded(answers, [answer(baseline), answer(0)], {}), skip_solved=skip)
    assert found.trained == [trained, True]
    assert metrics["frac_solved"] == (0.5 if scores == (10, 10, 10) and baseline == 10 else 0)


def test_prompts_whose_answers_all_earned_the_same_are_decoded_again(collected):
    """The first prompt has no spread: its second decode has none either, its third has, and counts."""
    answers = [answer(3), answer(3), answer(3), answer(6), answer(0), answer(0)]
    decoded = Decoded(answers, [answer(4), answer(1)], {})
    decoded.again = [[answer(5), answer(5), answer(5)], [answer(1), answer(2), answer(3)], [answer(9)] * 3]
    found, metrics = collected(decoded, stage="stage1", redraws=3)
    assert len(decoded.again) == 1  # a third time there was nothing to decode again
    assert [int(rollout.tokens[-1]) - 20 for rollout in found.rollouts] == [1, 2, 3, 6, 0, 0]
    assert found.advantages[:3].tolist() == pytest.approx([-1, 0, 1], abs=1e-2)
    assert metrics["reward"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.6) / 6, abs=1e-5)
    assert metrics["frac_redrawn"] == pytest.approx(1 / 3)  # half, half, none
    first, second, third = decoded.seeds[:3]
    assert len({*first, *second, *third}) == 6 + 3 + 3
    assert second[0] == seed_of(7, 0, "seen", 0, 1)


def test_answers_are_compared_within_their_schedule(collected):
    """Six answers in three schedules: two answers of one schedule share its seed, and their advantage."""
    answers = [answer(score) for score in (1, 3, 8, 8, 0, 4)] + [answer(0)] * 6
    decoded = Decoded(answers, [answer(4), answer(1)], {})
    found, _ = collected(decoded, stage="stage1", group_size=6, injection_schedules=3)
    expected = [-0.7071, 0.7071, 0, 0, -0.7071, 0.7071]
    assert found.advantages[:6].tolist() == pytest.approx(expected, abs=1e-2)
    seeds, schedules = decoded.seeds[0], decoded.policies[0].seed
    assert schedules == [seeds[index // 2 * 2] for index in range(12)]
    # The model's own invocations in stage II have no schedule: all six are compared.
    alone, _ = collected(Decoded(answers, [answer(4), answer(1)], {}), stage="stage2", group_size=6)
    same, _ = collected(
        Decoded(answers, [answer(4), answer(1)], {}), stage="stage2", group_size=6, injection_schedules=3
    )
    assert same.advantages.tolist() == alone.advantages.tolist() != found.advantages.tolist()


def test_invocations_stand_where_the_reply_names_them():
    """After the same occurrence of a word as in the reference reply, whatever else the answer says."""
    model = tiny.equip("idefics3")
    encode, tokens = model.processor.tokenizer.encode, model.tokens
    reply = encode("a red <ms_I>cup, and a red <ml_I><ms_I>pen.", add_special_tokens=False)
    places = named_places(reply, tokens)
    red = encode("a red <ms_I>", add_special_tokens=False)[-2]
    assert list(places.values()) == [["short"], ["long", "short"]]
    assert [place[1] for place in places] == [1, 2] and {place[0] for place in places} == {red}
    assert named_places(encode("<ml_I>a cup.", add_special_tokens=False), tokens) == {(None, 0): ["long"]}
    assert named_places(encode("a cup.", add_special_tokens=False), tokens) == {}

    policy = Named([places, {}, places], Random(1.0, seed=[1, 2, 3]))
    policy.start()

    def state(index, *written, sighted=True):
        at_delimiter = not written
        return SimpleNamespace(index=index, tokens=list(written), sampled=0, sighted=sighted, at_delimiter=at_delimiter)

    assert policy.inject(state(0)) is None
    assert policy.inject(state(0, red)) == "short" and policy.inject(state(0, red)) is None
    assert policy.inject(state(0, red, 5)) is None
    assert policy.inject(state(0, red, 5, red)) == "long" and policy.inject(state(0, red, 5, red)) == "short"
    assert policy.inject(state(1)) in ("short", "long")  # names none: at random
    assert policy.inject(state(2, red, sighted=False)) is None  # no image, no short-term memory
