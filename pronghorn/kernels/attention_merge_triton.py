"""The kernels behind :mod:`pronghorn.kernels.attention_merge`: one pass, float32 between load and store."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher

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
def _add_rows(x_ptr, part_ptr, index_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < D
    at = x_ptr + tl.load(index_ptr + n) * D + d
    x = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    p = tl.load(part_ptr + n * D + d, mask=mask, other=0.0).to(tl.float32)
    tl.debug_barrier()
    tl.store(at, (x + p).to(x_ptr.dtype.element_ty), mask=mask)


_launch_merge, _launch_add = Launcher(_merge), Launcher(_add_rows)


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


def add_rows_(x_THE: torch.Tensor, part_NHE: torch.Tensor, index_N: torch.Tensor) -> None:
    """See :func:`pronghorn.kernels.attention_merge.add_rows_`."""
    N, D = index_N.shape[0], x_THE.shape[1] * x_THE.shape[2]
    block = min(TILE, triton.next_power_of_2(D))
    with torch.cuda.device_of(x_THE):
        _launch_add((N, triton.cdiv(D, block)), x_THE, part_NHE, index_N, D, block, num_warps=4)
