"""Calls the reward functions as TRL does, and names the function and the row when one is at fault.

The contract is TRL's (1.15 and 1.16): every function gets the keyword arguments `prompts`, `completions`,
`completion_ids`, each column of the data set, `trainer_state`, `log_extra` and `log_metric`, and returns one number or
None a completion; async functions run together. Unlike TRL, nothing that is not a reward gets through.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import torch

from ..config.errors import ConfigError
from .errors import RewardError
from .loop import BackgroundLoop
from .values import as_rewards

logger = logging.getLogger("pronghorn")

RewardFunc = Callable[..., Any]

RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Columns that TRL takes as the prompt and what answers it, and does not pass on.
_NOT_PASSED = ("prompt", "completion", "completion_ids")
_SEARCH_SECONDS = 5.0


def is_async(func: RewardFunc) -> bool:
    """Whether calling `func` gives a coroutine: async functions, partials of them, objects with an async `__call__`."""
    while isinstance(func, functools.partial):
        func = func.func
    return inspect.iscoroutinefunction(func) or inspect.iscoroutinefunction(getattr(func, "__call__", None))  # noqa: B004


def name_of(func: RewardFunc) -> str:
    """The name under which TRL logs a function: its own, that of what a partial wraps, or its class's."""
    while isinstance(func, functools.partial):
        func = func.func
    return getattr(func, "__name__", type(func).__name__)


def _no_log(*_: Any) -> None:
    """Stands in for `log_extra` and `log_metric` where nobody listens."""


