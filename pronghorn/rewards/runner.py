"""Calls the reward functions as TRL does, and names the function and the row when one is at fault.

The contract is TRL's (1.15 and 1.16): every function gets the keyword arguments `prompts`, `completions`,
`completion_ids`, each column of the data set, `trainer_state`, `log_extra` and `log_metric`, and returns one number or
None a completion; async functions run together. Unlike TRL, nothing that is not a reward gets through, and functions
may run in workers.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch

from ..config.errors import ConfigError
from .calling import RESERVED, RewardFunc, Rows, call, check_arguments, is_async, name_of, no_log, raised
from .isolation import TIMEOUT, IsolatedReward, isolated, with_zeros
from .loop import BackgroundLoop
from .policy import SEARCH_SECONDS, OnError, Scored, check_policy, first_fault, score_rows
from .pool import PendingCall
from .reward_model import RewardModel
from .values import as_rewards

logger = logging.getLogger("pronghorn")

# Columns that TRL takes as the prompt and what answers it, and does not pass on.
_NOT_PASSED = ("prompt", "completion", "completion_ids")


class RewardRunner:
    """The F reward functions of a run.

    Args:
        reward_funcs: functions, some of them perhaps `isolated` with settings of their own.
        names: under which they are logged; by default their own.
        weights: of each in the sum; by default ones.
        workers: 0 runs the functions that are not `isolated` in this process; else each of them gets so many workers.
            Reward models stay in this process.
        timeout: of those workers' calls, in seconds (default 60).
        on_error: of a row that fails, for the functions that are not `isolated`, wherever they run.

    Attributes: `names` (F, unique), `weights_F` (float32, default ones). Raises `ConfigError` for no functions, one
    that is not callable, is a bare reward model or cannot travel to a worker, names or weights of
    another number, and a timeout without workers.
    """

    def __init__(
        self,
        reward_funcs: RewardFunc | Sequence[RewardFunc],
        names: Sequence[str] | None = None,
        weights: Sequence[float] | None = None,
        *,
        workers: int = 0,
        timeout: float | None = None,
        on_error: OnError = "raise",
    ) -> None:
        self.funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs or ())
        if not self.funcs:
            raise ConfigError("reward_funcs is empty: give at least one function")
        for func in self.funcs:
            if isinstance(func, (str, torch.nn.Module)) or not callable(func):
                raise ConfigError(
                    f"reward_funcs has a {type(func).__name__}, which is not a plain callable: give a function of "
                    "(prompts, completions, **kwargs) that returns one number a completion (for a model: RewardModel)"
                )
        F = len(self.funcs)
        if names is not None and len(names) != F:
            raise ConfigError(f"names has {len(names)} entries for {F} reward functions: give one for each")
        if weights is not None and len(weights) != F:
            raise ConfigError(f"reward_weights has {len(weights)} entries for {F} reward functions: give one for each")
        check_policy("reward_on_error", on_error)
        if timeout is not None and not workers:
            raise ConfigError(
                f"reward_timeout={timeout} has no effect in the process, where nothing can be killed; set "
                "reward_workers=1, or wrap the function: isolated(func, timeout=...)"
            )
        self.names = _unique(list(names) if names is not None else [name_of(func) for func in self.funcs])
        self.weights_F = torch.tensor(list(weights) if weights is not None else [1.0] * F, dtype=torch.float32)
        if workers and all(isinstance(func, RewardModel) for func in self.funcs):
            raise ConfigError(
                f"reward_workers={workers} has no effect on reward models, which score in the trainer's process; leave "
                "it out"
            )
        if workers:
            seconds = TIMEOUT if timeout is None else timeout
            self.funcs = [
                func
                if isinstance(func, IsolatedReward | RewardModel)  # a model stays beside the trainer's, on its device
                else isolated(func, timeout=seconds, on_error=on_error, workers=workers, name=name)
                for func, name in zip(self.funcs, self.names)
            ]
        self.policies = [func.on_error if isinstance(func, IsolatedReward) else on_error for func in self.funcs]
        self._loop = BackgroundLoop()

    def prepare(self) -> None:
        """Starts workers that do not run yet, in the background: their imports pass while completions are made."""
        for func in self.funcs:
            if isinstance(func, IsolatedReward):
                func.prepare()

    def start(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]],
        state: Any = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
    ) -> PendingRewards:
        """Starts what runs elsewhere, isolated and async functions, all at once.

        To be used in a `with`, in which the caller is free until it asks for `result`: the functions in the process
        are called there, by its thread. Until then nothing that was passed may change. Leaving by an exception, or an
        interrupt, ends whatever runs.
        """
        B = len(prompts)
        passed = {name: list(column) for name, column in columns.items() if name not in _NOT_PASSED}
        for name, column in {**passed, "completions": completions, "completion_ids": completion_ids}.items():
            if name in RESERVED and name in passed:
                raise ConfigError(f"data set column {name!r} collides with what reward functions are passed: rename it")
            if len(column) != B:
                raise ConfigError(f"{name} has {len(column)} rows, but there are {B} prompts")
        rows = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **passed}
        extras = {"trainer_state": state, "log_extra": log_extra or no_log, "log_metric": log_metric or no_log}
        for func, name in zip(self.funcs, self.names):
            check_arguments(func.func if isinstance(func, IsolatedReward) else func, name, {**rows, **extras})
        return PendingRewards(self, rows, extras)

    def score(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Rewards of B completions: float32 [B, F] on the CPU, NaN where a function gave None.

        Takes what `start` takes; `columns` are the data set's, one value a completion. A row that fails under `nan` is
        NaN in all its columns: without one of its rewards it compares with no other. Raises `RewardError` (see
        `values.as_rewards`; also where a function raises, hangs, dies, or does not take the arguments), and
        `ConfigError` for columns of another length or with a name that the contract uses. A row for which every
        function gave None is warned of, as TRL does. Whatever is raised, nothing is left running.
        """
        with self.start(*args, **kwargs) as pending:
            return pending.result()

    def close(self) -> None:
        """Ends workers, and the thread that async functions run on; the next `score` starts new ones."""
        for func in self.funcs:
            if isinstance(func, IsolatedReward):
                func.close()
        self._loop.close()


