"""The Triton side of gated linear units: kernels, launchers, and launch configurations as plain functions of shape.

The formulas are in ``glu.py``.
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


class Launch(NamedTuple):
    """Rows and columns of a program's tile, and its warps."""

    rows: int
    columns: int
    num_warps: int


def launch_config(columns: int) -> Launch:
    """1024 elements, 8 a thread: one 16-byte load of each input in 16 bits, and full occupancy."""
    block = min(triton.next_power_of_2(columns), 1024)
    return Launch(1024 // block, block, 4)


@triton.jit
def _value_and_slope(gate, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    elif ACTIVATION == "gelu_pytorch_tanh":
        square = gate * gate
        sigmoid = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * gate * (1.0 + 0.044715 * square)))  # 2 sqrt(2 / pi)
        value = gate * sigmoid
        slope = sigmoid + value * (1.0 - sigmoid) * 1.5957691216057308 * (1.0 + 0.134145 * square)
    else:
        cdf = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        value = gate * cdf
        slope = cdf + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327  # 1 / sqrt(2 pi)
    return value, slope


@triton.jit
def _tile(rows, COLUMNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row and column indices and mask; neighbouring programs read neighbouring columns."""
    blocks = tl.cdiv(COLUMNS, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (program % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return row, column, (row < rows) & (column < COLUMNS)


@triton.jit(do_not_specialize=["rows"])  # packed batches differ in length: one compilation serves all
def _forward_kernel(
    gate_ptr, up_ptr, h_ptr, rows, gate_stride, up_stride, h_stride,
    COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    if CHAIN == 2:
        gdc_launch_dependents()
    if CHAIN:
        gdc_wait()
    if CHAIN == 1:
        gdc_launch_dependents()
    row, column, inside = _tile(rows, COLUMNS, ROWS, BLOCK)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = _value_and_slope(gate, ACTIVATION)
    tl.store(h_ptr + row * h_stride + column, (value * up).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_ptr, rows, dh_stride, gate_stride, up_stride, dgate_stride,
    dup_stride, COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, WANT_H: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, COLUMNS, ROWS, BLOCK)
    dtype = gate_ptr.dtype.element_ty
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(gate, ACTIVATION)
    tl.debug_barrier()  # outputs may lie over inputs: none is stored before all are loaded, whichever thread does which
    tl.store(dgate_ptr + row * dgate_stride + column, (dh * up * slope).to(dtype), mask=inside)
    tl.store(dup_ptr + row * dup_stride + column, (dh * value).to(dtype), mask=inside)
    if WANT_H:
        tl.store(h_ptr + row * COLUMNS + column, (value * up).to(dtype), mask=inside)


_forward, _backward = Launcher(_forward_kernel, chains=True, hurries=True), Launcher(_backward_kernel)


def _rows(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """``[..., I]`` as a ``[rows, I]`` view, never a copy: these are written through."""
    rows_RI = None
    if tensor.shape[-1] == 1 or tensor.stride(-1) == 1:
        rows_RI = tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)
    if rows_RI is None or rows_RI.data_ptr() != tensor.data_ptr():
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} and strides {tensor.stride()} is no view of evenly spaced rows; "
            f"give {name}.contiguous()"
        )
    return rows_RI


def glu_forward(
    gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str, out_TI: torch.Tensor | None = None
) -> torch.Tensor:
    """The Triton forward: as ``reference.glu_forward``."""
    h_TI = torch.empty(gate_TI.shape, dtype=gate_TI.dtype, device=gate_TI.device) if out_TI is None else out_TI
    if h_TI.numel() == 0:
        return h_TI
    gate_RI, up_RI, h_RI = _rows("gate", gate_TI), _rows("up", up_TI), _rows("out", h_TI)
    rows, columns = gate_RI.shape
    config = launch_config(columns)
    with torch.cuda.device_of(gate_TI):
        _forward(
            (triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns),),
            gate_RI, up_RI, h_RI, rows, gate_RI.stride(0), up_RI.stride(0), h_RI.stride(0), columns, activation,
            config.rows, config.columns, num_warps=config.num_warps,
        )  # fmt: skip
    return h_TI


def glu_backward(
    dh_TI: torch.Tensor,
    gate_TI: torch.Tensor,
    up_TI: torch.Tensor,
    dgate_TI: torch.Tensor,
    dup_TI: torch.Tensor,
    h_TI: torch.Tensor | None,
    activation: str,
) -> None:
    """The Triton backward: as ``reference.glu_backward``; ``h_TI``, where given, is contiguous."""
    if gate_TI.numel() == 0:
        return
    if dh_TI.stride(-1) != 1 or dh_TI.dim() > 2:
        dh_TI = dh_TI.contiguous()  # an expanded gradient, say
    dh_RI, gate_RI, up_RI = _rows("dh", dh_TI), _rows("gate", gate_TI), _rows("up", up_TI)
    dgate_RI, dup_RI = _rows("dgate", dgate_TI), _rows("dup", dup_TI)
    rows, columns = gate_RI.shape
    config = launch_config(columns)
    with torch.cuda.device_of(gate_TI):
        _backward(
            (triton.cdiv(rows, config.rows) * triton.cdiv(columns, config.columns),),
            dh_RI, gate_RI, up_RI, dgate_RI, dup_RI, gate_RI if h_TI is None else h_TI, rows,
            dh_RI.stride(0), gate_RI.stride(0), up_RI.stride(0), dgate_RI.stride(0), dup_RI.stride(0),
            columns, activation, h_TI is not None, config.rows, config.columns, num_warps=config.num_warps,
        )  # fmt: skip
    # A kernel's write is invisible to autograd: count it, so that a second use of what was overwritten raises.
    torch.autograd.graph.increment_version([t for t in (dgate_TI, dup_TI) if not t.is_inference()])
