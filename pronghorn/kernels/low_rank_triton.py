"""The Triton side of the ordered ``x A^T``."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.low_rank import FEW_ROWS
from pronghorn.kernels.reference.low_rank import SPLITS, run_length

FEW_RANKS, FEW_ROWS_OF_THESE = 128, 4096
"""With so few ranks that is faster up to more rows: 12 microseconds in place of 62 for 1,024 rows of 14,336 inputs."""


_MANY = 2048  # rows above which tiles are larger


class Tile(NamedTuple):
    """Rows, ranks and inputs of a program's step, warps, and stages of inputs on their way or in use; how many runs a
    program takes one after another.
    """

    rows: int
    ranks: int
    inputs: int
    num_warps: int
    num_stages: int
    runs: int = 1


def few_rows_tile(T: int, R: int, step: int, capability: tuple[int, int] = (9, 0)) -> Tile:
    """The tile for T rows and R ranks with runs of ``step`` inputs.

    There is little to read and less to multiply: what counts is to have all of it on its way at once, in many
    programs. So a program takes 16 ranks, the rows of the tensor core's instruction, and as many stages as its run has
    steps (Triton makes one less than it is told); four warps share the loads and repeat the few products. With more
    rows the ranks are more, so that x is read less often.

    On Hopper a product begins beside this one, for 9 to 64 rows with a block for nearly each multiprocessor: what
    counts there is to leave 128 free, and by few programs the two end sooner although this one takes longer (down, 64
    rows: 44.6 to 40.4 microseconds). Four take all ranks and two runs each; with more than 64 ranks eight one run. With
    more ranks to a row many programs are faster (measured up to 96 at 16 and 32 rows).
    """
    rows = 16 if T <= 16 else 32 if T <= 32 else 64
    if capability[0] == 9 and 8 < T <= 64 and 2 * rows >= R:
        ranks = max(32, int(triton.next_power_of_2(R)))
        return Tile(rows, ranks, 128, 4, min(6, 180 * 1024 // ((rows + ranks) * 256)), 2 if R <= 64 else 1)
    rows, ranks, inputs = (32, 32, 128) if T > 16 else (8 if T <= 8 else 16, 16, 256)
    if T > _MANY and R > 32:
        rows, ranks = 64, 64
    room = (160 if capability[0] == 9 else 72) * 1024 // ((rows + ranks) * inputs * 2)
    return Tile(rows, ranks, inputs, 4, 1 + min(room, -(-step // inputs)))


def many_rows_tile(R: int, width: int, capability: tuple[int, int] = (9, 0)) -> Tile:
    """The tile where a program takes all runs of R ranks and ``width`` inputs: as much of x on its way as fits."""
    ranks = 64 if R > 32 and R % 64 == 0 else 32 if R > 16 else 16
    rows, inputs = 32 if R <= 64 else 64, 64 if width < 8192 else 128
    room = (160 if capability[0] == 9 else 72) * 1024 // ((rows + ranks) * inputs * 2)
    return Tile(rows, ranks, inputs, 4, min(8, room))


@triton.jit
def _run(
    left_row, right_row, left_in, right_in, first, last,
    BLOCK_L: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """One run's sum for a tile of left and right rows: products in order, 16 at a time, in one accumulator.

    Which of x and A is left changes no bit.
    """
    i = tl.arange(0, BLOCK_I)
    acc = tl.zeros((BLOCK_L, BLOCK_R), tl.float32)
    for start in range(first, last, BLOCK_I):
        at = start + i
        inside = (at < last)[None, :]
        left = tl.load(left_row + at[None, :], mask=left_in[:, None] & inside, other=0.0)
        right = tl.load(right_row + at[None, :], mask=right_in[:, None] & inside, other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def _fetch(a_ptr, r, R, first, last, width, BLOCK_I: tl.constexpr):
    """A run of some rows of A on its way into the L2 cache, in lines of 128 bytes."""
    row = a_ptr + tl.minimum(r, R - 1)[:, None] * width
    for start in range(first, last, BLOCK_I):
        at = tl.minimum(start + tl.arange(0, BLOCK_I // 64) * 64, last - 1)
        place = (row + at[None, :]).to(tl.int64)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["T"])
def _few_rows(
    x_ptr, a_ptr, out_ptr, also_ptr, also_stride, part_ptr, arrived_ptr, T, R,
    x_stride, out_stride, width, step,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, TWICE: tl.constexpr,
    RUNS: tl.constexpr, EARLY: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """RUNS runs a program; the last of a tile adds all of them up, from the first, and clears the count. What comes out
    is written to a second place too if TWICE.

    EARLY lets a kernel that was launched to overlap begin when x is whole; others still wait for the end.
    """
    split = tl.program_id(0) * RUNS
    tile = tl.program_id(1) * tl.num_programs(2) + tl.program_id(2)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if CHAIN:  # adapters are older than the chain
        _fetch(a_ptr, r, R, split * step, tl.minimum((split + RUNS) * step, width), width, BLOCK_I)
        gdc_wait()
    if EARLY:
        gdc_launch_dependents()
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    place = tl.arange(0, BLOCK_R)[:, None] * BLOCK_T + tl.arange(0, BLOCK_T)[None, :]
    parts = part_ptr + tile * (SPLITS * BLOCK_T * BLOCK_R)
    for run in range(split, split + RUNS):
        last = tl.minimum((run + 1) * step, width)
        x_row = x_ptr + t.to(tl.int64)[:, None] * x_stride
        a_row = a_ptr + r[:, None] * width
        acc = _run(a_row, x_row, r < R, t < T, run * step, last, BLOCK_R, BLOCK_T, BLOCK_I)
        tl.store(parts + run * (BLOCK_T * BLOCK_R) + place, acc, cache_modifier=".cg")
    tl.debug_barrier()  # all of this program's stores, before its arrival is seen
    if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS // RUNS - 1:
        tl.debug_barrier()
        total = tl.load(parts + place, cache_modifier=".cg")
        for s in tl.static_range(1, SPLITS):
            total += tl.load(parts + s * (BLOCK_T * BLOCK_R) + place, cache_modifier=".cg")
        out = out_ptr + t.to(tl.int64)[None, :] * out_stride + r[:, None]
        inside = (r < R)[:, None] & (t < T)[None, :]
        tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)
        if TWICE:
            also = also_ptr + t.to(tl.int64)[None, :] * also_stride + r[:, None]
            tl.store(also, total.to(also_ptr.dtype.element_ty), mask=inside)
        tl.store(arrived_ptr + tile, 0)


@triton.jit(do_not_specialize=["T"])
def _many_rows(
    x_ptr, a_ptr, out_ptr, also_ptr, also_stride, T, R, x_stride, out_stride, width, step,
    SPLITS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """All runs of a tile, written to a second place too if TWICE."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_row = x_ptr + t.to(tl.int64)[:, None] * x_stride
    a_row = a_ptr + r[:, None] * width
    total = _run(x_row, a_row, t < T, r < R, 0, tl.minimum(step, width), BLOCK_T, BLOCK_R, BLOCK_I)
    for s in range(1, SPLITS):
        last = tl.minimum((s + 1) * step, width)
        total += _run(x_row, a_row, t < T, r < R, s * step, last, BLOCK_T, BLOCK_R, BLOCK_I)
    out = out_ptr + t.to(tl.int64)[:, None] * out_stride + r[None, :]
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=(t < T)[:, None] & (r < R)[None, :])
    if TWICE:
        also = also_ptr + t.to(tl.int64)[:, None] * also_stride + r[None, :]
        tl.store(also, total.to(also_ptr.dtype.element_ty), mask=(t < T)[:, None] & (r < R)[None, :])


