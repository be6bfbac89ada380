"""Merging two partial attentions, and adding rows, in plain PyTorch."""

from __future__ import annotations

import torch


def merge_(
    o_THE: torch.Tensor, lse_HT: torch.Tensor, part_NHE: torch.Tensor, lse_HN: torch.Tensor, index_N: torch.Tensor
) -> None:
    """See :func:`pronghorn.kernels.attention_merge.merge_`."""
    own_HN = lse_HT.index_select(1, index_N)
    both_HN = torch.logaddexp(own_HN, lse_HN)
    own_NH1, part_NH1 = ((x - both_HN).exp().t().unsqueeze(-1) for x in (own_HN, lse_HN))
    merged = o_THE.index_select(0, index_N) * own_NH1 + part_NHE * part_NH1
    o_THE.index_copy_(0, index_N, merged.to(o_THE.dtype))
    lse_HT.index_copy_(1, index_N, both_HN)


def add_rows_(x_THE: torch.Tensor, part_NHE: torch.Tensor, index_N: torch.Tensor) -> None:
    """See :func:`pronghorn.kernels.attention_merge.add_rows_`."""
    x_THE.index_add_(0, index_N, part_NHE)