class PendingRewards:
    """Rewards that are being computed: a context manager, made by `RewardRunner.start`."""

    def __init__(self, runner: RewardRunner, rows: Rows, extras: dict[str, Any]) -> None:
        self.runner, self.rows, self.extras = runner, rows, extras
        self._isolated: dict[int, PendingCall] = {}
        self._waiting = [f for f, func in enumerate(runner.funcs) if is_async(func)]
        self._async: Future[list[Any]] | None = None
        try:
            for f, func in enumerate(runner.funcs):
                if isinstance(func, IsolatedReward):
                    self._isolated[f] = func.submit(rows, extras["trainer_state"])
            if self._waiting:
                self._async = runner._loop.submit(self._together())
        except BaseException:
            runner.close()
            raise

    def __enter__(self) -> PendingRewards:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            self.runner.close()  # workers are killed, coroutines cancelled

    def result(self) -> torch.Tensor:
        """Calls the functions in the process, waits for the others; what `RewardRunner.score` says. Call it once."""
        F = len(self.runner.funcs)
        scored: dict[int, Scored] = {}
        for f in range(F):
            if f not in self._isolated and f not in self._waiting:
                scored[f] = self._in_process(f)
        if self._async is not None:
            for f, outcome in zip(self._waiting, self._async.result()):
                scored[f] = self._in_process(f, [outcome])
        for f, pending in self._isolated.items():
            scored[f] = pending.result(self.extras["log_extra"], self.extras["log_metric"])
        columns = [with_zeros(scored[f], self.runner.policies[f]) for f in range(F)]
        rewards_BF = torch.tensor(columns, dtype=torch.float32).T.contiguous()
        excused = self._tell_of_failures(scored)
        rewards_BF[sorted(excused)] = math.nan
        self._warn_of_unscored(rewards_BF, excused)
        return rewards_BF

    async def _together(self) -> list[Any]:
        """What the async functions returned or raised, in order; all are over when this returns."""
        funcs = [self.runner.funcs[f] for f in self._waiting]
        calls: list[Coroutine[Any, Any, Any]] = [func(**self.rows, **self.extras) for func in funcs]
        return await asyncio.gather(*calls, return_exceptions=True)

    def _in_process(self, f: int, outcome: list[Any] | None = None) -> Scored:
        """Scores by a function in this process; `outcome` holds what the call on the batch gave, where that was made.

        Rows that are tried alone do not log again.
        """
        func, name, on_error = self.runner.funcs[f], self.runner.names[f], self.runner.policies[f]
        quiet = {**self.extras, "log_extra": no_log, "log_metric": no_log}

        def attempt(rows: Rows, alone: bool) -> Scored:
            if outcome and not alone:
                returned = outcome[0]
                if isinstance(returned, Exception):
                    raise raised(returned) from returned
                if isinstance(returned, BaseException):
                    raise returned
            else:
                returned = call(func, rows, quiet if alone else self.extras, self.runner._loop.run)
            scored = Scored([])
            collected = None if on_error == "raise" else scored.faults
            scored.values = as_rewards(name, returned, rows["completions"], collected)
            return scored

        return score_rows(name, attempt, self.rows, on_error, SEARCH_SECONDS)

    def _tell_of_failures(self, scored: dict[int, Scored]) -> set[int]:
        """Warns of failed rows, counts them in `rewards/<name>/failed`; the rows that are to have no reward."""
        excused: set[int] = set()
        for f, name in enumerate(self.runner.names):
            on_error, faults = self.runner.policies[f], scored[f].faults
            if on_error == "raise":
                continue
            B = len(self.rows["completions"])
            self.extras["log_metric"](f"rewards/{name}/failed", len(faults) / B)
            if on_error == "nan":
                excused |= set(faults)
            if faults:
                becomes = "have no advantage" if on_error == "nan" else "get 0.0 from it"
                logger.warning(
                    "reward function %r failed for %d of %d completions, which %s; the first: %s",
                    name, len(faults), B, becomes, first_fault(faults),
                )  # fmt: skip
        return excused

    def _warn_of_unscored(self, rewards_BF: torch.Tensor, excused: set[int]) -> None:
        unscored = [row for row in rewards_BF.isnan().all(dim=1).nonzero().flatten().tolist() if row not in excused]
        if unscored:
            row = unscored[0]
            shown = {key: column[row] for key, column in self.rows.items()}
            logger.warning(
                "All reward functions returned None for %d of %d completions, the first with: %s\n"
                "Please ensure that at least one reward function returns a valid reward.",
                len(unscored),
                len(rewards_BF),
                shown,
            )


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
