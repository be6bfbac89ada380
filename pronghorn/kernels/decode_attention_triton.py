"""The Triton side of decode attention; the order of its arithmetic is that of ``ordered_attention.py``."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.ordered_rows import SEGMENT, TILE
from pronghorn.kernels.ordered_step_triton import COLUMNS, finish, merge_step, tile_step

AT_ONCE = 4
"""Segments that a merging program has on their way at once; merged strictly in order all the same."""

HEADS = 8
"""Heads of a row that one program merges: thousands of small programs would take longer to begin than to run."""


class Config(NamedTuple):
    """Warps, and how many tiles are on their way or in use at once."""

    num_warps: int
    num_stages: int


MANY_ROWS = 32
"""Rows from which on programs are many enough to share multiprocessors."""


def launch_config(E: int, rows: int) -> Config:
    """Tiles of 64 tokens, less of them at once where heads are wide. Of few rows each program has three on its way (the
    index that finds them comes two stages earlier); of many two, in two warps, so that several programs share a
    multiprocessor: 256 rows of 304 tokens take 90 microseconds so, and 96 the other way.
    """
    if E > 128:
        return Config(4, 3)
    return Config(4, 5) if rows < MANY_ROWS else Config(2, 4)


def _padded(E: int) -> int:
    """A product's inner dimension: a power of two, 16 at least."""
    return max(16, int(triton.next_power_of_2(E)))


@triton.jit
def _length(lengths_ptr, b, N, PAGE: tl.constexpr):
    """A row's tokens, as far as its table reaches."""
    return tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), N * PAGE)


