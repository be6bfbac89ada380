"""What becomes of a completion whose reward function failed, and how the completion at fault is found."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from ..config.errors import ConfigError
from .calling import CallFailed, Rows
from .errors import RewardError

OnError = Literal["raise", "nan", "zero"]
POLICIES: tuple[OnError, ...] = ("raise", "nan", "zero")

SEARCH_SECONDS = 5.0
"""How long rows are tried alone in the process, where no `timeout` says it."""


@dataclass
class Scored:
    """B rewards (NaN: abstained, or failed) and, under `nan` and `zero`, the rows that failed with what they did."""

    values: list[float]
    faults: dict[int, RewardError] = field(default_factory=dict)


Attempt = Callable[[Rows, bool], Scored]
"""`attempt(rows, alone)`: one call. `alone` is one row of a batch that failed before: it must not log.

Raises `CallFailed`, or `RewardError` for what no policy forgives (another length, arguments that do not fit).
"""


def check_policy(field_name: str, on_error: str) -> None:
    """Raises `ConfigError` for a policy that does not exist."""
    if on_error not in POLICIES:
        raise ConfigError(f"{field_name}={on_error!r} is unknown; give {' or '.join(map(repr, POLICIES))}")


def score_rows(name: str, attempt: Attempt, rows: Rows, on_error: OnError, search_seconds: float) -> Scored:
    """The rewards of all rows by one call; where that fails, each row is tried alone.

    `raise`: the first row that fails alone as the batch did is named. Otherwise the rows that work alone keep their
    reward, and those that fail, or are not reached within `search_seconds`, are in `faults`.
    """
    try:
        return attempt(rows, False)
    except CallFailed as failed:
        return _each_alone(name, attempt, rows, on_error, search_seconds, failed)


def _each_alone(
    name: str, attempt: Attempt, rows: Rows, on_error: OnError, search_seconds: float, failed: CallFailed
) -> Scored:
    completions = rows["completions"]
    give_up = time.monotonic() + search_seconds
    scored = Scored([math.nan] * len(completions))
    for row in range(len(completions)):
        if time.monotonic() > give_up:
            if on_error == "raise":
                given_up = f"{failed.problem} (looking for the row was given up after {row} rows)"
                raise RewardError(name, given_up) from failed.cause
            late = f"not tried alone: the batch {failed.problem}, and the time for trying rows was over"
            scored.faults.update({r: RewardError(name, late, r, completions[r]) for r in range(row, len(completions))})
            break
        try:
            alone = attempt({key: column[row : row + 1] for key, column in rows.items()}, True)
        except CallFailed as problem:
            fault = RewardError(name, problem.problem, row, completions[row])
            fault.__cause__ = problem.cause
            # Under `raise` a row that fails in another way is not what broke the batch.
            if on_error == "raise" and problem.kind == failed.kind:
                raise fault from problem.cause
            scored.faults[row] = fault
        else:
            scored.values[row] = alone.values[0]
            if alone.faults:
                scored.faults[row] = RewardError(name, alone.faults[0].problem, row, completions[row])
    if on_error == "raise":
        raise RewardError(name, f"{failed.problem} (on the batch; on no row alone)") from failed.cause
    return scored


def first_fault(faults: dict[int, RewardError]) -> str:
    """The first fault in words, for a warning."""
    return str(faults[min(faults)]) if faults else ""


def shifted(fault: RewardError, offset: int, completions: Any) -> RewardError:
    """The same fault of row `row + offset`: a part of the batch that a worker scored knows its own rows only."""
    if fault.row is None or offset == 0:
        return fault
    moved = RewardError(fault.function, fault.problem, fault.row + offset, completions[fault.row + offset])
    moved.__cause__ = fault.__cause__
    return moved
