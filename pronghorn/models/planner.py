"""The plan of a live model's training steps: made once for each size of step, from the memory that was free then."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .keep import Keep
from .parts import held_bytes
from .plan.budget import Budget, gpu_budget, host_budget
from .plan.card import card_of
from .plan.choose import CannotFit, choose
from .plan.constants import UNKNOWN_OPTIMIZER_BYTES
from .plan.plan import LayerPlan, TrainingPlan
from .plan.read import read_shape
from .plan.shape import ModelShape
from .tree import layers, unwrap


class Planner:
    """Makes the plans of one model and remembers them, so that two steps of a size run alike.

    Attributes:
        mode: "auto", "memory" or "off".
        current: the plan of the step that runs, or ran last.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.current: TrainingPlan | None = None
        self._plans: dict[tuple[int, int], TrainingPlan] = {}
        self._said: set[object] = set()
        self._first_allocated: int | None = None

    def plan(self, model: nn.Module, row_lengths: Sequence[int]) -> TrainingPlan:
        """The plan of a step over rows of these lengths; a new one is said in a line."""
        tokens = max(sum(row_lengths), 1)
        length = sum(n * n for n in row_lengths) / tokens
        size = (_rounded_up(tokens, 4), _rounded_up(round(length), 2))
        if size not in self._plans:
            self._plans[size] = self._new(model, *size)
        self.current = self._plans[size]
        if self.current.card and self.current.choice not in self._said:
            self._said.add(self.current.choice)
            print(self.current.line(), flush=True)
        return self.current

    def _new(self, model: nn.Module, tokens: int, length: int) -> TrainingPlan:
        device = unwrap(model).device
        if device.type != "cuda":
            return TrainingPlan((on_cpu(self.mode),) * len(layers(model)), tokens=tokens, mode=self.mode)
        shape, budget = read_shape(model), gpu_budget(device)
        if self._first_allocated is None:
            self._first_allocated = budget.allocated
        held = self._held(model, budget)
        room = budget.peak - self._optimizer_to_come(shape, budget)
        card = card_of(torch.cuda.get_device_properties(device))
        try:
            return choose(shape, card, tokens, length, room, host_budget(), self.mode, held, budget.limit)
        except CannotFit as none:
            return none.smallest

    def _held(self, model: nn.Module, budget: Budget) -> int:
        """What lies on the GPU before a step, apart from gradients and from what this plan decides."""
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        return max(budget.allocated - gradients - held_bytes(layers(model)), 0)

    def _optimizer_to_come(self, shape: ModelShape, budget: Budget) -> int:
        """Bytes to leave for optimizer state and gradients held over micro-batches, which may not be there yet."""
        seen = budget.allocated - (self._first_allocated or 0) >= shape.trained
        return shape.trained_bytes + (0 if seen else UNKNOWN_OPTIMIZER_BYTES * shape.trained)


def on_cpu(mode: str) -> LayerPlan:
    """The CPU has one memory, and no budget of it is known: only "memory" recomputes."""
    return LayerPlan(Keep.INPUT if mode == "memory" else Keep.ALL)


def _rounded_up(n: int, digits: int) -> int:
    """``n`` rounded up to ``digits`` binary digits after its first: at most ``2**-digits`` more."""
    step = 1 << max(n.bit_length() - 1 - digits, 0)
    return -(-n // step) * step
