"""From last-layer states to logits, a loss, or log-probabilities of sampled tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from vismem.model import VisMem

MOST_LOGITS = 2**26  # float32 logits held at a time


def logits_of(model: VisMem, hidden: Tensor, keep: int = 0) -> Tensor:
    """Logits [B, L, vocabulary] of states [B, L, d]; end tokens are -inf, as they are never sampled.

    Args:
        model: the model.
        hidden: last-layer states.
        keep: of that many last positions only; 0 for all.
    """
    kept = hidden[:, -keep:] if keep else hidden
    logits = model.tokens.extend(model.backbone.head(kept), kept)
    return model.tokens.forbid(logits, torch.ones(2, dtype=torch.bool, device=logits.device))


def cross_entropy(model: VisMem, logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of `labels` [B, L] under `logits` [B, at most L, vocabulary], end tokens not counted."""
    ends = torch.tensor(list(model.tokens.end_ids.values()), device=labels.device)
    labels = labels.masked_fill(torch.isin(labels, ends), -100)[:, -logits.shape[1] :]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def sampled_log_probs(
    model: VisMem, hidden: Tensor, input_ids: Tensor, sampled: Tensor, allowed: Tensor | None, temperature: float
) -> Tensor:
    """Float32 [B, L]: log-probabilities of the sampled tokens given all before them, 0 elsewhere.

    Computed a few thousand tokens at a time, and again in the backward pass, so that logits over the vocabulary are
    never held for whole trajectories.

    Args:
        model: the model.
        hidden: [B, L, d].
        input_ids: [B, L].
        sampled: bool [B, L].
        allowed: bool [B, L, 2], the kinds that might have been invoked at each token; None allows both.
        temperature: of the distribution.
    """
    wanted = sampled[:, 1:].nonzero()
    rows, before = wanted[:, 0], wanted[:, 1]
    states, tokens = hidden[rows, before], input_ids[rows, before + 1]
    kinds = torch.ones_like(tokens)[:, None].bool().expand(-1, 2) if allowed is None else allowed[rows, before + 1]

    def block(states: Tensor, tokens: Tensor, kinds: Tensor) -> Tensor:
        logits = model.tokens.forbid(model.tokens.extend(model.backbone.head(states), states), kinds)
        logits = logits.float() / temperature
        return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)

    size = max(1, MOST_LOGITS // model.tokens.vocabulary)
    blocks = zip(states.split(size), tokens.split(size), kinds.split(size), strict=True)
    if torch.is_grad_enabled() and len(tokens) > size:
        parts = [checkpoint(block, *each, use_reentrant=False) for each in blocks]
    else:
        parts = [block(*each) for each in blocks]
    flat = torch.cat(parts) if len(tokens) else states.new_zeros(0, dtype=torch.float32)
    return torch.zeros(input_ids.shape, device=flat.device).index_put((rows, before + 1), flat)
