"""Replaces memories in finished answers and compares the next-token distributions.

One invocation is replaced at a time; the answer's tokens stay. The caller chooses the replacement.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismem.analysis.rollouts import replay_inputs
from vismem.config import Kind
from vismem.decoding.trace import Invocation, Rollout
from vismem.deprecation import renamed
from vismem.model import VisMem
from vismem.reading.heads import MOST_LOGITS

Replace = Callable[[int, int, Invocation], "Tensor | None"]


@dataclass(frozen=True)
class Shift:
    """How much replacing one memory changes the next tokens: KL(with the memory || with its replacement), in nats.

    Args:
        row: index of the answer in the batch.
        index: of the invocation in that answer.
        kind: of the invocation.
        first: KL of the token right after the end token.
        rest: mean over the answer's later sampled tokens; NaN if there are none.
        tokens: number of tokens in `rest`.
    """

    row: int
    index: int
    kind: Kind
    first: float
    rest: float
    tokens: int


@dataclass(frozen=True)
class NextTokenPair:
    """Both distributions of the token right after one invocation.

    Args:
        row, index, kind: as in `Shift`.
        log_probs: float32 [2, vocabulary], with the memory in place and with its replacement.
    """

    row: int
    index: int
    kind: Kind
    log_probs: Tensor


@torch.no_grad()
def next_token_kl(
    model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout], replace: Replace
) -> list[Shift]:
    """KL of the next-token distributions when each invocation's memory in turn is replaced.

    Uses the model's own distributions at temperature 1, before logits processors; invocation tokens are allowed where
    they were allowed in the answer. Takes one forward, plus one for each invocation of the answer that has most.

    Args:
        model: the model.
        inputs: the processor's output for B prompts, padded on the left.
        rollouts: n answers to each prompt, prompt by prompt, from `generate(..., record=True)`.
        replace: called with row, index and invocation; returns the replacement [N, d], of any N, or None to remove the
            memory.

    Returns:
        A `Shift` for each invocation that inserted vectors, by row and index.

    Raises:
        ValueError: if the answers do not match the prompts, or a memory is missing or has the wrong width.

    Example:
        >>> out = model.generate(**inputs, record=True, return_dict_in_generate=True)
        >>> next_token_kl(model, inputs, out.rollout, lambda row, index, invocation: None)
    """
    found = []
    for row, index, own, other in _replaced(model, inputs, rollouts, replace):
        rollout = rollouts[row]
        first = rollout.invocations[index].position + 2
        later = [t for t in range(first + 1, len(rollout.tokens)) if rollout.sampled[t]]
        places = torch.tensor([first, *later])
        divergence = _kl(model, own[places], other[places], _allowed(rollout, places).to(own.device)).tolist()
        rest = sum(divergence[1:]) / len(later) if later else float("nan")
        found.append(Shift(row, index, rollout.invocations[index].kind, divergence[0], rest, len(later)))
    return sorted(found, key=lambda shift: (shift.row, shift.index))


@torch.no_grad()
def distributions(
    model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout], replace: Replace
) -> list[NextTokenPair]:
    """Both distributions of the token right after each invocation; arguments, cost and errors of `next_token_kl`.

    Returns:
        A pair for each invocation that inserted vectors, by row and index.
    """
    found = []
    for row, index, own, other in _replaced(model, inputs, rollouts, replace):
        invocation = rollouts[row].invocations[index]
        first = torch.tensor([invocation.position + 2])
        states = torch.cat([own[first], other[first]])
        log_probs = _log_probs(model, states, _allowed(rollouts[row], first).to(states.device))
        found.append(NextTokenPair(row, index, invocation.kind, log_probs.cpu()))
    return sorted(found, key=lambda pair: (pair.row, pair.index))


def _replaced(
    model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout], replace: Replace
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Yields row and index of every invocation, and the answer's states [T + 1, d] with its memory and its replacement.

    State t is the one that token t was sampled from.
    """
    call = replay_inputs(model, inputs, rollouts)
    memories, start = call.pop("memories"), call["prompt_length"]

    def read(memories: list[list[Tensor | None]]) -> Tensor:
        return model(**call, memories=memories, logits_to_keep=1).last_hidden_state[:, start - 1 :]

    for row, rollout in enumerate(rollouts):
        for index, invocation in enumerate(rollout.invocations):
            if invocation.length and invocation.memory is None:
                raise ValueError(f"invocation {index} of answer {row} has no memory; keep `Invocation.memory`")
    own = read(memories)
    for turn in range(max(len(row) for row in memories)):
        changed, rows = [list(row) for row in memories], []
        for row, rollout in enumerate(rollouts):
            memory = memories[row][turn] if turn < len(memories[row]) else None
            if memory is None:
                continue
            other = replace(row, turn, rollout.invocations[turn])
            if other is not None and (other.dim() != 2 or other.shape[1] != memory.shape[1]):
                raise ValueError(
                    f"a memory's replacement must be [N, {memory.shape[1]}] or None, got {list(other.shape)}"
                )
            changed[row][turn] = None if other is None or len(other) == 0 else other.to(memory)
            rows.append(row)
        states = read(changed) if rows else own
        yield from ((row, turn, own[row], states[row]) for row in rows)


def _allowed(rollout: Rollout, places: Tensor) -> Tensor:
    """Bool [n, 2]: the kinds that could be invoked at these tokens of an answer; none after its end."""
    within = places < len(rollout.tokens)
    return rollout.allowed[places.clamp(max=len(rollout.tokens) - 1)] & within[:, None]


def _log_probs(model: VisMem, states: Tensor, allowed: Tensor) -> Tensor:
    """Float32 log-probabilities [n, vocabulary] of the next token after the last states [n, d]."""
    logits = model.tokens.extend(model.backbone.head(states), states)
    return model.tokens.forbid(logits, allowed).float().log_softmax(-1)


def _kl(model: VisMem, own: Tensor, other: Tensor, allowed: Tensor) -> Tensor:
    """Float32 KL [n] of the distributions after states [n, d], in blocks that bound the size of the logits."""
    size = max(1, MOST_LOGITS // (2 * model.tokens.vocabulary))
    parts = []
    for one, two, may in zip(own.split(size), other.split(size), allowed.split(size), strict=True):
        p, q = _log_probs(model, one, may), _log_probs(model, two, may)
        parts.append((p.exp() * (p - q)).masked_fill(p == float("-inf"), 0).sum(-1))
    return torch.cat(parts)


__getattr__ = renamed(__name__, {"Pair": "NextTokenPair"})
