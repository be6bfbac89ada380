"""The Triton side of RMSNorm: kernels, launchers, and launch configurations as plain functions of shape.

The formulas are in ``rms_norm.py``.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.reference.rms_norm import normed_dtype


class Launch(NamedTuple):
    """Rows and (padded) columns of a program's tile, its warps, and how many programs share the weight's gradient."""

    rows: int
    columns: int
    num_warps: int
    weight_programs: int


def launch_config(D: int) -> Launch:
    """A tile of at least 2048 elements, 16 a thread, so that several 16-byte loads a thread are in flight."""
    columns = triton.next_power_of_2(D)
    rows = max(1, 2048 // columns)
    return Launch(rows, columns, min(max(rows * columns // 512, 4), 16), 256)


@triton.jit(do_not_specialize=["rows"])  # packed batches differ in length: one compilation serves all
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, normed_ptr, summed_ptr, rstd_ptr, rows, x_stride, residual_stride, normed_stride,
    eps, offset, D: tl.constexpr, RESIDUAL: tl.constexpr, CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    if CHAIN == 2:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = (row < rows)[:, None] & (column < D)
    dtype = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + column, mask=column < D, other=0.0)
    if RESIDUAL:
        # Past L1, which may know what lay there before the kernel that wrote it.
        residual = tl.load(
            residual_ptr + row[:, None] * residual_stride + column, mask=inside, other=0.0, cache_modifier=".cg"
        )
    if CHAIN:  # what was read up to here is older than the kernel before and the one before that
        gdc_wait()
    if CHAIN == 1:
        gdc_launch_dependents()
    x = tl.load(x_ptr + row[:, None] * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += residual.to(tl.float32)
        rounded = x.to(dtype)  # the norm reads the sum as the residual stream keeps it
        tl.store(summed_ptr + row[:, None] * D + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)
    unit = x * rstd[:, None]
    if CAST_FIRST:
        unit = unit.to(dtype).to(tl.float32)
    scale = weight.to(tl.float32) + offset
    normed = (unit * scale).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + row[:, None] * normed_stride + column, normed, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dnormed_ptr, dsummed_ptr, summed_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, rows,
    dnormed_stride, dsummed_stride, summed_stride, offset,
    D: tl.constexpr, RESIDUAL: tl.constexpr, CAST_FIRST: tl.constexpr, WEIGHT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, COLUMNS)[None, :]
    scale = tl.load(weight_ptr + column, mask=column < D, other=0.0).to(tl.float32) + offset
    dweight = tl.zeros((1, COLUMNS), dtype=tl.float32)
    tile = tl.program_id(0)
    while tile < tl.cdiv(rows, ROWS):  # a range over run-time values fails in the interpreter of Triton 3.6
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < D)
        x = tl.load(summed_ptr + row[:, None] * summed_stride + column, mask=inside, other=0.0)
        dnormed = tl.load(dnormed_ptr + row[:, None] * dnormed_stride + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        unit = x.to(tl.float32) * rstd
        dunit = dnormed * scale
        dx = rstd * (dunit - unit * (tl.sum(dunit * unit, axis=1) / D)[:, None])
        if RESIDUAL:
            dx += tl.load(dsummed_ptr + row[:, None] * dsummed_stride + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row[:, None] * D + column, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if WEIGHT:
            if CAST_FIRST:
                unit = unit.to(x.dtype).to(tl.float32)
            dweight += tl.sum(dnormed * unit, axis=0)[None, :]
        tile += tl.num_programs(0)
    if WEIGHT:
        tl.store(partial_ptr + tl.program_id(0) * D + column, dweight, mask=column < D)


_forward, _backward = Launcher(_forward_kernel, chains=True, hurries=True), Launcher(_backward_kernel)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` as ``[rows, D]`` with unit stride along D; a copy only where no view exists."""
    rows_RD = tensor.reshape(-1, tensor.shape[-1])
    return rows_RD if rows_RD.stride(1) == 1 or rows_RD.shape[1] == 1 else rows_RD.contiguous()


def rms_norm_forward(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None,
    offset: float,
    cast_before_scale: bool,
    out_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The Triton forward: as ``reference.rms_norm_forward``, with ``rstd`` in float32."""
    D = x_TD.shape[-1]
    x_RD = _rows(x_TD)
    residual_RD = x_RD if residual_TD is None else _rows(residual_TD)
    dtype = normed_dtype(x_TD.dtype, weight_D.dtype, cast_before_scale)
    normed_TD = torch.empty(x_TD.shape, dtype=dtype, device=x_TD.device) if out_TD is None else out_TD
    summed_TD = x_TD if residual_TD is None else torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    rstd_T = torch.empty(x_TD.shape[:-1], dtype=torch.float32, device=x_TD.device)
    rows = x_RD.shape[0]
    if rows == 0:
        return normed_TD, summed_TD, rstd_T
    config = launch_config(D)
    with torch.cuda.device_of(x_TD):
        _forward(
            (triton.cdiv(rows, config.rows),), x_RD, residual_RD, weight_D, normed_TD, summed_TD, rstd_T, rows,
            x_RD.stride(0), residual_RD.stride(0), D if out_TD is None else out_TD.stride(0), eps, offset,
            D, residual_TD is not None, cast_before_scale, config.rows, config.columns, num_warps=config.num_warps,
        )  # fmt: skip
    return normed_TD, summed_TD, rstd_T


def rms_norm_backward(
    dnormed_TD: torch.Tensor,
    dsummed_TD: torch.Tensor | None,
    summed_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
    offset: float,
    cast_before_scale: bool,
    weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The Triton backward: as ``reference.rms_norm_backward``."""
    D = summed_TD.shape[-1]
    summed_RD, dnormed_RD = _rows(summed_TD), _rows(dnormed_TD)
    dsummed_RD = dnormed_RD if dsummed_TD is None else _rows(dsummed_TD)
    dx_TD = torch.empty(summed_TD.shape, dtype=summed_TD.dtype, device=summed_TD.device)
    config = launch_config(D)
    rows = summed_RD.shape[0]
    tiles = triton.cdiv(rows, config.rows)
    programs = min(tiles, config.weight_programs) if weight_gradient else tiles
    partial_PD = torch.empty((programs if weight_gradient else 0, D), dtype=torch.float32, device=summed_TD.device)
    if rows > 0:
        with torch.cuda.device_of(summed_TD):
            _backward(
                (programs,), dnormed_RD, dsummed_RD, summed_RD, weight_D, rstd_T, dx_TD, partial_PD, rows,
                dnormed_RD.stride(0), dsummed_RD.stride(0), summed_RD.stride(0), offset, D,
                dsummed_TD is not None, cast_before_scale, weight_gradient, config.rows, config.columns,
                num_warps=config.num_warps,
            )  # fmt: skip
    return dx_TD, partial_PD.sum(0).to(weight_D.dtype) if weight_gradient else None
