"""Experience: the returns that an RL stage learns from, checked against numbers worked out by hand."""

from __future__ import annotations

import pytest
import tiny
import torch

from vismem.data import Row
from vismem.decoding.trace import Invocation, Rollout
from vismem.training import experience
from vismem.training.arguments import MemoryTrainingArguments
from vismem.training.experience import Collector
from vismem.training.metrics import Metrics
from vismem.training.rewards import load_rewards
from vismem.training.rollout import seed_of

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

    def write(self, model, inputs, policy, settings, seeds=None, copies=1):
        if policy == "off":
            return self.baselines
        self.seeds.append(seeds)
        self.places.append(getattr(policy, "where", policy))
        return self.answers

    def counterfactuals(self, model, inputs, rollouts, copies, sighted, settings, seeds):
        assert rollouts is self.answers and sighted == [True, False] and copies == GROUP
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
