"""The Triton side of the ordered ``x A^T``."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.reference.low_rank import SPLITS, run_length

FEW_ROWS = 256
"""Up to so many rows, runs are programs of their own."""


@triton.jit
def _run(
    x_ptr, a_ptr, t, r, first, last, T, R, x_stride, width,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One run's sum for a tile of rows and ranks: products in order, 16 at a time, in one accumulator."""
    i = tl.arange(0, BLOCK_I)
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    x_row = x_ptr + t.to(tl.int64)[:, None] * x_stride
    a_row = a_ptr + r[:, None] * width
    for start in range(first, last, BLOCK_I):
        at = start + i
        inside = (at < last)[None, :]
        x = tl.load(x_row + at[None, :], mask=(t < T)[:, None] & inside, other=0.0)
        a = tl.load(a_row + at[None, :], mask=(r < R)[:, None] & inside, other=0.0)
        acc = tl.dot(x, tl.trans(a), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["T"])
def _few_rows(
    x_ptr, a_ptr, out_ptr, part_ptr, arrived_ptr, T, R, x_stride, out_stride, width, step,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """A run a program; the last of a tile adds all of them up, from the first, and clears the count.

    EARLY lets a kernel that was launched to overlap begin now; others still wait for the end.
    """
    if EARLY:
        gdc_launch_dependents()
    split = tl.program_id(0)
    tile = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    last = tl.minimum((split + 1) * step, width)
    acc = _run(x_ptr, a_ptr, t, r, split * step, last, T, R, x_stride, width, BLOCK_T, BLOCK_R, BLOCK_I)
    place = tl.arange(0, BLOCK_T)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
    parts = part_ptr + tile * (SPLITS * BLOCK_T * BLOCK_R)
    tl.store(parts + split * (BLOCK_T * BLOCK_R) + place, acc, cache_modifier=".cg")
    tl.debug_barrier()  # all of this program's stores, before its arrival is seen
    if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
        tl.debug_barrier()
        total = tl.load(parts + place, cache_modifier=".cg")
        for s in tl.static_range(1, SPLITS):
            total += tl.load(parts + s * (BLOCK_T * BLOCK_R) + place, cache_modifier=".cg")
        out = out_ptr + t.to(tl.int64)[:, None] * out_stride + r[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (r < R)[None, :])
        tl.store(arrived_ptr + tile, 0)


@triton.jit(do_not_specialize=["T"])
def _many_rows(
    x_ptr, a_ptr, out_ptr, T, R, x_stride, out_stride, width, step,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """All runs of a tile."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    total = _run(x_ptr, a_ptr, t, r, 0, tl.minimum(step, width), T, R, x_stride, width, BLOCK_T, BLOCK_R, BLOCK_I)
    for s in range(1, SPLITS):
        last = tl.minimum((s + 1) * step, width)
        total += _run(x_ptr, a_ptr, t, r, s * step, last, T, R, x_stride, width, BLOCK_T, BLOCK_R, BLOCK_I)
    out = out_ptr + t.to(tl.int64)[:, None] * out_stride + r[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (r < R)[None, :])


_launch_few, _launch_many = Launcher(_few_rows), Launcher(_many_rows)


@lru_cache(maxsize=64)
def _workspace(device: torch.device, tiles: int, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the runs, and how many have arrived: made once, so that a CUDA graph may hold them."""
    return (
        torch.empty(tiles * SPLITS * elements, dtype=torch.float32, device=device),
        torch.zeros(tiles, dtype=torch.int32, device=device),
    )


@lru_cache(maxsize=32)
def _overlaps(device: torch.device) -> bool:
    """Whether a kernel can begin before the one before it has ended."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def low_rank(x_TI: torch.Tensor, a_RI: torch.Tensor, out_TR: torch.Tensor, few_rows: int = FEW_ROWS) -> None:
    """See :func:`pronghorn.kernels.low_rank.low_rank`; ``few_rows`` is for tests."""
    (T, width), R = x_TI.shape, a_RI.shape[0]
    if not T:
        return
    block_r = min(max(16, triton.next_power_of_2(R)), 128)
    tiles_r = triton.cdiv(R, block_r)
    common = (T, R, x_TI.stride(0), out_TR.stride(0), width, run_length(width), SPLITS)
    with torch.cuda.device_of(x_TI):
        if few_rows >= T:
            tiles_t = triton.cdiv(T, 16)
            part, arrived = _workspace(x_TI.device, tiles_t * tiles_r, 16 * block_r)
            _launch_few(
                (SPLITS, tiles_t, tiles_r), x_TI, a_RI, out_TR, part, arrived, *common, 16, block_r, 128,
                _overlaps(x_TI.device),
                num_warps=4, num_stages=4, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            block_t = 32 if T <= 2048 else 64
            _launch_many(
                (triton.cdiv(T, block_t), tiles_r), x_TI, a_RI, out_TR, *common, block_t, block_r, 64,
                num_warps=4, num_stages=4, enable_fp_fusion=False,
            )  # fmt: skip
