"""Replay: trajectories as one batch for the training forward, and what is trained as one module (Eq. 14).

The replayed log-probabilities are those that decoding saw. In stage I the observed states are given and memories are
formed again, with gradient; in stage II the memories themselves are given and only the four tokens' rows are free.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vismem.decoding.trace import Rollout
from vismem.model import VisMem


class Learner(nn.Module):
    """What is trained, as the Trainer sees it: builder, formers and the four tokens' rows, or an adapter alone.

    The frozen base is used and not registered, so nothing wraps, moves, shards or saves it with them.

    Args:
        model: the model that has them.
        adapter: weights of an adapter of its base, where these are trained instead.
    """

    def __init__(self, model: VisMem, adapter: nn.Module | None = None) -> None:
        super().__init__()
        if adapter is None:
            self.memory, self.tokens = model.memory, model.tokens
        else:
            self.adapter = adapter
        self._model = [model]

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Asked by the Trainer for `gradient_checkpointing=true`; how is the model's matter."""
        self._model[0].gradient_checkpointing_enable()

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name in older versions

    def forward(self, inputs: dict[str, Any] | None) -> Tensor:
        """Log-probabilities [n, L] of `VisMem.forward(**inputs)`'s sampled tokens; of nothing, a zero, for None.

        Every trained parameter takes part, with weight 0 where it was not used, so that processes whose trajectories
        invoked different kinds still reduce the same gradients.
        """
        zero = sum((0 * p.float().sum() for p in self.parameters() if p.requires_grad), torch.zeros(()))
        if inputs is None:
            return zero
        return self._model[0](**inputs).log_probs + zero


def collate(
    prompts: dict[str, Tensor], rollouts: list[Rollout], pad: int, formed: bool, temperature: float
) -> dict[str, Any]:
    """Prompts and their rollouts as arguments of `VisMem.forward`.

    Args:
        prompts: the processor's output for B prompts, padded on the left.
        rollouts: n for each prompt, one after another.
        pad: the id that fills up.
        formed: give the memories that decoding formed; otherwise the observed states, to form them again.
        temperature: that the rollouts were sampled at.
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
    """Log-probabilities [n, L] that decoding recorded, in the places of `collate`'s sampled tokens; 0 elsewhere.

    Args:
        rollouts: n of them.
        sampled: bool [n, L], as `collate` made it for these rollouts.
    """
    found = torch.zeros(sampled.shape, device=sampled.device)
    recorded = torch.cat([rollout.log_probs[rollout.sampled] for rollout in rollouts])
    return found.masked_scatter(sampled, recorded.to(found))


def without_memory(inputs: dict[str, Any], tokens: Tensor) -> tuple[dict[str, Any], Tensor]:
    """The same words as the base alone would read them: invocation and end tokens taken out.

    Args:
        inputs: as `collate` made them.
        tokens: ids of the four tokens.

    Returns:
        Arguments of `VisMem.forward`, and for each position of theirs the position it had [n, L]. Sampled invocation
        tokens have no counterpart; their log-probability is not among the result.
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
