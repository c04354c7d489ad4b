"""Combines rewards: loads them by name, calls them together, and sums them by weight; errors name function and row.

Coroutines run on one background event loop that lives as long as the process, so clients bound to a loop can be
reused, and rewards work where a loop is already running, as in a notebook.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import numbers
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from vismem.config import SettingsError
from vismem.training.rewards.builtin import BUILT_IN
from vismem.training.rewards.errors import FAILURES, RewardError, RowError
from vismem.training.rewards.imports import import_function

_SEARCH_SECONDS = 10.0  # for the row at which a function failed


@dataclass(frozen=True)
class RewardResult:
    """The rewards of a batch.

    Args:
        total: weighted sums, float [n].
        parts: unweighted rewards of each function, float [n, k]; NaN where it returned None.
        names: names of the k functions.
    """

    total: Tensor
    parts: Tensor
    names: list[str]


@dataclass(frozen=True)
class Reward:
    """One reward function with its name and weight."""

    name: str
    function: Callable[..., Any]
    weight: float = 1.0


class Rewards:
    """Reward functions, called together on a batch.

    Example:
        >>> rewards = load_rewards(["exact", {"name": "format", "pattern": "boxed", "weight": 0.5}])
        >>> rewards(["1 + 1?"], ["\\\\boxed{2}"], {"answer": ["2"], "id": ["a"]}).total
        tensor([1.5000])
    """

    def __init__(self, rewards: Sequence[Reward]) -> None:
        self.rewards = list(rewards)

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    @property
    def weights(self) -> list[float]:
        return [reward.weight for reward in self.rewards]

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> RewardResult:
        """Scores n completions.

        Args:
            prompts: n prompts, messages or text.
            completions: n completions, each a list with the assistant's message, or text, without special tokens.
            columns: lists of n values, passed to the functions by name; `id` names rows in errors. Other values,
                such as `trainer_state`, are passed unchanged.

        Raises:
            RewardError: if a function raises, returns a wrong number of rewards or anything but finite numbers and
                None, or if all functions return None for a row.
            ValueError: if the lists differ in length.
        """
        count = len(completions)
        for name, values in {"prompts": prompts, **columns}.items():
            if isinstance(values, (list, tuple)) and len(values) != count:
                raise ValueError(f"{name} has {len(values)} values for {count} completions")
        ids = columns.get("id") or list(range(count))
        parts = torch.full((count, len(self.rewards)), math.nan)
        given = {**columns, "prompts": prompts, "completions": completions}
        calls: list[Future[Any]] = []
        try:
            for reward in self.rewards if count else ():
                calls.append(_start(reward.function, given))
            for k, call in enumerate(calls):
                try:
                    values = call.result()
                except FAILURES as error:
                    _fail(self.rewards[k], given, ids, error)
                parts[:, k] = torch.tensor(_numbers(self.names[k], values, ids))
        finally:
            for call in calls:
                call.cancel()
        unscored = parts.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored:
            raise RewardError(
                f"no reward for row {ids[unscored[0]]}: {', '.join(self.names)} all gave None, so none of them applies "
                "to its answer; add one that does, or remove such rows"
            )
        total = (parts.nan_to_num(0.0) * torch.tensor(self.weights)).sum(dim=1)
        return RewardResult(total, parts, self.names)


def _start(function: Callable[..., Any], given: Mapping[str, Any]) -> Future[Any]:
    """Calls a reward function; a coroutine runs on in the background while others are called."""
    future: Future[Any] = Future()
    try:
        value = function(**_accepted(function, given))
        if inspect.isawaitable(value):
            return asyncio.run_coroutine_threadsafe(_await(value), _loop())
        future.set_result(value)
    except FAILURES as error:
        future.set_exception(error)
    return future


async def _await(value: Awaitable[Any]) -> Any:
    try:
        return await value
    except (SystemExit, KeyboardInterrupt) as stop:  # would end the loop; a real Ctrl-C only reaches the main thread
        raise RuntimeError(f"{type(stop).__name__}: {stop}") from stop


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vismem-rewards", daemon=True).start()
    return loop


def _accepted(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a function accepts; all, if it has **kwargs or no signature."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return dict(given)
    every = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    bound = getattr(function, "keywords", ())  # options take precedence over columns
    return {name: value for name, value in given.items() if (every or name in parameters) and name not in bound}


def _fail(reward: Reward, given: Mapping[str, Any], ids: Sequence[Any], error: BaseException) -> NoReturn:
    """Raises RewardError with the row at which a function failed."""
    row = error.row if isinstance(error, RowError) else _failing_row(reward.function, given, len(ids), error)
    cause = error.__cause__ if isinstance(error, RowError) and error.__cause__ else error
    where = f"row {ids[row]}" if row is not None else f"one of the rows {', '.join(map(str, ids[:8]))}"
    raise RewardError(f"the reward {reward.name!r} failed at {where}: {type(cause).__name__}: {cause}") from cause


def _failing_row(
    function: Callable[..., Any], given: Mapping[str, Any], count: int, error: BaseException
) -> int | None:
    """The row at which a function raises the same type of error when called row by row."""
    end = time.monotonic() + _SEARCH_SECONDS
    for row in range(count):
        alone = {name: [value[row]] if isinstance(value, (list, tuple)) else value for name, value in given.items()}
        if count == 1 or type(_start(function, alone).exception()) is type(error):
            return row
        if time.monotonic() > end:
            break
    return None


def _numbers(name: str, values: Any, ids: Sequence[Any]) -> list[float]:
    """Converts rewards to floats, with NaN for None. Raises RewardError."""
    if hasattr(values, "tolist"):  # tensors and arrays
        values = values.tolist()
    if not isinstance(values, (list, tuple)):
        raise RewardError(f"the reward {name!r} must return a list of {len(ids)} numbers, not {type(values).__name__}")
    if len(values) != len(ids):
        raise RewardError(
            f"the reward {name!r} gave {len(values)} rewards for {len(ids)} completions (from row {ids[0]})"
        )
    found = []
    for row, value in zip(ids, values, strict=True):
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.item()
        if value is not None and not (isinstance(value, numbers.Real) and math.isfinite(value)):
            raise RewardError(f"the reward {name!r} gave {value!r} for row {row}; it must be a finite number or None")
        found.append(math.nan if value is None else float(value))
    return found


def load_rewards(spec: Any) -> Rewards:
    """Loads rewards from a specification.

    Args:
        spec: one or a list of: a built-in name; an import path ("package.module:function" or
            "path/to/file.py:function"); a function; a dictionary with "name" or "path", "weight" (default 1.0) and the
            function's options. If both are given, "name" is the name in logs.

    Raises:
        SettingsError: if a name, path, weight or option is invalid.

    Example:
        >>> load_rewards(["choice", {"name": "numeric", "relative": 0.05, "weight": 0.5}]).names
        ['choice', 'numeric']
    """
    if isinstance(spec, (str, Mapping)) or callable(spec):
        spec = [spec]
    if not isinstance(spec, (list, tuple)) or not spec:
        raise SettingsError("rewards must be a non-empty list of names, import paths, dictionaries or functions")
    rewards: list[Reward] = []
    for one in spec:
        reward = _load(one)
        taken = {other.name for other in rewards}
        name, again = reward.name, 2
        while name in taken:
            name, again = f"{reward.name}_{again}", again + 1
        rewards.append(Reward(name, reward.function, reward.weight))
    return Rewards(rewards)


def _load(one: Any) -> Reward:
    if isinstance(one, str) or (callable(one) and not isinstance(one, Mapping)):
        one = {"name": one}
    if not isinstance(one, Mapping):
        raise SettingsError(f"a reward must be a name, an import path, a dictionary or a function, got {one!r}")
    options = dict(one)
    weight, path, name = options.pop("weight", 1.0), options.pop("path", None), options.pop("name", None)
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
        raise SettingsError(f"a reward's weight must be a finite number, got {weight!r}")
    if path is None and isinstance(name, str):
        if ":" not in name:
            return Reward(name, _built_in(name, options), float(weight))
        path, name = name, None
    if path is not None:
        function = import_function(path)
    elif callable(name):
        function, name = name, None
    else:
        given = ", ".join(map(str, one)) or "nothing"
        raise SettingsError(f"a reward's dictionary needs 'name' or 'path', got {given}")
    name = name or getattr(function, "__name__", None) or type(function).__name__
    return Reward(name, partial(function, **options) if options else function, float(weight))


def _built_in(name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
    if name not in BUILT_IN:
        raise SettingsError(
            f"no reward {name!r}; choose from {', '.join(BUILT_IN)}, or give an import path 'module:function'"
        )
    known = list(inspect.signature(BUILT_IN[name]).parameters)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise SettingsError(f"the reward {name!r} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return BUILT_IN[name](**options)
