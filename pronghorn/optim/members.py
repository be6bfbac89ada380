"""Which trained tensors the one kernel steps, and the tables in which it finds them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..kernels.adamw8bit import DTYPES, Rule, Slot, Table, table

STATES = ("state1", "state2", "absmax1", "absmax2")


@dataclass(eq=False, slots=True)
class Bucket:
    """Tensors of one device and dtype that step together, and what they do in the step that is being gathered."""

    levels: tuple[torch.Tensor, torch.Tensor]
    slots: list[Slot] = field(default_factory=list)
    gradients: list[torch.Tensor | None] = field(default_factory=list)
    which: list[int] = field(default_factory=list)
    table: Table | None = None

    def add(self, slot: Slot) -> int:
        """Append a slot; its number."""
        self.slots.append(slot)
        self.gradients.append(None)
        self.which.append(0)
        return len(self.slots) - 1

    def launch(self, rules: list[Rule]) -> None:
        """Step what was gathered, and forget it."""
        if self.table is None:
            self.table = table(self.slots, *self.levels)
        if any(gradient is not None for gradient in self.gradients):
            self.table.step(self.gradients, self.which, rules)
        self.gradients = [None] * len(self.slots)


@dataclass(eq=False, slots=True)
class Member:
    """A tensor with its state and its place in a bucket, and what must still hold for that place to be right."""

    param: torch.Tensor
    state: dict[str, Any]
    bucket: Bucket
    number: int
    address: int

    def holds(self) -> bool:
        """Whether parameter and state are still the memory that the bucket's table points to."""
        slot = self.bucket.slots[self.number]
        return self.param.data_ptr() == self.address and all(self.state[name] is getattr(slot, name) for name in STATES)


def takes(param: torch.Tensor, state: dict[str, Any]) -> bool:
    """Whether the one kernel can step this tensor: on a GPU, dense and aligned, 8-bit state within the GPU's reach."""
    state1 = state.get("state1")
    if not on_gpu(param) or param.dtype not in DTYPES or state1 is None or state1.dtype != torch.uint8:
        return False
    tensors = [param, *(state[name] for name in STATES)]
    reach = all(t.device == param.device or getattr(t, "is_paged", False) for t in tensors)
    return reach and param.numel() > 0 and all(t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)


def on_gpu(param: torch.Tensor) -> bool:
    """Whether this is a tensor that the kernel could reach."""
    return param.is_cuda


def fits(gradient: torch.Tensor, param: torch.Tensor) -> bool:
    """Whether a gradient can be read as it lies: dense, in the parameter's dtype, aligned."""
    return (
        gradient.dtype == param.dtype
        and gradient.layout == torch.strided
        and gradient.is_contiguous()
        and gradient.data_ptr() % 16 == 0
    )