@triton.jit(do_not_specialize=["N", "table_stride"])  # tables grow: one compilation serves all widths
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, o_ptr, part_ptr, stats_ptr, q_stride, table_stride, o_stride, N, scale,
    K: tl.constexpr, R: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr, TILE: tl.constexpr, SEGMENT: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One kv head's R query heads over one segment of one row: o itself where the row has no other, else its part."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    segment = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    length = _length(lengths_ptr, b, N, PAGE)
    begin = segment * SEGMENT
    if (begin < length) | (segment == 0):  # a row of length 0 stores its zeros here
        r = tl.arange(0, BLOCK_R)
        e = tl.arange(0, BLOCK_E)
        heads = head * R + r
        real = (r < R)[:, None] & (e < E)[None, :]
        q = tl.load(q_ptr + b * q_stride + heads[:, None] * E + e[None, :], mask=real, other=0.0)
        peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R, COLUMNS), tl.float32)
        acc = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
        ones = tl.full((TILE, COLUMNS), 1.0, v_ptr.dtype.element_ty)
        table_row = table_ptr + b * table_stride
        for first in range(begin, tl.minimum(begin + SEGMENT, length), TILE):
            t = first + tl.arange(0, TILE)
            # Past the last token it is read again, and hidden: what a free slot holds may be NaN, and 0 * NaN is NaN.
            held = tl.minimum(t, length - 1)
            page = tl.load(table_row + held // PAGE).to(tl.int64)
            at = ((page * PAGE + held % PAGE) * K + head) * E
            k = tl.load(k_ptr + at[:, None] + e[None, :], mask=(e < E)[None, :], other=0.0)
            v = tl.load(v_ptr + at[:, None] + e[None, :], mask=(e < E)[None, :], other=0.0)
            seen = (t < length)[None, :]
            peak, total, acc = tile_step(q, k, v, ones, seen, first + TILE > length, scale, peak, total, acc)
        sums = tl.max(total, axis=1)
        if length <= SEGMENT:
            o_at = o_ptr + b * o_stride + heads[:, None] * E + e[None, :]
            tl.store(o_at, finish(sums, acc).to(o_ptr.dtype.element_ty), mask=real)
        else:
            row = (b * tl.num_programs(1) + segment) * (K * R) + heads
            tl.store(part_ptr + row[:, None] * E + e[None, :], acc, mask=real)
            tl.store(stats_ptr + row * 2, peak, mask=r < R)
            tl.store(stats_ptr + row * 2 + 1, sums, mask=r < R)


@triton.jit(do_not_specialize=["N", "segments"])
def _merge(
    part_ptr, stats_ptr, lengths_ptr, o_ptr, o_stride, N, segments, H: tl.constexpr, E: tl.constexpr,
    PAGE: tl.constexpr, SEGMENT: tl.constexpr, AT_ONCE: tl.constexpr, HEADS: tl.constexpr, BLOCK_E: tl.constexpr,
    CHAIN: tl.constexpr,
):  # fmt: skip
    """Some heads of one row, from the segments that hold tokens: the others wrote nothing, and are not read."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()
    h = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    b = tl.program_id(1).to(tl.int64)
    length = _length(lengths_ptr, b, N, PAGE)
    if length > SEGMENT:
        e = tl.arange(0, BLOCK_E)
        peak = tl.full((HEADS,), float("-inf"), tl.float32)
        total = tl.zeros((HEADS, 1), tl.float32)
        acc = tl.zeros((HEADS, BLOCK_E), tl.float32)
        used = (length + SEGMENT - 1) // SEGMENT
        for group in range(0, used, AT_ONCE):
            for j in tl.static_range(AT_ONCE):
                segment = tl.zeros((HEADS,), tl.int32) + group + j
                there = (h < H) & (segment < used)  # one that is not: a segment without a key, which changes no bit
                row = (b * segments + segment) * H + h
                next_peak = tl.load(stats_ptr + row * 2, mask=there, other=float("-inf"))
                next_total = tl.load(stats_ptr + row * 2 + 1, mask=there, other=0.0)
                mask = there[:, None] & (e < E)[None, :]
                next_acc = tl.load(part_ptr + row[:, None] * E + e[None, :], mask=mask, other=0.0)
                peak, total, acc = merge_step(peak, total, acc, next_peak, next_total[:, None], next_acc)
        o = finish(tl.max(total, axis=1), acc)
        o_at = o_ptr + b * o_stride + (h * E)[:, None] + e[None, :]
        tl.store(o_at, o.to(o_ptr.dtype.element_ty), mask=(h < H)[:, None] & (e < E)[None, :])


@triton.jit(do_not_specialize=["N", "table_stride"])
def _write(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, table_ptr, positions_ptr, k_stride, v_stride, table_stride, N,
    WIDTH: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + b)
    if (position >= 0) & (position < N * PAGE):
        page = tl.load(table_ptr + b * table_stride + position // PAGE).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = (page * PAGE + position % PAGE) * WIDTH + column
        mask = column < WIDTH
        k = tl.load(k_ptr + b * k_stride + column, mask=mask)
        v = tl.load(v_ptr + b * v_stride + column, mask=mask)
        tl.store(k_cache_ptr + at, k, mask=mask)
        tl.store(v_cache_ptr + at, v, mask=mask)


_launch_attend, _launch_merge = Launcher(_attend, chains=True), Launcher(_merge, chains=True)
_launch_write = Launcher(_write)


def segments_of(tokens: int) -> int:
    """Segments that a table of this many tokens can hold."""
    return max(triton.cdiv(tokens, SEGMENT), 1)


def decode_attention(
    q_BHE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_BN: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    workspace: torch.Tensor | None = None,
    out_BHE: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """See :func:`pronghorn.kernels.decode_attention.decode_attention`; ``config`` is for measurements."""
    (B, H, E), N, (_, page, K, _) = q_BHE.shape, block_table_BN.shape[1], k_cache.shape
    o_BHE = torch.empty((B, H, E), dtype=q_BHE.dtype, device=q_BHE.device) if out_BHE is None else out_BHE
    if not o_BHE.numel():
        return o_BHE
    num_warps, num_stages = config or launch_config(E, B)
    segments = segments_of(N * page)
    count = B * segments * H if segments > 1 else 0  # where a row is one segment, nothing is left to merge
    if workspace is None:
        workspace = torch.empty(count * (E + 2), dtype=torch.float32, device=q_BHE.device)
    part, stats = workspace[: count * E], workspace[count * E :]
    R, block_e = H // K, _padded(E)
    block_r = max(16, int(triton.next_power_of_2(R)))
    with torch.cuda.device_of(q_BHE):
        _launch_attend(
            (K, segments, B), q_BHE, k_cache, v_cache, block_table_BN, lengths_B, o_BHE, part, stats,
            q_BHE.stride(0), block_table_BN.stride(0), o_BHE.stride(0), N, scale * math.log2(math.e), K, R, E, page,
            block_r, block_e, TILE, SEGMENT,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False,
        )  # fmt: skip
        if segments > 1:
            heads = min(HEADS, int(triton.next_power_of_2(H)))
            _launch_merge(
                (triton.cdiv(H, heads), B), part, stats, lengths_B, o_BHE, o_BHE.stride(0), N, segments, H, E, page,
                SEGMENT, AT_ONCE, heads, block_e,
                num_warps=4 if heads > 2 else 1, enable_fp_fusion=False,
            )  # fmt: skip
    return o_BHE


def write_kv(
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_BN: torch.Tensor,
    positions_B: torch.Tensor,
) -> None:
    """See :func:`pronghorn.kernels.decode_attention.write_kv`."""
    (B, K, E), N, page = k_BKE.shape, block_table_BN.shape[1], k_cache.shape[1]
    if not k_BKE.numel():
        return
    block = min(1024, int(triton.next_power_of_2(K * E)))
    with torch.cuda.device_of(k_BKE):
        _launch_write(
            (B, triton.cdiv(K * E, block)), k_BKE, v_BKE, k_cache, v_cache, block_table_BN, positions_B,
            k_BKE.stride(0), v_BKE.stride(0), block_table_BN.stride(0), N, K * E, page, block, num_warps=4,
        )  # fmt: skip
