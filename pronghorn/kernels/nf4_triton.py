"""The Triton side of NF4: kernels, their launchers, and their launch configurations as plain functions of shape.

Equal to bitsandbytes' CUDA code bit for bit: the inverse of a scale is the hardware's approximate reciprocal with
subnormals flushed, and a scale is level * nested scale, rounded, + offset, never fused into one rounding.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.nf4_code import (
    NESTED_BLOCKSIZE,
    NF4_BLOCKSIZE,
    dynamic_code,
    dynamic_midpoints,
    nf4_code,
    nf4_cuda_boundaries,
)
from pronghorn.kernels.nf4_ptx import constraints, dequantize_ptx
from pronghorn.kernels.reference.nf4 import output, source

_PTX_BF16 = tl.constexpr(dequantize_ptx("bf16"))
_PTX_F16 = tl.constexpr(dequantize_ptx("f16"))
_PTX4_BF16 = tl.constexpr(dequantize_ptx("bf16", 4))
_PTX4_F16 = tl.constexpr(dequantize_ptx("f16", 4))
_CONSTRAINTS = tl.constexpr(constraints())
_CONSTRAINTS4 = tl.constexpr(constraints(4))
_RCP = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")
_SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _inverse(x, ASM: tl.constexpr):
    """1 / x as bitsandbytes' CUDA code computes it; the interpreter, which has no assembly, divides."""
    if ASM:
        inverse = tl.inline_asm_elementwise(_RCP, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        inverse = 1.0 / x
    return inverse


@triton.jit
def _flush(x):
    return tl.where(tl.abs(x) < _SMALLEST_NORMAL, 0.0, x)


@triton.jit
def _quantize_kernel(
    w_ptr, boundaries_ptr, codes_ptr, absmax_ptr, numel, ROWS: tl.constexpr, BLOCK: tl.constexpr, ASM: tl.constexpr
):
    """ROWS blocks of BLOCK weights: their scales, and their codes packed two a byte."""
    block = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    w = _flush(tl.load(w_ptr + at, mask=at < numel, other=0.0).to(tl.float32))
    absmax = tl.max(tl.abs(w), axis=1)
    tl.store(absmax_ptr + block, absmax, mask=block * BLOCK < numel)
    unit = w * _inverse(absmax, ASM)[:, None]
    code = tl.zeros([ROWS, BLOCK], dtype=tl.int32)
    for k in tl.static_range(15):
        # A zero block makes 0 * inf = NaN, above no boundary, so that its code is 0, as in bitsandbytes.
        code += (unit > tl.load(boundaries_ptr + k)).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (ROWS, BLOCK // 2, 2)))
    byte_at = block[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    tl.store(codes_ptr + byte_at, ((high << 4) | low).to(tl.uint8), mask=byte_at * 2 < numel)


@triton.jit
def _unit_kernel(x_ptr, unit_ptr, absmax_ptr, numel, BLOCK: tl.constexpr, ASM: tl.constexpr):
    """One block scaled to [-1, 1], and its scale."""
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    x = _flush(tl.load(x_ptr + at, mask=at < numel, other=0.0))
    absmax = tl.max(tl.abs(x), axis=0)
    tl.store(absmax_ptr + block, absmax)
    tl.store(unit_ptr + at, x * _inverse(absmax, ASM), mask=at < numel)


@triton.jit
def _block_scale(scales_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, mask, NESTED: tl.constexpr):
    """Scales of the blocks ``block``: float32, of its shape. NESTED is the nested block size, 0 without nesting."""
    stored = tl.load(scales_ptr + block, mask=mask, other=0)
    if NESTED > 0:
        level = tl.load(nested_code_ptr + stored.to(tl.int32), mask=mask, other=0.0)
        nested = tl.load(nested_absmax_ptr + block // NESTED, mask=mask, other=0.0)
        scale = level * nested + tl.load(offset_ptr)
    else:
        scale = stored
    return scale


@triton.jit
def _tile_run(run, row_groups):
    """Where the run of 64 weights ``run``, counted row by row, lies among the runs of a weight in tiles."""
    row = run // row_groups
    return (row // 8 * row_groups + run % row_groups) * 8 + row % 8


@triton.jit
def _dequantize_kernel(
    codes_ptr, scales_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, nf4_ptr, out_ptr, numel, columns, pad,
    BYTES: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, TILED: tl.constexpr,
):  # fmt: skip
    """BYTES bytes of codes, any numel, any dtype, any GPU: the levels are looked up in memory."""
    at = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    mask = at * 2 < numel
    held = at
    if TILED:
        inside = at % 32  # step, half, thread of a run of 64 weights; in a tile thread, half, step
        run = _tile_run(at // 32, columns // 64)
        held = run * 32 + (inside % 4) * 8 + (inside // 4 % 2) * 4 + inside // 8
    byte = tl.load(codes_ptr + held, mask=mask, other=0).to(tl.int32)
    block = (at * 2) // BLOCKSIZE
    scale = _block_scale(scales_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, mask, NESTED)
    high = tl.load(nf4_ptr + (byte >> 4)) * scale
    low = tl.load(nf4_ptr + (byte & 15)) * scale
    out = tl.reshape(tl.join(high, low), (2 * BYTES,))
    out_at = tl.program_id(0).to(tl.int64) * (2 * BYTES) + tl.arange(0, 2 * BYTES)
    place = out_at + (out_at // columns) * pad
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=out_at < numel)


@triton.jit
def write_beside(
    tail_ptr, b_ptr, first, rows, row_stride, start, rank, width, scaling, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """ROWS rows from ``first`` on of what stands beside a weight: ``scaling * b`` in ``rank`` of ``width`` columns from
    ``start`` on, zeros in the others; ``b`` is ``[rows, rank]``, contiguous.
    """
    row = first + tl.arange(0, ROWS).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    own = (column - start)[None, :]
    real = (row < rows)[:, None]
    b = tl.load(b_ptr + row[:, None] * rank + own, mask=real & (own >= 0) & (own < rank), other=0.0)
    place = tail_ptr + row[:, None] * row_stride + column[None, :]
    tl.store(place, (b.to(tl.float32) * scaling).to(tail_ptr.dtype.element_ty), mask=real & (column < width)[None, :])


@triton.jit
def _dequantize_half_kernel(
    words_ptr, scales_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr, words, row_groups, pad,
    tail_ptr, b_ptr, blocks, rows, row_stride, start, rank, width, scaling,
    GROUPS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BF16: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """GROUPS runs of 64 weights to 16 bits. Codes come as 32-bit words of 8, weights leave as 32-bit pairs.

    Four threads share a run: each takes a word of its first half and one of its second, so that it can use its table
    of 16 values twice while every 16-byte store of a warp still fills whole 32-byte sectors. A row is ``row_groups``
    runs long, and ``pad`` pairs lie between it and the next.

    With COLUMNS (a power of two, ``width`` at least) what stands beside the weight is written as well: by the programs
    from ``blocks`` on, GROUPS rows each, which find no words left.
    """
    lane = tl.arange(0, GROUPS * 4)
    group = tl.program_id(0).to(tl.int64) * GROUPS + lane // 4
    first = group * 8 + lane % 4
    second = first + 4
    w0 = tl.load(words_ptr + first, mask=first < words, other=0)
    w1 = tl.load(words_ptr + second, mask=second < words, other=0)
    scale = _block_scale(
        scales_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, (group * 64) // BLOCKSIZE, first < words, NESTED
    )
    asm: tl.constexpr = _PTX_BF16 if BF16 else _PTX_F16
    a0, a1, a2, a3, b0, b1, b2, b3 = tl.inline_asm_elementwise(
        asm, _CONSTRAINTS, [w0, w1, scale], dtype=(tl.int32,) * 8, is_pure=True, pack=1
    )
    pair = tl.arange(0, 4)[None, :]
    a = tl.reshape(tl.join(tl.join(a0, a2), tl.join(a1, a3)), (GROUPS * 4, 4))
    b = tl.reshape(tl.join(tl.join(b0, b2), tl.join(b1, b3)), (GROUPS * 4, 4))
    skip = (group // row_groups) * pad
    tl.store(out_ptr + (first * 4 + skip)[:, None] + pair, a, mask=(first < words)[:, None])
    tl.store(out_ptr + (second * 4 + skip)[:, None] + pair, b, mask=(second < words)[:, None])
    if COLUMNS > 0:
        block = tl.program_id(0) - blocks
        if block >= 0:
            write_beside(
                tail_ptr, b_ptr, block * GROUPS, rows, row_stride, start, rank, width, scaling, GROUPS, COLUMNS
            )


@triton.jit
def _dequantize_tiles_kernel(
    words_ptr, scales_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr, words, row_groups, pad,
    tail_ptr, b_ptr, blocks, rows, row_stride, start, rank, width, scaling,
    GROUPS: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, BF16: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """As the kernel for rows, of codes in tiles (``nf4_layout.py``).

    Two threads share a run: each takes a half of its four steps, a word from each of the product's four threads, whose
    byte q is two weights of step q: 8 weights of a step lie side by side. Each 64 runs of a program are 8 of each of 8
    rows, where a row has whole eights.
    """
    lane = tl.arange(0, GROUPS * 2)
    i, half = lane // 2, lane % 2
    held = tl.program_id(0).to(tl.int64) * GROUPS + i // 64 * 64 + i % 8 * 8 + i % 64 // 8
    first = held * 8 + half
    mask = first < words
    w0 = tl.load(words_ptr + first, mask=mask, other=0)
    w1 = tl.load(words_ptr + first + 2, mask=mask, other=0)
    w2 = tl.load(words_ptr + first + 4, mask=mask, other=0)
    w3 = tl.load(words_ptr + first + 6, mask=mask, other=0)
    inside = held % (row_groups * 8)
    row = held // (row_groups * 8) * 8 + inside % 8
    group = row * row_groups + inside // 8
    scale = _block_scale(
        scales_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, (group * 64) // BLOCKSIZE, mask, NESTED
    )
    asm: tl.constexpr = _PTX4_BF16 if BF16 else _PTX4_F16
    a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3 = tl.inline_asm_elementwise(
        asm, _CONSTRAINTS4, [w0, w1, w2, w3, scale], dtype=(tl.int32,) * 16, is_pure=True, pack=1
    )
    pair = tl.arange(0, 4)[None, :]
    to = (group * 32 + half * 4 + row * pad)[:, None] + pair
    mask = mask[:, None]
    tl.store(out_ptr + to, tl.reshape(tl.join(tl.join(a0, c0), tl.join(b0, d0)), (GROUPS * 2, 4)), mask=mask)
    tl.store(out_ptr + to + 8, tl.reshape(tl.join(tl.join(a1, c1), tl.join(b1, d1)), (GROUPS * 2, 4)), mask=mask)
    tl.store(out_ptr + to + 16, tl.reshape(tl.join(tl.join(a2, c2), tl.join(b2, d2)), (GROUPS * 2, 4)), mask=mask)
    tl.store(out_ptr + to + 24, tl.reshape(tl.join(tl.join(a3, c3), tl.join(b3, d3)), (GROUPS * 2, 4)), mask=mask)
    if COLUMNS > 0:
        block = tl.program_id(0) - blocks
        if block >= 0:
            write_beside(
                tail_ptr, b_ptr, block * GROUPS, rows, row_stride, start, rank, width, scaling, GROUPS, COLUMNS
            )


_quantize, _unit = Launcher(_quantize_kernel), Launcher(_unit_kernel)
_dequantize = Launcher(_dequantize_kernel)
_dequantize_half, _dequantize_tiles = Launcher(_dequantize_half_kernel), Launcher(_dequantize_tiles_kernel)

HALF_GROUPS, TILE_GROUPS = 64, 128
"""Runs of 64 weights that a program of the 16-bit kernel takes, of codes row by row and in tiles."""


def half_kernel(tiled: bool) -> Launcher:
    """The 16-bit kernel for codes row by row, or in tiles."""
    return _dequantize_tiles if tiled else _dequantize_half


def _has_asm(t: torch.Tensor) -> bool:
    return t.is_cuda and torch.version.hip is None


def quantize_nf4(weight: torch.Tensor, blocksize: int = NF4_BLOCKSIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """As ``reference.nf4.quantize_nf4``, with the arithmetic of bitsandbytes' CUDA code; needs no temporaries.

    ``blocksize`` is a power of two.
    """
    flat = source(weight)
    numel, device = flat.numel(), flat.device
    codes = torch.empty((numel + 1) // 2, dtype=torch.uint8, device=device)
    absmax = torch.empty(-(-numel // blocksize), dtype=torch.float32, device=device)
    rows = max(1024 // blocksize, 1)
    grid = (triton.cdiv(absmax.numel(), rows),)
    with torch.cuda.device_of(flat):
        _quantize(
            grid, flat, nf4_cuda_boundaries(device), codes, absmax, numel, rows, blocksize, _has_asm(flat),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, absmax


def quantize_scales(
    absmax: torch.Tensor, blocksize: int = NESTED_BLOCKSIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As ``reference.nf4.quantize_scales``, with the arithmetic of bitsandbytes' CUDA code."""
    offset = absmax.mean()
    centred = absmax - offset
    nested_absmax = torch.empty(-(-absmax.numel() // blocksize), dtype=torch.float32, device=absmax.device)
    unit = torch.empty_like(centred)
    with torch.cuda.device_of(absmax):
        _unit(
            (nested_absmax.numel(),), centred, unit, nested_absmax, centred.numel(), blocksize, _has_asm(absmax),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return dynamic_codes(unit), nested_absmax, offset


def dynamic_codes(unit: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest levels of the dynamic map, uint8, of values in [-1, 1], float32, any shape.

    bitsandbytes' CUDA search ends on an even level and leaves it only for a level that is strictly nearer, so a tie
    goes to the even one; of NaN (0 * inf, in a block of zeros) no comparison holds, and it ends on code 0.
    """
    midpoints = dynamic_midpoints(unit.device)
    code = torch.bucketize(unit, midpoints, out_int32=True)
    nearest = midpoints.index_select(0, code.clamp(max=254).view(-1)).view(unit.shape)
    code += (unit == nearest) & (code % 2 == 1)
    return code.masked_fill_(unit.isnan(), 0).to(torch.uint8)


def dequantize_nf4(
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    *,
    nested_code: torch.Tensor | None = None,
    blocksize: int = NF4_BLOCKSIZE,
    nested_blocksize: int = NESTED_BLOCKSIZE,
    tiled: bool = False,
) -> torch.Tensor:
    """As ``reference.nf4.dequantize_nf4``."""
    numel = math.prod(shape)
    result = output(out, shape, dtype, codes.device)
    codes = codes.reshape(-1)
    nested = nested_blocksize if nested_absmax is not None and offset is not None else 0
    scale_args = scales_of(scales, nested_absmax, offset, nested_code)
    columns = max(result.shape[-1], 1) if result.dim() else 1
    pad = 0 if result.is_contiguous() else result.stride(0) - columns
    with torch.cuda.device_of(codes):
        if takes_half_kernel(codes, dtype, numel, blocksize, columns, pad) and result.data_ptr() % 16 == 0:
            words, groups = numel // 8, TILE_GROUPS if tiled else HALF_GROUPS
            blocks = triton.cdiv(words, groups * 8)
            pairs = (result if pad else result.view(-1)).view(torch.int32)
            half_kernel(tiled)(
                (blocks,), codes.view(torch.int32), *scale_args, pairs, words,
                columns // 64 if pad or tiled else words, pad // 2, pairs, pairs, blocks, 0, 0, 0, 0, 0, 1.0, groups,
                blocksize, nested, dtype == torch.bfloat16, 0, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            size = 1024
            _dequantize(
                (triton.cdiv((numel + 1) // 2, size),),
                codes, *scale_args, nf4_code(codes.device), result, numel, columns, pad, size, blocksize, nested,
                tiled, num_warps=4, enable_fp_fusion=False,
            )  # fmt: skip
    return result


def scales_of(
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_code: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scales, nested scales, their levels and the offset as a kernel takes them."""
    if nested_absmax is None or offset is None:  # the last three are not read then: any tensor will do
        return scales, scales, scales, scales
    return scales, nested_absmax, dynamic_code(scales.device) if nested_code is None else nested_code, offset


def takes_half_kernel(
    codes: torch.Tensor, dtype: torch.dtype, numel: int, blocksize: int, columns: int, pad: int
) -> bool:
    """Whether the 16-bit kernel can run: whole words, blocks of whole runs of 64, aligned, Ampere or newer; where rows
    lie apart, whole runs in a row and aligned rows. What it writes to must be aligned to 16 bytes as well.
    """
    return (
        _has_asm(codes)
        and dtype in (torch.bfloat16, torch.float16)
        and numel % 8 == 0
        and blocksize % 64 == 0
        and codes.data_ptr() % 4 == 0
        and (pad == 0 or (columns % 64 == 0 and pad % 8 == 0))
        and _capability(codes.device) >= (8, 0)
    )


@lru_cache(maxsize=32)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
