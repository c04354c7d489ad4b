"""Rewards: functions in TRL's signature that score completions, built in, imported or asked of a judge.

`load_rewards` makes a `Rewards` of their names; `extract_answer` finds the answer that a text states.
"""

from __future__ import annotations

from vismem.training.rewards.answers import extract_answer
from vismem.training.rewards.combine import RewardResult, Rewards, load_rewards
from vismem.training.rewards.errors import JudgeError, RewardError

__all__ = ["JudgeError", "RewardError", "RewardResult", "Rewards", "extract_answer", "load_rewards"]
