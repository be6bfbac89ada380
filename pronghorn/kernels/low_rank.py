r"""``x A^T`` of a group's adapters, with a sum whose order depends on the number of inputs alone.

The I inputs are cut into :data:`SPLITS` runs of equal length (the last may be shorter). A run's products are summed in
order, 16 at a time, in one float32 accumulator; the runs' sums are added one after another, from the first; the result
is rounded once. A matrix library splits such a narrow product differently for each number of rows, so a sampler's 6
rows and a trainer's thousands would differ in their last bits.

Few rows, or few ranks of up to 4,096 rows: every run is a program of its own, and the last to finish adds the sums up.
Else one program takes all runs of its rows. Thousands of rows go another way on Hopper (``low_rank_cuda.py``). The bits
are the same.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pronghorn.kernels.reference import low_rank as reference
from pronghorn.kernels.reference.low_rank import SPLITS, run_length

__all__ = ["FEW_ROWS", "SPLITS", "low_rank", "run_length"]

FEW_ROWS = 256
"""Up to so many rows, whatever the ranks, runs are programs of their own: their sums are written, and read again."""


def _path(x_TI: torch.Tensor, a_RI: torch.Tensor, *outs: torch.Tensor | None) -> ModuleType:
    """The module that does the work for ``x_TI``; Triton is imported only where it is used."""
    if not x_TI.is_cuda or x_TI.dtype not in (torch.bfloat16, torch.float16):
        return reference
    from pronghorn.kernels import low_rank_cuda, low_rank_triton

    if low_rank_cuda.takes(x_TI, a_RI, *outs):
        return low_rank_cuda

    return low_rank_triton


def low_rank(
    x_TI: torch.Tensor,
    a_RI: torch.Tensor,
    out_TR: torch.Tensor | None = None,
    also_TR: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x @ a^T`` in x's dtype; no gradient.

    Args:
        x_TI: rows contiguous, any distance apart.
        a_RI: the adapters' A, one under another, x's dtype, contiguous. In a chain of launches it is fetched before the
            kernels before have ended, so none of them writes it.
        out_TR: where to write, rows contiguous; made where None.
        also_TR: where to write it once more.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    (T, I), R = x_TI.shape, a_RI.shape[0]  # noqa: E741 - shape letters
    if a_RI.shape[1] != I or a_RI.dtype != x_TI.dtype or x_TI.stride(1) != 1 or not a_RI.is_contiguous():
        raise ValueError(
            f"a is {tuple(a_RI.shape)}, {a_RI.dtype} for x of {tuple(x_TI.shape)}, {x_TI.dtype}; "
            "give [R, I] and contiguous rows of one dtype"
        )
    if out_TR is None:
        out_TR = x_TI.new_empty(T, R)
    for out in (out_TR, also_TR):
        if out is not None and (out.shape != (T, R) or out.dtype != x_TI.dtype or out.stride(1) != 1):
            raise ValueError(f"out is {tuple(out.shape)}, {out.dtype}; give {(T, R)}, {x_TI.dtype}, rows contiguous")
    _path(x_TI, a_RI, out_TR, also_TR).low_rank(x_TI, a_RI, out_TR, also_TR)
    return out_TR
