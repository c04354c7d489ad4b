"""Finished answers read again with other memories in them: what becomes of the next-token distributions.

One invocation is replaced at a time, the words stay as they were written. Which memory stands in for which is for
the caller to say (the audit, a viewer); how sequences with memories are read is for `VisMem.forward`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vismem.config import Kind
from vismem.decoding.trace import Invocation, Rollout
from vismem.model import VisMem
from vismem.reading.heads import MOST_LOGITS
from vismem.training.replay import collate

Replace = Callable[[int, int, Invocation], "Tensor | None"]


@dataclass(frozen=True)
class Shift:
    """How far one invocation's memory moved the words after it: KL(with the memory || with its replacement), in nats.

    Args:
        row: index of the answer in the batch.
        index: of the invocation in that answer.
        kind: of the invocation.
        first: at the token right after the end token.
        rest: mean over the answer's sampled tokens after that one; NaN where there is none.
        tokens: how many tokens `rest` is the mean of.
    """

    row: int
    index: int
    kind: Kind
    first: float
    rest: float
    tokens: int


@dataclass(frozen=True)
class Pair:
    """The distributions of the token right after one invocation.

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
    """KL of the next-token distributions when each invocation's memory in turn is replaced, all others in place.

    Distributions are the model's own at temperature 1, before processors; invocation tokens are open where they were
    open to the answer. Costs one forward, and one more for each invocation of the fullest answer.

    Args:
        model: the model.
        inputs: the processor's output for B prompts, padded on the left.
        rollouts: n for each prompt, one after another, as `generate(..., record=True)` gives them.
        replace: called with row, index and invocation; gives the vectors [N, d] to put instead, of any N, or None to
            take the memory out.

    Returns:
        A `Shift` for each invocation that inserted vectors, by row and index.

    Raises:
        ValueError: if `rollouts` are not a multiple of the prompts, or a memory is missing or has another width.

    Example:
        >>> out = model.generate(**inputs, record=True, return_dict_in_generate=True)
        >>> next_token_kl(model, inputs, out.rollout, lambda row, index, invocation: None)
    """
    found = []
    start = inputs["input_ids"].shape[1]
    for row, index, own, other in _replaced(model, inputs, rollouts, replace):
        rollout = rollouts[row]
        invocation = rollout.invocations[index]
        first = invocation.position + 2
        later = [t for t in range(first + 1, len(rollout.tokens)) if rollout.sampled[t]]
        places = torch.tensor([first, *later])
        before = (start + places - 1).to(own.device)
        divergence = _kl(model, own[before], other[before], _open(rollout, places).to(own.device)).tolist()
        rest = sum(divergence[1:]) / len(later) if later else float("nan")
        found.append(Shift(row, index, invocation.kind, divergence[0], rest, len(later)))
    return sorted(found, key=lambda shift: (shift.row, shift.index))


@torch.no_grad()
def distributions(
    model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout], replace: Replace
) -> list[Pair]:
    """Both distributions of the token right after each invocation; arguments, cost and errors as `next_token_kl`.

    Returns:
        A `Pair` for each invocation that inserted vectors, by row and index.
    """
    found = []
    start = inputs["input_ids"].shape[1]
    for row, index, own, other in _replaced(model, inputs, rollouts, replace):
        invocation = rollouts[row].invocations[index]
        first = torch.tensor([invocation.position + 2])
        states = torch.cat([own[start + first - 1], other[start + first - 1]])
        log_probs = _log_probs(model, states, _open(rollouts[row], first).to(states.device))
        found.append(Pair(row, index, invocation.kind, log_probs.cpu()))
    return sorted(found, key=lambda pair: (pair.row, pair.index))


def _replaced(
    model: VisMem, inputs: dict[str, Tensor], rollouts: Sequence[Rollout], replace: Replace
) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Row, index, and the row's states [L, d] with its memories and with that one replaced, for every invocation."""
    if not rollouts or len(rollouts) % len(inputs["input_ids"]):
        raise ValueError(
            f"{len(rollouts)} rollouts for {len(inputs['input_ids'])} prompts; give as many for each prompt, in order"
        )
    call = collate(dict(inputs), list(rollouts), model.processor.tokenizer.pad_token_id or 0, True, 1.0)
    call = {name: value for name, value in call.items() if name not in ("sampled", "allowed", "temperature")}
    memories = call.pop("memories")
    for row, rollout in enumerate(rollouts):
        for index, invocation in enumerate(rollout.invocations):
            if invocation.length and invocation.memory is None:
                raise ValueError(f"invocation {index} of answer {row} has lost its memory; keep Invocation.memory")

    def read(memories: list[list[Tensor | None]]) -> Tensor:
        return model(**call, memories=memories, logits_to_keep=1).last_hidden_state

    own = read(memories)
    for turn in range(max(len(row) for row in memories)):
        changed, rows = [list(row) for row in memories], []
        for row, rollout in enumerate(rollouts):
            if turn < len(rollout.invocations) and rollout.invocations[turn].memory is not None:
                changed[row][turn] = checked(replace(row, turn, rollout.invocations[turn]), memories[row][turn])
                rows.append(row)
        other = read(changed) if rows else own
        yield from ((row, turn, own[row], other[row]) for row in rows)


def checked(replacement: Tensor | None, memory: Tensor) -> Tensor | None:
    """A replacement in the memory's dtype and place. Raises ValueError if it is not [N, d]; no vector is None."""
    if replacement is None or len(replacement) == 0:
        return None
    if replacement.dim() != 2 or replacement.shape[1] != memory.shape[1]:
        raise ValueError(
            f"a memory's replacement must be [N, {memory.shape[1]}] or None, got {list(replacement.shape)}"
        )
    return replacement.to(memory)


def _open(rollout: Rollout, places: Tensor) -> Tensor:
    """Bool [n, 2]: the kinds that might be invoked at these tokens of an answer; none after its last."""
    held = places < len(rollout.tokens)
    return rollout.allowed[places.clamp(max=len(rollout.tokens) - 1)] & held[:, None]


def _log_probs(model: VisMem, states: Tensor, open_: Tensor) -> Tensor:
    """Float32 log-probabilities [n, vocabulary] of the next token, from the last states [n, d] before it."""
    logits = model.tokens.extend(model.backbone.head(states), states)
    return model.tokens.forbid(logits, open_).float().log_softmax(-1)


def _kl(model: VisMem, own: Tensor, other: Tensor, open_: Tensor) -> Tensor:
    """Float32 KL [n] of the distributions after states [n, d], a block of the vocabulary's width at a time."""
    size = max(1, MOST_LOGITS // (2 * model.tokens.vocabulary))
    parts = []
    for one, two, may in zip(own.split(size), other.split(size), open_.split(size), strict=True):
        p, q = _log_probs(model, one, may), _log_probs(model, two, may)
        parts.append((p.exp() * (p - q)).masked_fill(p == float("-inf"), 0).sum(-1))
    return torch.cat(parts)
