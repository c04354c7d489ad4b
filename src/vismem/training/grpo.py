"""Group-relative policy optimisation as pure functions on tensors (Eq. 12-15); they know no model and no stage.

A trajectory is a row of T tokens with a mask: True where the policy sampled the token. Everything that was put in -
end tokens, forced invocations, padding - is False there and counts nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-4  # beside the standard deviation, so that a group without spread has advantage 0 and not NaN


def group_advantages(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """How much better than its group each trajectory did, in units of the group's spread (Eq. 12).

    Args:
        rewards: float [n * group_size], groups one after another.
        group_size: G; 2 or more.

    Returns:
        Advantages [n * group_size] and the groups' standard deviations [n] (with G - 1 in the denominator).

    Raises:
        ValueError: if the rewards are not whole groups of at least two.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0]), 2)[0]
        tensor([ 0.7070, -0.7070])
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of {group_size} (2 or more)")
    groups = rewards.view(-1, group_size)
    spread = groups.std(dim=1)
    advantages = (groups - groups.mean(dim=1, keepdim=True)) / (spread[:, None] + EPSILON)
    return advantages.flatten(), spread


def clipped_surrogate(
    log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip_ratio: float
) -> tuple[Tensor, Tensor]:
    """The per-token objective, to be maximised, and where its clipping bites (Eq. 13).

    Args:
        log_probs: [n, T] under the policy that is trained.
        old_log_probs: [n, T] under the policy that sampled.
        advantages: [n].
        clip_ratio: epsilon.

    Returns:
        Objective [n, T], and bool [n, T]: True where the clipped branch is the smaller one.
    """
    ratio = (log_probs - old_log_probs).exp()
    gain = advantages[:, None]
    free = ratio * gain
    bound = ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * gain
    return torch.minimum(free, bound), bound < free


def k3_divergence(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """Per-token estimate of KL(policy || reference), never negative: r - log r - 1 with r = reference / policy."""
    log_ratio = reference_log_probs - log_probs
    return log_ratio.exp() - log_ratio - 1


def trajectory_mean(values: Tensor, sampled: Tensor) -> Tensor:
    """Mean of `values` [n, T] over each trajectory's own tokens (`sampled` [n, T]): [n]; 0 for one that has none."""
    counts = sampled.sum(-1).clamp(min=1)
    return values.masked_fill(~sampled, 0).sum(-1) / counts


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    reference_log_probs: Tensor | None,
    advantages: Tensor,
    sampled: Tensor,
    clip_ratio: float,
    kl_coef: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each trajectory: minus its mean surrogate, plus its mean divergence (Eq. 13-15).

    Args:
        log_probs, old_log_probs, reference_log_probs: [n, T]; without a reference no divergence is taken.
        advantages: [n].
        sampled: bool [n, T].
        clip_ratio, kl_coef: epsilon and beta.

    Returns:
        Losses [n], of which the mean is to be minimised, and without gradient by trajectory: `kl` [n] and
        `clip_share` [n].
    """
    objective, clipped = clipped_surrogate(log_probs, old_log_probs, advantages, clip_ratio)
    per_token, divergence = -objective, torch.zeros_like(log_probs)
    if reference_log_probs is not None:
        divergence = k3_divergence(log_probs, reference_log_probs)
        per_token = per_token + kl_coef * divergence
    figures = {"kl": divergence.detach(), "clip_share": clipped.float()}
    return trajectory_mean(per_token, sampled), {name: trajectory_mean(v, sampled) for name, v in figures.items()}


@dataclass
class AdaptiveKL:
    """Moves the KL coefficient so that the divergence stays near a target: the usual proportional controller.

    Args:
        coef: beta, where it starts.
        target: wanted divergence per token; 0 leaves the coefficient as it is.
        horizon: updates that a steady error of a fifth or more takes to change the coefficient by about a fifth.
    """

    coef: float
    target: float
    horizon: int = 10

    def update(self, divergence: float) -> float:
        """Takes one update's measured divergence per token, and returns the new coefficient."""
        if self.target > 0:
            error = min(max(divergence / self.target - 1, -0.2), 0.2)
            self.coef *= 1 + error / self.horizon
        return self.coef


def type_penalty(scores: Tensor, swapped_scores: Tensor, invoked: Tensor) -> Tensor:
    """p_type of Eq. 15: by how much the other kind of memory would have done better; 0 where nothing was invoked."""
    return (swapped_scores - scores).clamp(min=0) * invoked


def negative_penalty(scores: Tensor, invoked: Tensor, group_size: int) -> Tensor:
    """p_neg of Eq. 15: by how much a trajectory that invoked falls short of its group's mean."""
    means = scores.view(-1, group_size).mean(dim=1).repeat_interleave(group_size)
    return (means - scores).clamp(min=0) * invoked