_launch_few, _launch_many = Launcher(_few_rows, chains=True), Launcher(_many_rows)


@cache
def _workspace(device: torch.device, stream: int, tiles: int, elements: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the runs, and how many have arrived: made once, so that a CUDA graph may hold them. A stream has its own,
    as a rollout may be drawn on one while training runs on another. ``tiles`` is a power of two, so that few are made.
    """
    return (
        torch.empty(tiles * SPLITS * elements, dtype=torch.float32, device=device),
        torch.zeros(tiles, dtype=torch.int32, device=device),
    )


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index) if index >= 0 else (9, 0)


def low_rank(
    x_TI: torch.Tensor,
    a_RI: torch.Tensor,
    out_TR: torch.Tensor,
    also_TR: torch.Tensor | None = None,
    few_rows: int = FEW_ROWS,
    tile: Tile | None = None,
) -> None:
    """See :func:`pronghorn.kernels.low_rank.low_rank`; ``few_rows`` (0: never few) is for tests, and ``tile`` for tests
    and measurements.
    """
    (T, width), R = x_TI.shape, a_RI.shape[0]
    if not T:
        return
    step = run_length(width)
    common = (T, R, x_TI.stride(0), out_TR.stride(0), width, step, SPLITS)
    with torch.cuda.device_of(x_TI):
        capability = _capability(x_TI.get_device())
        also = out_TR if also_TR is None else also_TR
        if few_rows >= T or (few_rows and T <= FEW_ROWS_OF_THESE and R <= FEW_RANKS):
            block_t, block_r, block_i, num_warps, num_stages, runs = tile or few_rows_tile(T, R, step, capability)
            tiles_t, tiles_r = triton.cdiv(T, block_t), triton.cdiv(R, block_r)
            stream = torch.cuda.current_stream(x_TI.device).cuda_stream if x_TI.is_cuda else 0
            tiles = int(triton.next_power_of_2(tiles_t * tiles_r))
            part, arrived = _workspace(x_TI.device, stream, tiles, block_t * block_r)
            _launch_few(
                (SPLITS // runs, tiles_t, tiles_r), x_TI, a_RI, out_TR, also, also.stride(0), part, arrived,
                *common, block_t, block_r, block_i, also_TR is not None, runs,
                x_TI.is_cuda and capability >= (9, 0),
                num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            block_t, block_r, block_i, num_warps, num_stages, *_ = tile or many_rows_tile(R, width, capability)
            _launch_many(
                (triton.cdiv(T, block_t), triton.cdiv(R, block_r)), x_TI, a_RI, out_TR, also, also.stride(0), *common,
                block_t, block_r, block_i, also_TR is not None,
                num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False,
            )  # fmt: skip
