"""Merging two partial attentions, and adding rows, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from pronghorn.kernels.spans import on_device

Sum = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""``(x_THE, part_NHE, index_N)``: rows of ``part`` to be added to these rows of x."""


class Copies:
    """U rows that are copies of T tokens, each token's at least one.

    Args:
        tokens_U: int64 on the host: which token each row is a copy of.
        T: tokens.
        device: where :attr:`index`, :attr:`places` and :attr:`starts` lie.
    """

    def __init__(self, tokens_U: torch.Tensor, T: int, device: torch.device) -> None:
        self.tokens_U, self.T, self.device = tokens_U, T, device

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 ``[U]``: the token of each row."""
        return on_device(self.tokens_U, torch.int64, self.device)

    @cached_property
    def places(self) -> torch.Tensor:
        """int32 ``[U]``: the rows of token 0, those of token 1, and so on, each token's in order."""
        return on_device(self.tokens_U.argsort(stable=True), torch.int32, self.device)

    @cached_property
    def starts(self) -> torch.Tensor:
        """int32 ``[T + 1]``: where each token's rows begin among :attr:`places`, and the end."""
        counts = torch.bincount(self.tokens_U, minlength=self.T)
        return on_device(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), torch.int32, self.device)


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


def add_rows_(sums: Sequence[Sum]) -> None:
    """See :func:`pronghorn.kernels.attention_merge.add_rows_`."""
    for x_THE, part_NHE, index_N in sums:
        x_THE.index_add_(0, index_N, part_NHE)


def sum_copies(dk_UKE: torch.Tensor, dv_UKE: torch.Tensor, copies: Copies) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`pronghorn.kernels.attention_merge.sum_copies`."""
    wide = torch.promote_types(dk_UKE.dtype, torch.float32)
    sums = [
        d.new_zeros(copies.T, *d.shape[1:], dtype=wide).index_add_(0, copies.index, d.to(wide))
        for d in (dk_UKE, dv_UKE)
    ]
    return sums[0].to(dk_UKE.dtype), sums[1].to(dk_UKE.dtype)
