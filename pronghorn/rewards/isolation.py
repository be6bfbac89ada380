"""`isolated(func)`: a reward function that runs in worker processes and cannot take the training run down."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from ..config.errors import ConfigError
from .calling import RewardFunc, name_of, no_log
from .carry import pack
from .policy import OnError, Scored, check_policy
from .pool import PendingCall, WorkerPool

TIMEOUT = 60.0
"""Seconds that a call on a batch may take, unless the caller says otherwise."""


class IsolatedReward:
    """A reward function in `workers` processes of its own; made by `isolated`.

    Also a plain reward function: calling it scores a batch and waits. Processes start at the first call, or at
    `prepare`; `close` ends them, and the next call starts new ones.
    """

    def __init__(self, func: RewardFunc, timeout: float, on_error: OnError, workers: int, name: str | None) -> None:
        if isinstance(func, IsolatedReward) or not callable(func):
            raise ConfigError(f"isolated() got a {type(func).__name__}; give it a plain reward function")
        if not timeout > 0:
            raise ConfigError(f"isolated(): timeout={timeout} is out of range; give seconds above 0")
        if workers < 1:
            raise ConfigError(f"isolated(): workers={workers} is out of range; give 1 or more")
        check_policy("isolated(): on_error", on_error)
        self.func, self.on_error = func, on_error
        self.__name__ = name or name_of(func)
        self.pool = WorkerPool(self.__name__, pack(func, self.__name__), float(timeout), on_error, workers)
        functools.update_wrapper(self, func, assigned=("__doc__",), updated=())

    def prepare(self) -> None:
        """Starts the workers in the background."""
        self.pool.prepare()

    def submit(self, rows: dict[str, Any], state: Any = None) -> PendingCall:
        """Starts scoring `rows` (`prompts`, `completions`, `completion_ids` and columns)."""
        return self.pool.submit(rows, state)

    def __call__(
        self,
        *,
        trainer_state: Any = None,
        log_extra: Callable[..., Any] = no_log,
        log_metric: Callable[..., Any] = no_log,
        **rows: Any,
    ) -> list[float | None]:
        """TRL's contract: one number or None a completion. A failing row is None under `nan`, 0.0 under `zero`."""
        try:
            scored = self.submit(rows, trainer_state).result(log_extra, log_metric)
        except BaseException:
            self.close()
            raise
        return [None if v != v else v for v in with_zeros(scored, self.on_error)]

    def close(self) -> None:
        """Ends the workers and what they started."""
        self.pool.close()


def isolated(
    func: RewardFunc,
    *,
    timeout: float = TIMEOUT,
    on_error: OnError = "raise",
    workers: int = 1,
    name: str | None = None,
) -> IsolatedReward:
    """Let `func` run in worker processes: it may hang, crash or raise without taking the run down.

    Args:
        func: a reward function of TRL's contract, also a lambda, a closure or one defined in a notebook; it, and what
            it reads, is copied to the workers as it is now.
        timeout: seconds that one call on a batch may take; then the worker and all that it started are killed. Where a
            batch fails, its rows are tried alone, each for half of `timeout`, all of them for twice `timeout`; what
            was not reached then counts as failed.
        on_error: of a row that fails: `"raise"` a `RewardError`; `"nan"` gives the completion no reward and no
            advantage; `"zero"` gives it 0.0 from this function.
        workers: processes. With more than one each gets a part of the batch: not for functions that compare
            completions with each other.
        name: under which it is logged; by default the function's.

    Raises:
        ConfigError: a value out of range, or a function that cannot travel to another process.
    """
    return IsolatedReward(func, timeout, on_error, workers, name)


def with_zeros(scored: Scored, on_error: OnError) -> list[float]:
    """The rewards, with 0.0 for the rows that failed under `zero`."""
    if on_error != "zero":
        return scored.values
    return [0.0 if row in scored.faults else value for row, value in enumerate(scored.values)]
