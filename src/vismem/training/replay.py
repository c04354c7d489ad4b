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
    """What a replay computes with gradient.

    Args:
        log_probs: float32 [n, L], of the sampled tokens; 0 elsewhere.
        choices: float32 [n, C], of the blocks that short memories started from, with `memory_init="attended"`; 0 beyond
            a row's own.
        gaze: float32 [n], each row's `gaze_loss`; one zero if it was not asked for.
    """

    log_probs: Tensor
    choices: Tensor
    gaze: Tensor


def choice_log_probs(choices: list[list[Choice | None]] | None) -> Tensor:
    """Log-probabilities [n, C] of the chosen blocks, row by row, padded with 0."""
    rows = [
        torch.cat([choice.log_probs for choice in row if choice is not None] or [torch.zeros(0)])
        for row in choices or ()
    ]
    if not rows:
        return torch.zeros(0, 0)
    device = next((row.device for row in rows if len(row)), rows[0].device)
    return pad_sequence([row.to(device) for row in rows], batch_first=True)


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
        """Log-probabilities of the sampled tokens by `VisMem.forward(**inputs)`; zero for None.

        Every trained parameter takes part, unused ones with weight 0, so that processes whose trajectories invoked
        different kinds reduce the same gradients.
        """
        zero = sum((0 * p.float().sum() for p in self.parameters() if p.requires_grad), torch.zeros(()))
        if inputs is None:
            return Replayed(zero, zero, zero)
        output = self._model[0](**inputs)
        choices = choice_log_probs(output.choices)
        gaze = zero if output.gaze_loss is None else output.gaze_loss.to(zero.device)
        return Replayed(output.log_probs + zero, choices + zero, gaze + zero)


def collate(
    prompts: dict[str, Tensor], rollouts: list[Rollout], pad: int, temperature: float, *, formed: bool
) -> dict[str, Any]:
    """Prompts and their rollouts as arguments of `VisMem.forward`.

    Args:
        prompts: the processor's output for B prompts, padded on the left.
        rollouts: n per prompt, those of one prompt adjacent.
        pad: the padding id.
        temperature: of the rollouts' sampling.
        formed: pass the memories that decoding formed; else the observed states, to form them again.
    """
    copies, device = len(rollouts) // len(prompts["input_ids"]), prompts["input_ids"].device
    start = prompts["input_ids"].shape[1]

    def answers(name: str, value: float) -> Tensor:
        rows = [getattr(rollout, name) for rollout in rollouts]
        return pad_sequence(rows, batch_first=True, padding_value=value).to(device)

    tokens, real = answers("tokens", pad), pad_sequence([torch.ones_like(r.tokens) for r in rollouts], True)
    ids = torch.cat([prompts["input_ids"].repeat_interleave(copies, 0), tokens], 1)
    mask = torch.cat([prompts["attention_mask"].repeat_interleave(copies, 0), real.to(device)], 1)
    before = torch.zeros(len(ids), start, dtype=torch.bool, device=device)
    sampled = torch.cat([before, answers("sampled", False)], 1)
    allowed = torch.cat([before[..., None].expand(-1, -1, 2), answers("allowed", False)], 1)
    given: dict[str, Any] = {"states": [[i.states for i in r.invocations] for r in rollouts]}
    chosen = [[None if i.choice is None else i.choice.blocks for i in r.invocations] for r in rollouts]
    if any(blocks is not None for row in chosen for blocks in row):
        given["blocks"] = chosen
    if formed:
        given = {"memories": [[i.memory for i in r.invocations] for r in rollouts]}
    rest = {name: value for name, value in prompts.items() if name not in ("input_ids", "attention_mask")}
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "prompt_length": start,
        "copies": copies,
        "sampled": sampled,
        "allowed": allowed,
        "temperature": temperature,
        **given,
        **rest,
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
    ids, start = inputs["input_ids"], inputs["prompt_length"]
    word = ~torch.isin(ids, tokens)
    word[:, :start] = True
    order = torch.argsort(~word, dim=1, stable=True)  # words first, in their order
    moved = {name: inputs[name].gather(1, order) for name in ("input_ids", "sampled")}
    left = word.gather(1, order)
    mask = inputs["attention_mask"].gather(1, order) * left
    allowed = torch.zeros_like(inputs["allowed"])
    rest = {name: value for name, value in inputs.items() if name not in ("states", "memories")}
    changed = {**rest, **moved, "sampled": moved["sampled"] & left, "attention_mask": mask, "allowed": allowed}
    changed["input_ids"] = moved["input_ids"].masked_fill(~left, int(ids[0, 0]))
    return {**changed, "memories": [[] for _ in ids]}, order
