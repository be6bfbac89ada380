"""What the products of few rows with a group's weights (``nf4_matmul.py``, ``ordered_matmul.py``) ask of arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

MEMBERS = 3
"""Projections of one group at most."""

HOPPER_PROCESSORS = 132
"""Multiprocessors of an H100 or H200."""

_ALIGNED = 8  # elements of 16 bits in 16 bytes


class Adapted(Protocol):
    """A member of a group: an adapter's B, ``[O, r]``, and the first of its r columns of ``low_MR``."""

    @property
    def b_Or(self) -> torch.Tensor | None: ...

    @property
    def at(self) -> int: ...


def output(x_MI: torch.Tensor, outputs: int, out_MO: torch.Tensor | None) -> torch.Tensor:
    """``out_MO``, or a new tensor where none is given.

    Raises:
        ValueError: it is not ``[M, outputs]`` of x's dtype with contiguous rows.
    """
    shape = (x_MI.shape[0], outputs)
    if out_MO is None:
        return torch.empty(shape, dtype=x_MI.dtype, device=x_MI.device)
    if out_MO.shape != shape or out_MO.dtype != x_MI.dtype or out_MO.stride(1) != 1:
        raise ValueError(
            f"out is {tuple(out_MO.shape)}, {out_MO.dtype}, strides {out_MO.stride()}; "
            f"give {shape}, {x_MI.dtype}, rows contiguous"
        )
    return out_MO


def check_member(x_MI: torch.Tensor, shape_OI: Sequence[int], member: Adapted, low_MR: torch.Tensor | None) -> None:
    """Raises ValueError where x, or the adapter, does not fit a weight of ``shape_OI``."""
    if x_MI.dim() != 2 or x_MI.stride(1) != 1 or x_MI.shape[1] != shape_OI[1]:
        raise ValueError(
            f"x is {tuple(x_MI.shape)}, strides {x_MI.stride()}, for a weight of {tuple(shape_OI)}; "
            "give [M, I] with contiguous rows"
        )
    b_Or, at = member.b_Or, member.at
    if b_Or is None:
        return
    O, r = shape_OI[0], b_Or.shape[1]  # noqa: E741 - shape letters
    if low_MR is None or low_MR.shape[0] != x_MI.shape[0] or at + r > low_MR.shape[1] or low_MR.stride(1) != 1:
        found = None if low_MR is None else tuple(low_MR.shape)
        raise ValueError(f"low is {found} for an adapter on columns {at} to {at + r}; give x A^T, [M, R]")
    if b_Or.shape[0] != O or not b_Or.is_contiguous() or not b_Or.dtype == low_MR.dtype == x_MI.dtype:
        raise ValueError(
            f"b is {tuple(b_Or.shape)}, {b_Or.dtype} and low {low_MR.dtype} for {O} outputs of {x_MI.dtype}; "
            "give [O, r], contiguous, and one dtype"
        )


def check_aligned(x_MI: torch.Tensor) -> None:
    """Raises ValueError where a row of x does not begin at 16 bytes."""
    if x_MI.data_ptr() % 16 or x_MI.stride(0) % _ALIGNED:
        raise ValueError(f"x lies at {x_MI.data_ptr()}, rows {x_MI.stride(0)} apart; align rows to 16 bytes")
