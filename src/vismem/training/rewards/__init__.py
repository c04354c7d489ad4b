"""Rewards: functions with TRL's signature that score completions; built in, imported, or from a judge model.

`load_rewards` creates a `Rewards` from names; `extract_answer` finds the answer stated in a text.
"""

from __future__ import annotations

from vismem.training.rewards.answers import extract_answer
from vismem.training.rewards.combine import RewardResult, Rewards, load_rewards
from vismem.training.rewards.errors import JudgeError, RewardError

__all__ = ["JudgeError", "RewardError", "RewardResult", "Rewards", "extract_answer", "load_rewards"]
