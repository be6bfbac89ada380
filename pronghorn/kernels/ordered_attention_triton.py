"""The Triton side of ordered attention over rows of queries; ``ordered_attention.py`` has the definition."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.ordered_rows import SEGMENT, TILE, OrderedRows
from pronghorn.kernels.ordered_step_triton import COLUMNS, finish, merge_step, tile_step


class Config(NamedTuple):
    """Rows of a program's tile (queries times the heads of a group), warps, and tiles on their way or in use; the most
    registers of a thread, None for the compiler's choice.
    """

    rows: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def launch_config(E: int, capability: tuple[int, int] = (9, 0), one: bool = False) -> Config:
    """128 rows for two groups of warps on Hopper's tensor cores; half of it for heads that fill the registers.

    Five stages are three tiles of keys: the index that finds them comes two stages earlier. Other GPUs have less shared
    memory, some only 99 KiB.

    Where no row has more than ``one`` segment, there is one sum to keep in place of two, and two programs share a
    multiprocessor (16 rows of 256 tokens, 8B: 89 to 65 microseconds): as many registers as that leaves, and fewer
    tiles.
    """
    if capability[0] == 9 and E <= 128 and one:
        return Config(128, 8, 4, 128)
    if capability[0] != 9:
        return Config(64 if E <= 128 else 32, 4, 3)
    return Config(128, 8, 5) if E <= 128 else Config(64, 8, 3)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index) if index >= 0 else (9, 0)


def _padded(E: int) -> int:
    """A product's inner dimension: a power of two, 16 at least."""
    return max(16, int(triton.next_power_of_2(E)))


@triton.jit(do_not_specialize=["T"])  # packed batches differ in length: one compilation serves all
def _attend(
    q_ptr, k_ptr, v_ptr, tiles_ptr, keys_ptr, o_ptr, lse_ptr, q_stride, q_head_stride, k_stride, k_head_stride,
    v_stride, v_head_stride, o_stride, T, scale,
    K: tl.constexpr, R: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr,
    TILE: tl.constexpr, SEGMENT: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """One kv head's R query heads for up to BLOCK_M // R queries of one row. ONE: no row has more than a segment."""
    head = tl.program_id(0) % K
    tile = tiles_ptr + (tl.program_id(0) // K) * 4
    start = tl.load(tile)
    count = tl.load(tile + 1)
    first = tl.load(tile + 2)  # logical position of the first query
    keys = keys_ptr + tl.load(tile + 3)
    row = tl.arange(0, BLOCK_M)
    query = row // R
    heads = (head * R + row % R).to(tl.int64)
    live = query < count
    token = (start + query).to(tl.int64)
    e = tl.arange(0, BLOCK_E)
    real = live[:, None] & (e < E)[None, :]
    q = tl.load(q_ptr + (token * q_stride + heads * q_head_stride)[:, None] + e[None, :], mask=real, other=0.0)
    position = first + tl.minimum(query, count - 1)
    last = first + count - 1
    k_head = k_ptr + head.to(tl.int64) * k_head_stride
    v_head = v_ptr + head.to(tl.int64) * v_head_stride
    ones = tl.full((TILE, COLUMNS), 1.0, v_ptr.dtype.element_ty)
    all_peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    all_total = tl.zeros((BLOCK_M, COLUMNS), tl.float32)
    all_acc = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    peak, total, acc = all_peak, all_total, all_acc
    for begin in range(0, last + 1, TILE):
        if not ONE and (begin % SEGMENT == 0) & (begin > 0):
            all_peak, all_total, all_acc = merge_step(all_peak, all_total, all_acc, peak, total, acc)
            peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)  # the next decay makes total and acc 0
        t = begin + tl.arange(0, TILE)
        # Past the last key the last one is read again: hidden from all, and no page's unused slot.
        at = tl.load(keys + tl.minimum(t, last)).to(tl.int64)
        k = tl.load(k_head + (at * k_stride)[:, None] + e[None, :], mask=(e < E)[None, :], other=0.0)
        v = tl.load(v_head + (at * v_stride)[:, None] + e[None, :], mask=(e < E)[None, :], other=0.0)
        seen = t[None, :] <= position[:, None]
        peak, total, acc = tile_step(q, k, v, ones, seen, begin + TILE > first + 1, scale, peak, total, acc)
    if ONE:  # merged with nothing: the same but for the sign of a zero
        all_peak, all_total, all_acc = peak, total, acc + 0.0
    else:
        all_peak, all_total, all_acc = merge_step(all_peak, all_total, all_acc, peak, total, acc)
    sums = tl.max(all_total, axis=1)
    o = finish(sums, all_acc)
    tl.store(lse_ptr + heads * T + token, (all_peak + tl.log2(sums)) * 0.6931471805599453, mask=live)
    o_at = o_ptr + (token * o_stride + heads * E)[:, None] + e[None, :]
    tl.store(o_at, o.to(o_ptr.dtype.element_ty), mask=real)


_launch = Launcher(_attend)


def tile_rows(config: Config, R: int) -> int:
    """Rows of a program's tile: as many queries for each of a kv head's R query heads."""
    return max(config.rows, int(triton.next_power_of_2(R)))


def ordered_attention_forward(
    q_THE: torch.Tensor,
    k_UKE: torch.Tensor,
    v_UKE: torch.Tensor,
    rows: OrderedRows,
    scale: float,
    out_THE: torch.Tensor,
    config: Config | None = None,
) -> torch.Tensor:
    """Writes o to ``out_THE`` and gives the log-sum-exp; see
    :func:`pronghorn.kernels.ordered_attention.ordered_attention_forward`. ``config`` is for measurements.
    """
    (T, H, E), K = q_THE.shape, k_UKE.shape[1]
    lse_HT = torch.empty((H, T), dtype=torch.float32, device=q_THE.device)
    R = H // K
    one = rows.longest <= SEGMENT
    config = config or launch_config(E, _capability(q_THE.get_device()), one)
    block_m, num_warps, num_stages = tile_rows(config, R), config.num_warps, config.num_stages
    tiles_N4 = rows.tiles(block_m // R)
    if not tiles_N4.shape[0]:
        return lse_HT
    with torch.cuda.device_of(q_THE):
        _launch(
            (tiles_N4.shape[0] * K,), q_THE, k_UKE, v_UKE, tiles_N4, rows.keys, out_THE, lse_HT,
            q_THE.stride(0), q_THE.stride(1), k_UKE.stride(0), k_UKE.stride(1), v_UKE.stride(0), v_UKE.stride(1),
            out_THE.stride(0), T, scale * math.log2(math.e), K, R, E, block_m, _padded(E), TILE, SEGMENT,
            one,
            num_warps=num_warps, num_stages=num_stages, maxnreg=config.maxnreg, enable_fp_fusion=False,
        )  # fmt: skip
    return lse_HT
