"""One generation in the making: rows, what was sampled for them, and what the reward functions said of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .rollouts import Rollout


@dataclass
class Generation:
    """B completions in groups of ``group``, one group a prompt.

    Attributes:
        rows: the data set's row of each completion.
        rollouts: what was sampled.
        completions: each in words: a string, or the messages that answer a chat.
        group: completions of each prompt.
        columns: further columns for the reward functions, one value a completion.
        rewards_BF: float32, NaN where a function abstained; None until scored.
        extra: what reward functions logged for the sample table, by column.
        logged: what happened on the way as ``(metric, value, weight)``, to be averaged when the generation is used.
    """

    rows: list[dict[str, Any]]
    rollouts: list[Rollout]
    completions: list[Any]
    group: int
    columns: dict[str, list[Any]] = field(default_factory=dict)
    rewards_BF: torch.Tensor | None = None
    extra: dict[str, list[Any]] = field(default_factory=dict)
    logged: list[tuple[str, float, float]] = field(default_factory=list)

    def copy(self) -> Generation:
        """Lists of its own, of the same rollouts: what is drawn in addition leaves this one as it is."""
        return replace(
            self, rows=[*self.rows], rollouts=[*self.rollouts], completions=[*self.completions],
            columns={name: [*values] for name, values in self.columns.items()},
            extra={name: [*values] for name, values in self.extra.items()}, logged=[*self.logged],
        )  # fmt: skip

    @property
    def groups(self) -> int:
        return len(self.rollouts) // self.group

    @property
    def rewards(self) -> torch.Tensor:
        if self.rewards_BF is None:
            raise RuntimeError("rewards_BF=None: the generation is not scored yet")
        return self.rewards_BF

    def indices(self, groups: Sequence[int]) -> list[int]:
        """The completions of these groups."""
        return [g * self.group + i for g in groups for i in range(self.group)]

    def note(self, name: str, value: Any, weight: float = 1.0) -> None:
        """Keep one value for the metrics."""
        self.logged.append((name, float(value), float(weight)))

    def to_state(self) -> dict[str, Any]:
        """What a checkpoint holds of a scored generation besides its rows, in plain types and tensors."""
        return {
            "rollouts": [r.to_state() for r in self.rollouts],
            "completions": self.completions,
            "group": self.group,
            "rewards_BF": self.rewards,
            "extra": {name: [_plain(value) for value in values] for name, values in self.extra.items()},
            "logged": self.logged,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], rows: list[dict[str, Any]]) -> Generation:
        rollouts = [Rollout.from_state(r) for r in state["rollouts"]]
        return cls(rows, **{**state, "rollouts": rollouts})

    def extend(self, other: Generation) -> None:
        """Add the groups of ``other``, scored as these are."""
        before, more = len(self.rollouts), len(other.rollouts)
        self.rewards_BF = torch.cat([self.rewards, other.rewards])
        self.rows += other.rows
        self.rollouts += other.rollouts
        self.completions += other.completions
        self.logged += other.logged
        for name in dict.fromkeys([*self.extra, *other.extra]):
            own = self.extra.get(name, [])
            own = (own + [None] * before)[:before]
            self.extra[name] = own + (other.extra.get(name, []) + [None] * more)[:more]


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
