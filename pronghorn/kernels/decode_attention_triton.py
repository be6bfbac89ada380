"""The Triton side of decode attention; the formulas are in ``decode_attention.py``.

Softmax runs in powers of two: ``scale * log2(e)`` multiplies the scores, log-sum-exps between the kernels are base 2.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher


class Config(NamedTuple):
    """Tokens of one tile, warps, and how many tiles are on their way or in use at once."""

    tile: int
    num_warps: int
    num_stages: int


def launch_config(E: int, itemsize: int) -> Config:
    """Tiles of about 16 KiB of keys and as much of values."""
    return Config(min(max((1 << 14) // (_padded(E) * itemsize), 16), 128), 4, 3)


def _padded(E: int) -> int:
    """A product's inner dimension: a power of two, 16 at least."""
    return max(16, int(triton.next_power_of_2(E)))


@triton.jit
def _tiles(lengths_ptr, b, splits, N, PAGE: tl.constexpr, TILE: tl.constexpr):
    """A row's length, its tiles, and the tiles of each of its splits (1 at least)."""
    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), N * PAGE)
    tiles = (length + TILE - 1) // TILE
    return length, tiles, tl.maximum((tiles + splits - 1) // splits, 1)


@triton.jit(do_not_specialize=["N"])  # tables grow: one compilation serves all widths
def _attend(
    q_ptr, k_ptr, v_ptr, table_ptr, lengths_ptr, o_ptr, lse_ptr, q_stride, N, scale,
    K: tl.constexpr, R: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One kv head's R query heads over one split of one row: o itself, or with SPLIT its part and log-sum-exp."""
    head = tl.program_id(0)
    split = tl.program_id(1)
    b = tl.program_id(2)
    splits = tl.num_programs(1)
    length, tiles, each = _tiles(lengths_ptr, b, splits, N, PAGE, TILE)
    first = split * each
    last = tl.minimum(first + each, tiles)
    if (first < last) | (splits == 1):  # a row of length 0 stores its zeros here when there is no merge
        r = tl.arange(0, BLOCK_R)
        e = tl.arange(0, BLOCK_E)
        heads = head * R + r
        real = (r < R)[:, None] & (e < E)[None, :]
        q = tl.load(q_ptr + b.to(tl.int64) * q_stride + heads[:, None] * E + e[None, :], mask=real, other=0.0)
        peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        acc = tl.zeros((BLOCK_R, BLOCK_E), tl.float32)
        table_row = table_ptr + b.to(tl.int64) * N
        for tile in range(first, last):
            t = tile * TILE + tl.arange(0, TILE)
            inside = t < length
            page = tl.load(table_row + t // PAGE, mask=inside, other=0).to(tl.int64)
            at = ((page * PAGE + t % PAGE) * K + head) * E
            mask = inside[:, None] & (e < E)[None, :]
            # Zeros where nothing is: what a free slot holds may be NaN, and 0 * NaN is NaN.
            k = tl.load(k_ptr + at[:, None] + e[None, :], mask=mask, other=0.0)
            v = tl.load(v_ptr + at[:, None] + e[None, :], mask=mask, other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(inside[None, :], s, float("-inf"))
            higher = tl.maximum(peak, tl.max(s, axis=1))  # finite: every tile holds a token
            decay = tl.exp2(peak - higher)
            p = tl.exp2(s - higher[:, None])
            total = total * decay + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
            peak = higher
        o = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        if SPLIT:
            row = (b.to(tl.int64) * splits + split) * (K * R)
            tl.store(lse_ptr + row + heads, peak + tl.log2(total), mask=r < R)
        else:
            row = b.to(tl.int64) * (K * R)
        tl.store(o_ptr + (row + heads)[:, None] * E + e[None, :], o.to(o_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["N", "splits"])
def _merge(
    part_ptr, lse_ptr, lengths_ptr, o_ptr, N, splits,
    H: tl.constexpr, E: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One head of one row, from the splits that hold tokens: the others wrote nothing, and are not read."""
    h = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    _length, tiles, each = _tiles(lengths_ptr, b, splits, N, PAGE, TILE)
    used = (tiles + each - 1) // each
    s = tl.arange(0, BLOCK_SPLITS)
    e = tl.arange(0, BLOCK_E)
    row = (b * splits + s) * H + h
    lse = tl.load(lse_ptr + row, mask=s < used, other=-3.4028234663852886e38)  # finite: a row may have no split at all
    weight = tl.where(s < used, tl.exp2(lse - tl.max(lse, axis=0)), 0.0)
    total = tl.sum(weight, axis=0)
    part = tl.load(part_ptr + row[:, None] * E + e[None, :], mask=(s < used)[:, None] & (e < E)[None, :], other=0.0)
    o = tl.sum(part * weight[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(o_ptr + (b * H + h) * E + e, o.to(o_ptr.dtype.element_ty), mask=e < E)


@triton.jit(do_not_specialize=["N"])
def _write(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, table_ptr, positions_ptr, k_stride, v_stride, N,
    WIDTH: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + b)
    if (position >= 0) & (position < N * PAGE):
        page = tl.load(table_ptr + b * N + position // PAGE).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        at = (page * PAGE + position % PAGE) * WIDTH + column
        mask = column < WIDTH
        k = tl.load(k_ptr + b * k_stride + column, mask=mask)
        v = tl.load(v_ptr + b * v_stride + column, mask=mask)
        tl.store(k_cache_ptr + at, k, mask=mask)
        tl.store(v_cache_ptr + at, v, mask=mask)


_launch_attend, _launch_merge, _launch_write = Launcher(_attend), Launcher(_merge), Launcher(_write)


def decode_attention(
    q_BHE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_BN: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    num_splits: int = 1,
    config: Config | None = None,
) -> torch.Tensor:
    """See :func:`pronghorn.kernels.decode_attention.decode_attention`; ``config`` is for measurements."""
    (B, H, E), N, (_, page, K, _) = q_BHE.shape, block_table_BN.shape[1], k_cache.shape
    o_BHE = torch.empty((B, H, E), dtype=q_BHE.dtype, device=q_BHE.device)
    if not o_BHE.numel():
        return o_BHE
    tile, num_warps, num_stages = config or launch_config(E, q_BHE.element_size())
    split = num_splits > 1
    part, lse = o_BHE, o_BHE
    if split:
        part = torch.empty((B, num_splits, H, E), dtype=torch.float32, device=q_BHE.device)
        lse = torch.empty((B, num_splits, H), dtype=torch.float32, device=q_BHE.device)
    R, block_e = H // K, _padded(E)
    block_r = max(16, int(triton.next_power_of_2(R)))
    _launch_attend(
        (K, num_splits, B), q_BHE, k_cache, v_cache, block_table_BN, lengths_B, part, lse, q_BHE.stride(0), N,
        scale * math.log2(math.e), K, R, E, page, split, block_r, block_e, tile,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if split:
        block_splits = int(triton.next_power_of_2(num_splits))
        _launch_merge(
            (H, B), part, lse, lengths_B, o_BHE, N, num_splits, H, E, page, tile, block_splits, block_e, num_warps=4
        )
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
    _launch_write(
        (B, triton.cdiv(K * E, block)), k_BKE, v_BKE, k_cache, v_cache, block_table_BN, positions_B,
        k_BKE.stride(0), v_BKE.stride(0), N, K * E, page, block, num_warps=4,
    )  # fmt: skip