class RewardRunner:
    """The F reward functions of a run.

    Attributes: `names` (F, unique), `weights_F` (float32, default ones). Raises `ConfigError` for no functions, one
    that is not callable or is a reward model (wrap it in a function), and names or weights of another number.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        names: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs or ())
        if not self.funcs:
            raise ConfigError("reward_funcs is empty: give at least one function")
        for func in self.funcs:
            if isinstance(func, (str, torch.nn.Module)) or not callable(func):
                raise ConfigError(
                    f"reward_funcs has a {type(func).__name__}, which is not a plain callable: wrap a reward model in "
                    "a function of (prompts, completions, **kwargs) that returns one number a completion"
                )
        F = len(self.funcs)
        if names is not None and len(names) != F:
            raise ConfigError(f"names has {len(names)} entries for {F} reward functions: give one for each")
        if weights is not None and len(weights) != F:
            raise ConfigError(f"reward_weights has {len(weights)} entries for {F} reward functions: give one for each")
        self.names = _unique(list(names) if names is not None else [name_of(func) for func in self.funcs])
        self.weights_F = torch.tensor(list(weights) if weights is not None else [1.0] * F, dtype=torch.float32)
        self._loop = BackgroundLoop()

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> torch.Tensor:
        """Rewards of B completions: float32 [B, F] on the CPU, NaN where a function gave None.

        `columns` are the data set's, one value a completion. Raises `RewardError` (see `values.as_rewards`; also where
        a function raises, or does not take the arguments), and `ConfigError` for columns of another length or with a
        name that the contract uses. A row for which every function gave None is warned of, as TRL does.
        """
        B = len(prompts)
        passed = {name: list(column) for name, column in columns.items() if name not in _NOT_PASSED}
        for name, column in {**passed, "completions": completions, "completion_ids": completion_ids}.items():
            if name in RESERVED and name in passed:
                raise ConfigError(f"data set column {name!r} collides with what reward functions are passed: rename it")
            if len(column) != B:
                raise ConfigError(f"{name} has {len(column)} rows, but there are {B} prompts")
        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **passed}
        extras = {"trainer_state": state, "log_extra": log_extra or _no_log, "log_metric": log_metric or _no_log}
        rewards_BF = torch.full((B, len(self.funcs)), torch.nan, dtype=torch.float32)
        waiting: list[int] = []
        for f, (func, name) in enumerate(zip(self.funcs, self.names)):
            _check_arguments(func, name, {**rows, **extras})
            if is_async(func):
                waiting.append(f)
                continue
            try:
                returned = func(**rows, **extras)
                # A generator runs here, so what it raises is the function's too.
                returned = list(returned) if inspect.isgenerator(returned) else returned
            except Exception as error:
                raise self._at_fault(f, error, rows, extras) from error
            rewards_BF[:, f] = torch.tensor(as_rewards(name, returned, completions))
        for f, outcome in zip(waiting, self._together(waiting, rows, extras)):
            if isinstance(outcome, Exception):
                raise self._at_fault(f, outcome, rows, extras) from outcome
            if isinstance(outcome, BaseException):
                raise outcome
            rewards_BF[:, f] = torch.tensor(as_rewards(self.names[f], outcome, completions))
        self._warn_of_unscored(rewards_BF, rows)
        return rewards_BF

    def close(self) -> None:
        """Ends the thread that async functions run on, if there is one; the next `score` starts a new one."""
        self._loop.close()

    def _together(self, waiting: list[int], rows: dict[str, Any], extras: dict[str, Any]) -> list[Any]:
        """What the async functions returned or raised, in order; all are over when this returns."""
        if not waiting:
            return []

        async def run() -> list[Any]:
            calls: list[Coroutine[Any, Any, Any]] = [self.funcs[f](**rows, **extras) for f in waiting]
            return await asyncio.gather(*calls, return_exceptions=True)

        return self._loop.run(run())

    def _at_fault(self, f: int, error: Exception, rows: dict[str, Any], extras: dict[str, Any]) -> RewardError:
        """The error for a function that raised: called again row by row, without logs, to find the row that did it."""
        quiet = {**extras, "log_extra": _no_log, "log_metric": _no_log}
        func, name = self.funcs[f], self.names[f]
        problem = f"raised {type(error).__name__}: {error}"
        give_up = time.monotonic() + _SEARCH_SECONDS
        for row in range(len(rows["prompts"])):
            if time.monotonic() > give_up:
                return RewardError(name, f"{problem} (looking for the row was given up after {row} rows)")
            one = {key: column[row : row + 1] for key, column in rows.items()}
            try:
                returned = self._loop.run(func(**one, **quiet)) if is_async(func) else func(**one, **quiet)
                if inspect.isgenerator(returned):
                    list(returned)
            except type(error):
                return RewardError(name, problem, row, rows["completions"][row])
            except Exception as other:  # noqa: BLE001 - user code; only the row at fault is looked for
                logger.debug("reward function %r, row %d alone: %r", name, row, other)
        return RewardError(name, f"{problem} (on the batch; on no row alone)")

    def _warn_of_unscored(self, rewards_BF: torch.Tensor, rows: dict[str, Any]) -> None:
        unscored = rewards_BF.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored:
            row = unscored[0]
            shown = {key: column[row] for key, column in rows.items()}
            logger.warning(
                "All reward functions returned None for %d of %d completions, the first with: %s\n"
                "Please ensure that at least one reward function returns a valid reward.",
                len(unscored),
                len(rewards_BF),
                shown,
            )


def _check_arguments(func: RewardFunc, name: str, passed: Mapping[str, Any]) -> None:
    """A clear error where the function does not take what every reward function is passed, before it is called."""
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):
        return  # a builtin without a signature: its own error will do
    try:
        signature.bind(**passed)
    except TypeError as error:
        raise RewardError(
            name,
            f"does not fit what it is passed ({', '.join(passed)}): {error}; take **kwargs, and check that the data "
            "set has the columns that it names",
        ) from error


def _unique(names: list[str]) -> list[str]:
    """Names under which metrics do not mix: the second `f` becomes `f_2`."""
    seen: set[str] = set()
    result = []
    for name in names:
        candidate, count = name, 1
        while candidate in seen or (count > 1 and candidate in names):
            count += 1
            candidate = f"{name}_{count}"
        seen.add(candidate)
        result.append(candidate)
    return result
