"""Replay: trajectories as one batch for the training forward, and the trained parts as one module (Eq. 14).

Replay reproduces the log-probabilities of decoding. Stage I passes the observed states and forms the memories again,
with gradient; stage II passes the memories themselves, and only the four tokens' rows get a gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vismem.decoding.trace import Rollout
from vismem.memory import Choice
from vismem.model import VisMem


class Replayed(NamedTuple):
    """What a replay computes.

    Args:
        log_probs: float32 [n, L], of the sampled tokens; 0 elsewhere.
        choices: float32 [n, C], of the blocks that each row's short memories started from, in order, with
            `memory_init="attended"`; 0 beyond a row's own, and C is 0 without a choice.
        gaze: float32 [n], each row's `gaze_loss`; a single 0 if none was asked for.
    """

    log_probs: Tensor
    choices: Tensor
    gaze: Tensor

    def detach(self) -> Replayed:
        """The same without gradient."""
        return Replayed(*(part.detach() for part in self))


class Learner(nn.Module):
    """The trained parts as one module for the Trainer: builder, formers and the four tokens' rows, or an adapter.

    The frozen base is not registered, so nothing wraps, moves, shards or saves it with them.

    Args:
        model: the model.
        adapter: an adapter of its base, if that is trained instead.
    """

    def __init__(self, model: VisMem, adapter: nn.Module | None = None) -> None:
        super().__init__()
        if adapter is None:
            self.memory, self.tokens = model.memory, model.tokens
        else:
            self.adapter = adapter
        self._model = [model]

    def activation_checkpointing_enable(self, **_settings: Any) -> None:
        """Called by the Trainer for `gradient_checkpointing=true`."""
        self._model[0].gradient_checkpointing_enable()

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name in older versions

    def forward(self, inputs: dict[str, Any] | None) -> Replayed:
        """Log-probabilities of what was sampled, by `VisMem.forward(**inputs)`; zeros for None.

        Every trained parameter takes part, unused ones with weight 0, so that processes whose trajectories invoked
        different kinds reduce the same gradients.
        """
        zero = sum((0 * p.float().sum() for p in self.parameters() if p.requires_grad), torch.zeros(()))
        if inputs is None:
            return Replayed(zero, zero, zero)
        output = self._model[0](**inputs)
        gaze = zero if output.gaze_loss is None else output.gaze_loss.to(zero.device) + zero
        return Replayed(output.log_probs + zero, choice_log_probs(output.choices, zero.device) + zero, gaze)


def choice_log_probs(choices: list[list[Choice | None]] | None, device: torch.device) -> Tensor:
    """Log-probabilities [n, C] of the chosen blocks of each row's memories, padded with 0."""
    rows = [[choice.log_probs.to(device) for choice in row if choice is not None] for row in choices or ()]
    flat = [torch.cat(row) if row else torch.zeros(0, device=device) for row in rows]
    return pad_sequence(flat, batch_first=True) if flat else torch.zeros(0, 0, device=device)


def chosen_blocks(rollouts: list[Rollout], device: torch.device) -> Tensor:
    """bool [n, C], True at the rollouts' own entries of `Replayed.choices`."""
    counts = [sum(len(i.choice.blocks) for i in rollout.invocations if i.choice is not None) for rollout in rollouts]
    own = torch.arange(max(counts, default=0), device=device)
    return own < torch.tensor(counts, device=device)[:, None]


def collate(
    prompts: dict[str, Tensor], rollouts: list[Rollout], pad: int, temperature: float, *, formed: bool | None
) -> dict[str, Any]:
    """Prompts and their rollouts as arguments of `VisMem.forward`.

    Args:
        prompts: the processor's output for B prompts, padded on the left.
        rollouts: n per prompt, those of one prompt adjacent.
        pad: the padding id.
        temperature: of the rollouts' sampling.
        formed: pass the memories that decoding formed; if False the observed states, to form them again; if None
            neither, as none were recorded.
    """
    copies = len(rollouts) // len(prompts["input_ids"])
    ids, mask = (prompts[name].repeat_interleave(copies, 0) for name in ("input_ids", "attention_mask"))
    unsampled = torch.zeros_like(ids, dtype=torch.bool)

    def with_answers(before: Tensor, answers: list[Tensor], padding: float = 0) -> Tensor:
        return torch.cat([before, pad_sequence(answers, True, padding).to(before.device)], 1)

    given: dict[str, Any] = {}
    if formed is not None:
        name, field = ("memories", "memory") if formed else ("states", "states")
        given[name] = [[getattr(i, field) for i in rollout.invocations] for rollout in rollouts]
    if formed is False and any(i.choice is not None for rollout in rollouts for i in rollout.invocations):
        given["blocks"] = [[i.choice and i.choice.blocks for i in rollout.invocations] for rollout in rollouts]
    return {
        "input_ids": with_answers(ids, [r.tokens for r in rollouts], pad),
        "attention_mask": with_answers(mask, [torch.ones_like(r.tokens) for r in rollouts]),
        "prompt_length": ids.shape[1],
        "copies": copies,
        "sampled": with_answers(unsampled, [r.sampled for r in rollouts]),
        "allowed": with_answers(unsampled[..., None].expand(-1, -1, 2), [r.allowed for r in rollouts]),
        "temperature": temperature,
        **given,
        **{name: value for name, value in prompts.items() if name not in ("input_ids", "attention_mask")},
    }


def decoded_log_probs(rollouts: list[Rollout], sampled: Tensor) -> Tensor:
    """Log-probabilities [n, L] recorded by decoding, at the sampled tokens of `collate`; 0 elsewhere.

    Args:
        rollouts: n of them.
        sampled: bool [n, L], from `collate` for these rollouts.
    """
    found = torch.zeros(sampled.shape, device=sampled.device)
    recorded = torch.cat([rollout.log_probs[rollout.sampled] for rollout in rollouts])
    return found.masked_scatter(sampled, recorded.to(found))


def without_memory(inputs: dict[str, Any], tokens: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The same answers without invocation and end tokens, as the base alone reads them.

    Args:
        inputs: from `collate`.
        tokens: ids of the four tokens.

    Returns:
        Arguments of `VisMem.forward`, and for each of their positions the original one [n, L]. Sampled invocation
        tokens have no counterpart.
    """
    ids = inputs["input_ids"]
    word = ~torch.isin(ids, tokens)
    word[:, : inputs["prompt_length"]] = True
    order = torch.argsort(~word, dim=1, stable=True)  # words first, in their order
    left = word.gather(1, order)
    changed = {
        "input_ids": ids.gather(1, order).masked_fill(~left, int(ids[0, 0])),
        "sampled": inputs["sampled"].gather(1, order) & left,
        "attention_mask": inputs["attention_mask"].gather(1, order) * left,
        "allowed": torch.zeros_like(inputs["allowed"]),
        "memories": [[] for _ in ids],
    }
    return {name: value for name, value in inputs.items() if name != "states"} | changed, order
