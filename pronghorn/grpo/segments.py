"""Sums and means over the tokens of each row, for tokens packed without padding."""

from __future__ import annotations

import torch


def row_sum(values_N: torch.Tensor, row_N: torch.Tensor, rows: int) -> torch.Tensor:
    """``[B]`` sums of ``values_N`` by ``row_N`` (int64 in [0, rows)); rows without tokens are 0. Differentiable."""
    return values_N.new_zeros(rows).index_add(0, row_N, values_N)


def row_count(row_N: torch.Tensor, rows: int) -> torch.Tensor:
    """``[B]`` int64 number of tokens of each row."""
    # Not bincount: it has the host wait for the largest row's number.
    return torch.zeros(rows, dtype=torch.int64, device=row_N.device).index_add_(0, row_N, torch.ones_like(row_N))


def row_mean(values_N: torch.Tensor, row_N: torch.Tensor, rows: int) -> torch.Tensor:
    """``[B]`` means of ``values_N`` by row; rows without tokens are 0. Differentiable."""
    return row_sum(values_N, row_N, rows) / row_count(row_N, rows).clamp(min=1)
