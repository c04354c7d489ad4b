"""Group-relative policy optimisation as pure functions on tensors (Eq. 12-15); they know no model and no stage.

A trajectory is a row of T tokens with a mask: True where the policy sampled the token. Everything that was inserted
(end tokens, forced invocations, padding) is False there and never counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

EPSILON = 1e-4  # beside the standard deviation, so that a group without spread has advantage 0 and not NaN


def group_advantages(rewards: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """By how many standard deviations of its group each trajectory is better than the group's mean (Eq. 12).

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
    free = ratio * advantages[:, None]
    clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages[:, None]
    return torch.minimum(free, clipped), clipped < free


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
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each trajectory: minus its mean surrogate, plus its mean divergence (Eq. 13-15).

    Args:
        log_probs, old_log_probs, reference_log_probs: [n, T]; without a reference no divergence is taken.
        advantages: [n].
        sampled: bool [n, T].
        clip_ratio, kl_coef: epsilon and beta.
        weights: [n, T] of the surrogate, see `importance_weights`; None for 1.

    Returns:
        Losses [n], whose mean is to be minimised; and, without gradient, each trajectory's `kl` [n] and
        `clip_share` [n].
    """
    objective, clipped = clipped_surrogate(log_probs, old_log_probs, advantages, clip_ratio)
    if weights is not None:
        objective = objective * weights
    divergence = torch.zeros_like(log_probs)
    if reference_log_probs is not None:
        divergence = k3_divergence(log_probs, reference_log_probs)
    losses = trajectory_mean(kl_coef * divergence - objective, sampled)
    metrics = {"kl": divergence.detach(), "clip_share": clipped.float()}
    return losses, {name: trajectory_mean(values, sampled) for name, values in metrics.items()}


def importance_weights(old_log_probs: Tensor, sampled_log_probs: Tensor, cap: float) -> Tensor:
    """Truncated importance weights [n, T]: replayed over sampled probability of each token, at most `cap`.

    In low precision the replay of a token differs a little from the decode that sampled it. The weights correct the
    gradient for that difference; truncation bounds their variance.
    """
    return (old_log_probs - sampled_log_probs).exp().clamp(max=cap)


@dataclass
class AdaptiveKL:
    """Proportional controller that moves the KL coefficient to keep the divergence near a target.

    It stays between a tenth and ten times its initial value, so that it can come back after a long stretch on one side
    of the target.

    Args:
        coef: initial beta.
        target: divergence per token to aim for; 0 keeps the coefficient constant.
        horizon: number of updates in which a steady error of 20 % or more changes the coefficient by about 20 %.
    """

    coef: float
    target: float
    horizon: int = 10

    def __post_init__(self) -> None:
        self.bounds = self.coef / 10, self.coef * 10

    def update(self, divergence: float, *, can_decrease: bool = True) -> float:
        """Returns the coefficient after an update with this mean divergence per token.

        Args:
            divergence: measured over the update's sampled tokens.
            can_decrease: False while the learning rate warms up: the divergence is small then because the policy has
                hardly moved, which says nothing about the coefficient.
        """
        if self.target > 0:
            error = min(max(divergence / self.target - 1, -0.2 if can_decrease else 0.0), 0.2)
            lowest, highest = self.bounds
            self.coef = min(max(self.coef * (1 + error / self.horizon), lowest), highest)
        return self.coef


def type_penalty(scores: Tensor, swapped_scores: Tensor, invoked: Tensor) -> Tensor:
    """p_type of Eq. 15: by how much the other kind of memory would have done better; 0 where nothing was invoked."""
    return (swapped_scores - scores).clamp(min=0) * invoked


def negative_penalty(scores: Tensor, invoked: Tensor, group_size: int) -> Tensor:
    """p_neg of Eq. 15: by how much a trajectory that invoked falls short of its group's mean."""
    means = scores.view(-1, group_size).mean(dim=1).repeat_interleave(group_size)
    return (means - scores).clamp(min=0) * invoked


class Returns(NamedTuple):
    """Stage II's returns and the penalties in them, each [n]."""

    total: Tensor
    type_penalty: Tensor
    negative_penalty: Tensor


def invocation_returns(
    scores: Tensor,
    baselines: Tensor,
    swapped_scores: Tensor,
    invoked: Tensor,
    group_size: int,
    penalty_coef: float,
) -> Returns:
    """R = S(tau) - S(tau_base) - alpha (p_type + p_neg), what stage II maximises (Eq. 8, 15).

    Args:
        scores: S(tau) [n], groups one after another.
        baselines: S(tau_base) [n / group_size], one for each prompt.
        swapped_scores: S(tau_rev) [n]; the row's own score where it has no counterfactual.
        invoked: bool [n].
        group_size: G.
        penalty_coef: alpha.

    Example:
        >>> scores, swapped = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.5])
        >>> invocation_returns(scores, torch.tensor([0.0]), swapped, torch.tensor([False, True]), 2, 0.5).total
        tensor([ 1.0000, -0.5000])
    """
    wrong_kind = type_penalty(scores, swapped_scores, invoked)
    harmful = negative_penalty(scores, invoked, group_size)
    total = scores - baselines.repeat_interleave(group_size) - penalty_coef * (wrong_kind + harmful)
    return Returns(total, wrong_kind, harmful)
