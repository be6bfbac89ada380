"""``x A^T`` summed in runs, in plain PyTorch."""

from __future__ import annotations

import torch

SPLITS = 8
"""Runs that the inputs are cut into."""


def run_length(inputs: int) -> int:
    """Inputs of one run: a multiple of 64."""
    return -(-inputs // (64 * SPLITS)) * 64


def low_rank(x_TI: torch.Tensor, a_RI: torch.Tensor, out_TR: torch.Tensor, also_TR: torch.Tensor | None = None) -> None:
    """See :func:`pronghorn.kernels.low_rank.low_rank`; what a matrix product sums in a run is in its own order."""
    wide = torch.promote_types(x_TI.dtype, torch.float32)
    step = run_length(x_TI.shape[1])
    total_TR = torch.zeros(out_TR.shape, dtype=wide, device=x_TI.device)
    for start in range(0, x_TI.shape[1], step):
        run = slice(start, start + step)
        total_TR += x_TI[:, run].to(wide) @ a_RI[:, run].to(wide).T
    out_TR.copy_(total_TR)
    if also_TR is not None:
        also_TR.copy_(total_TR)
