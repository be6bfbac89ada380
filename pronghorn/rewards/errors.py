"""The error of a reward function."""

from __future__ import annotations

from typing import Any

_SHOWN = 400


class RewardError(RuntimeError):
    """A reward function raised, or returned what is not a reward.

    Attributes: `function` (its name), `row` (of the batch; None where the fault is of no row in particular) and
    `completion` (of that row, whole; None without a row). The message names all three, the completion cut to 400
    characters.
    """

    def __init__(self, function: str, problem: str, row: int | None = None, completion: Any = None) -> None:
        self.function = function
        self.problem = problem
        self.row = row
        self.completion = completion
        where = f"reward function {function!r}" + ("" if row is None else f", row {row}")
        shown = repr(completion)
        tail = (
            "" if row is None else f"\ncompletion of row {row}: {shown[:_SHOWN]}{'...' if len(shown) > _SHOWN else ''}"
        )
        super().__init__(f"{where}: {problem}{tail}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self.problem, self.row, self.completion)
