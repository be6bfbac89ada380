"""A layer's linear products as a decode step runs them, on the trainer's own weights and rounded adapters.

Few rows of a 4-bit group go through one kernel that reads the codes once (``kernels/nf4_matmul.py``). Everything else
(16-bit bases, many rows) is the trainer's own product. Either way the sum has the trainer's order.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ...kernels.low_rank import low_rank
from ...kernels.nf4_matmul import MAX_ROWS, Member, nf4_matmul, why_not
from ...lora.fused import Input, project
from ...lora.projection import Group

_STEP = 16  # columns of one matrix instruction: an adapter's ranks are multiplied in whole ones


class Product(Protocol):
    """``product(x_MI) -> y_MO`` of one group; ``refresh`` after the adapters were rounded anew."""

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor: ...

    def refresh(self) -> None: ...


class NF4Product:
    """A group of 4-bit projections for at most 64 rows.

    An adapter's columns are read where they stand in ``x A^T`` of the whole group, in whole steps of 16: the trainer
    multiplies all of them by ``[W | s B]``, whose zeros change no sum.
    """

    def __init__(self, group: Group, dtype: torch.dtype) -> None:
        self.group = group
        self._scaled: list[tuple[torch.Tensor, torch.Tensor, float]] = []  # s B, B, s: those that are not B itself
        self.members: list[Member] = []
        for p, b_Or, span in zip(group.members, group.bs_Or, group.spans):
            assert p.nf4 is not None
            bias_O = None if p.base.bias is None else p.base.bias.detach().to(dtype)
            if b_Or is None:
                self.members.append(Member(p.nf4, None, 0, bias_O))
                continue
            first, last = span.start // _STEP * _STEP, -(-span.stop // _STEP) * _STEP
            table = b_Or
            if (first, last) != (span.start, span.stop) or p.scaling != 1.0:
                table = b_Or.new_zeros(b_Or.shape[0], last - first)
                self._scaled.append((table[:, span.start - first : span.stop - first], b_Or, p.scaling))
            self.members.append(Member(p.nf4, table, first, bias_O))
        self.columns = -(-group.rank // _STEP) * _STEP
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        for place, b_Or, scaling in self._scaled:
            torch.mul(b_Or, scaling, out=place)

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor:
        low_MR = None
        if self.group.a_RI is not None:
            R = self.group.rank
            # Columns beyond R meet zeros of B, and must be numbers.
            low_MR = x_MI.new_zeros(x_MI.shape[0], self.columns) if self.columns > R else None
            if low_MR is None:
                low_MR = low_rank(x_MI, self.group.a_RI)
            else:
                low_rank(x_MI, self.group.a_RI, low_MR[:, :R])
        return nf4_matmul(x_MI, self.members, low_MR)


class TrainerProduct:
    """The trainer's product, its sum in order whatever the number of rows."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def refresh(self) -> None:
        """Nothing: it reads the rounded adapters themselves."""

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor:
        given = Input(self.group, rows=x_MI.shape[0], like=x_MI)
        given.x_TI.copy_(x_MI)
        return project(given, self.group, given.lower(self.group, None, x_MI.is_cuda), ordered=x_MI.is_cuda)


def product_of(group: Group, dtype: torch.dtype, rows: int) -> Product:
    """How ``group`` multiplies ``rows`` rows."""
    weights = [p.nf4 for p in group.members if p.nf4 is not None]
    if rows > MAX_ROWS or len(weights) < len(group.members):
        return TrainerProduct(group)
    device = weights[0].codes.device
    if device.type != "cuda" or why_not(weights, dtype, device):
        return TrainerProduct(group)
    return NF4Product(group, dtype)
