"""One call of one reward function: what it is passed, whether it takes that, and what it gave back.

Imports no torch: it also runs in workers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from .errors import RewardError

RewardFunc = Callable[..., Any]
Rows = dict[str, Any]
"""Keyword arguments with one value a completion: `prompts`, `completions`, `completion_ids`, data set columns."""

RESERVED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
EXTRAS = ("trainer_state", "log_extra", "log_metric")
"""Keyword arguments that are not rows."""


class CallFailed(Exception):
    """A call gave no rewards at all. `kind` tells one failure from another: an exception's type, "timeout", "death"."""

    def __init__(self, kind: str, problem: str, cause: BaseException | None = None) -> None:
        super().__init__(problem)
        self.kind, self.problem, self.cause = kind, problem, cause

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.kind, self.problem, self.cause)


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


def no_log(*_: Any) -> None:
    """Stands in for `log_extra` and `log_metric` where nobody listens."""


def call(func: RewardFunc, rows: Rows, extras: Mapping[str, Any], run: Callable[[Coroutine], Any]) -> Any:
    """What `func` returned, a coroutine awaited by `run` and a generator run to its end.

    Raises:
        CallFailed: it raised; `cause` is what. An interrupt is no failure of the function and goes through.
    """
    try:
        returned = func(**rows, **extras)
        if inspect.iscoroutine(returned):
            returned = run(returned)
        # A generator runs here, so what it raises is the function's too.
        return list(returned) if inspect.isgenerator(returned) else returned
    except Exception as error:
        raise raised(error) from error


def raised(error: Exception) -> CallFailed:
    """The failure of a call that raised `error`."""
    return CallFailed(type(error).__name__, f"raised {type(error).__name__}: {error}", error)


def check_arguments(func: RewardFunc, name: str, passed: Mapping[str, Any]) -> None:
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
