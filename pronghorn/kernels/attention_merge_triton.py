"""The kernels behind :mod:`pronghorn.kernels.attention_merge`: one pass, float32 between load and store."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.reference.attention_merge import Copies, Sum

TILE = 4096
"""Elements of one program's tile: a few rows of one head."""


@triton.jit(do_not_specialize=["N", "T"])  # packed batches differ in length: one compilation serves all
def _merge(
    o_ptr, lse_ptr, part_ptr, part_lse_ptr, index_ptr, N, T,
    H: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    live = n < N
    row = tl.load(index_ptr + n, mask=live, other=0)
    own = tl.load(lse_ptr + h * T + row, mask=live, other=0.0)
    part = tl.load(part_lse_ptr + h * N + n, mask=live, other=0.0)
    high = tl.maximum(own, part)
    own_weight = tl.exp(own - high)
    part_weight = tl.exp(part - high)
    total = own_weight + part_weight
    mask = live[:, None] & (e < E)[None, :]
    o_at = o_ptr + ((row * H + h) * E)[:, None] + e[None, :]
    part_at = part_ptr + ((n * H + h) * E)[:, None] + e[None, :]
    o = tl.load(o_at, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(part_at, mask=mask, other=0.0).to(tl.float32)
    merged = o * (own_weight / total)[:, None] + p * (part_weight / total)[:, None]
    # Several threads hold the same log-sum-exp, and of a small tile the same o: none may store before all have loaded.
    tl.debug_barrier()
    tl.store(lse_ptr + h * T + row, high + tl.log(total), mask=live)
    tl.store(o_at, merged.to(o_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add(x_ptr, part_ptr, index_ptr, N, D, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    if n < N:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = d < D
        at = x_ptr + tl.load(index_ptr + n) * D + d
        x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        p = tl.load(part_ptr + n * D + d, mask=mask, other=0.0).to(tl.float32)
        tl.debug_barrier()
        tl.store(at, (x + p).to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N0", "N1", "N2"])
def _add_rows(
    x0_ptr, part0_ptr, index0_ptr, N0, D0, x1_ptr, part1_ptr, index1_ptr, N1, D1, x2_ptr, part2_ptr, index2_ptr, N2, D2,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Up to three sums, one for each program of the last dimension."""
    which = tl.program_id(2)
    if which == 0:
        _add(x0_ptr, part0_ptr, index0_ptr, N0, D0, BLOCK_D)
    elif which == 1:
        _add(x1_ptr, part1_ptr, index1_ptr, N1, D1, BLOCK_D)
    else:
        _add(x2_ptr, part2_ptr, index2_ptr, N2, D2, BLOCK_D)


@triton.jit(do_not_specialize=["T"])
def _sum_copies(dk_ptr, dv_ptr, to_ptr, places_ptr, starts_ptr, T, D, BLOCK_D: tl.constexpr):
    """A token of dk or dv: its copies one after another."""
    t = tl.program_id(0)
    first, last = tl.load(starts_ptr + t), tl.load(starts_ptr + t + 1)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    which = tl.program_id(2)
    from_ptr = dk_ptr
    if which == 1:
        from_ptr = dv_ptr
    total = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(first, last):
        row = tl.load(places_ptr + i).to(tl.int64)
        total += tl.load(from_ptr + row * D + d, mask=mask, other=0.0).to(tl.float32)
    to = to_ptr + (which * T + t).to(tl.int64) * D + d
    tl.store(to, total.to(to_ptr.dtype.element_ty), mask=mask)


_launch_merge, _launch_add, _launch_sum = Launcher(_merge), Launcher(_add_rows), Launcher(_sum_copies)


def merge_(
    o_THE: torch.Tensor, lse_HT: torch.Tensor, part_NHE: torch.Tensor, lse_HN: torch.Tensor, index_N: torch.Tensor
) -> None:
    """See :func:`pronghorn.kernels.attention_merge.merge_`."""
    (T, H, E), N = o_THE.shape, index_N.shape[0]
    block_e = triton.next_power_of_2(E)
    block_n = max(1, TILE // block_e)
    grid = (triton.cdiv(N, block_n), H)
    with torch.cuda.device_of(o_THE):
        _launch_merge(grid, o_THE, lse_HT, part_NHE, lse_HN, index_N, N, T, H, E, block_n, block_e, num_warps=4)


def add_rows_(sums: Sequence[Sum]) -> None:
    """See :func:`pronghorn.kernels.attention_merge.add_rows_`."""
    sizes = [(len(index_N), x_THE.shape[1] * x_THE.shape[2]) for x_THE, _, index_N in sums]
    widest = max(D for _, D in sizes)
    block = min(TILE, int(triton.next_power_of_2(widest)))
    args = [(*one, N, D) for one, (N, D) in zip(sums, sizes)]
    padded = [value for one in (*args, *args[:1] * 2)[:3] for value in one]
    grid = (max(N for N, _ in sizes), triton.cdiv(widest, block), len(sums))
    with torch.cuda.device_of(sums[0][0]):
        _launch_add(grid, *padded, block, num_warps=4)


def sum_copies(dk_UKE: torch.Tensor, dv_UKE: torch.Tensor, copies: Copies) -> tuple[torch.Tensor, torch.Tensor]:
    """See :func:`pronghorn.kernels.attention_merge.sum_copies`."""
    (_, K, E), T = dk_UKE.shape, copies.T
    both_2TKE = dk_UKE.new_empty(2, T, K, E)
    block = min(1024, int(triton.next_power_of_2(K * E)))
    with torch.cuda.device_of(dk_UKE):
        _launch_sum(
            (T, triton.cdiv(K * E, block), 2), dk_UKE, dv_UKE, both_2TKE, copies.places, copies.starts, T, K * E, block,
            num_warps=4,
        )  # fmt: skip
    return both_2TKE[0], both_2TKE[1]
