"""What a run must remember besides model, optimizer and generators, to go on exactly where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from .generators import Generators
from .rollouts import Rollout

FILE = "grpo_state.pt"


@dataclass
class RunState:
    """The position within the data and the generation.

    Attributes:
        micro_steps: micro-batches trained so far: the sampler's cursor.
        buffer: rollouts of the current generation, while micro-batches are still to be taken from it.
        metrics: what was gathered since the last log.
        cursor: the settings that place the cursor within the data.
        entropy: the entropy bonus's coefficient and the entropy it goes by.
        parts: states of the parts that have one, by name (:class:`~pronghorn.grpo.stateful.StatefulParts`).
    """

    micro_steps: int = 0
    buffer: list[Rollout] = field(default_factory=list)
    metrics: dict[str, list[Any]] = field(default_factory=dict)
    cursor: dict[str, Any] = field(default_factory=dict)
    entropy: dict[str, float] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: str | Path) -> None:
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        state["buffer"] = [rollout.to_state() for rollout in self.buffer]
        torch.save(state, Path(folder) / FILE)

    @classmethod
    def load(cls, folder: str | Path) -> RunState:
        state = torch.load(Path(folder) / FILE, weights_only=True)
        return cls(**{**state, "buffer": [Rollout.from_state(rollout) for rollout in state["buffer"]]})


@dataclass(frozen=True)
class StepStart:
    """What an optimizer step changes before the optimizer moves, as it was when the step began.

    Weights, optimizer and schedule do not move before then, so a run that is stopped within a step is saved as it stood
    at the step's start, and the resumed one does the whole step again, bit for bit.
    """

    position: RunState  # without its parts
    parts: Callable[[], dict[str, Any]]
    tokens_seen: int
    generators: Generators
