"""The Triton side of rotary embedding: kernels, launchers, and launch configurations as plain functions of shape.

The formulas are in ``rope.py``.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher


class Launch(NamedTuple):
    """Query heads, key heads and (padded) half head dimensions in a program's tiles, and its warps."""

    q_heads: int
    k_heads: int
    half: int
    num_warps: int


def launch_config(q_heads: int, k_heads: int, rotary_dim: int) -> Launch:
    """One program a token; up to 2048 pairs at a time, at most 16 a thread."""
    half = triton.next_power_of_2(rotary_dim // 2)
    most = max(1, 2048 // half)
    q_block, k_block = (min(triton.next_power_of_2(max(heads, 1)), most) for heads in (q_heads, k_heads))
    return Launch(q_block, k_block, half, min(max(q_block * half // 512, 1), 4))


@triton.jit
def rotated(left, right, cos, sin):
    """The pair after its rotation, in float32. Compiled without fused multiply-add, so that all kernels round alike."""
    return left * cos - right * sin, right * cos + left * sin


@triton.jit
def rotate_heads(
    x_ptr, head_stride, out_ptr, out_head_stride, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK_HALF)[None, :]
    for first in range(0, HEADS, BLOCK_HEADS):
        head = (first + tl.arange(0, BLOCK_HEADS)[:, None]).to(tl.int64)  # heads first: a head's stride is T * E
        inside = (head < HEADS) & (column < HALF)
        left_ptr = x_ptr + head * head_stride + column
        out_left_ptr = out_ptr + head * out_head_stride + column
        left = tl.load(left_ptr, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(left_ptr + HALF, mask=inside, other=0.0).to(tl.float32)
        # A tile smaller than the program is loaded by several threads: none may store before all have loaded.
        tl.debug_barrier()
        new_left, new_right = rotated(left, right, cos, sin)
        tl.store(out_left_ptr, new_left.to(x_ptr.dtype.element_ty), mask=inside)
        tl.store(out_left_ptr + HALF, new_right.to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rope_kernel(
    q_ptr, k_ptr, out_q_ptr, out_k_ptr, cos_ptr, sin_ptr, positions_ptr, q_stride, q_head_stride, k_stride,
    k_head_stride, out_q_stride, out_q_head_stride, out_k_stride, out_k_head_stride, cos_stride, sin_stride,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr,
    TABLE: tl.constexpr, TRANSPOSE: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    at = token
    if TABLE:
        at = tl.load(positions_ptr + token).to(tl.int64)
    column = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + at * cos_stride + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + at * sin_stride + column, mask=column < HALF, other=0.0).to(tl.float32)[None, :]
    if TRANSPOSE:
        sin = -sin
    rotate_heads(
        q_ptr + token * q_stride, q_head_stride, out_q_ptr + token * out_q_stride, out_q_head_stride, cos, sin,
        Q_HEADS, HALF, Q_BLOCK, BLOCK_HALF,
    )  # fmt: skip
    rotate_heads(
        k_ptr + token * k_stride, k_head_stride, out_k_ptr + token * out_k_stride, out_k_head_stride, cos, sin,
        K_HEADS, HALF, K_BLOCK, BLOCK_HALF,
    )  # fmt: skip


_rope = Launcher(_rope_kernel)


def rotate_(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    positions_T: torch.Tensor | None,
    transpose: bool,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """The Triton kernel: as ``reference.rotate_``."""
    out_q_THE, out_k_TKE = (q_THE, k_TKE) if out is None else out
    T, H, _ = q_THE.shape
    K, R = k_TKE.shape[1], cos_TE.shape[1]
    if T == 0:
        return
    config = launch_config(H, K, R)
    with torch.cuda.device_of(q_THE):
        _rope(
            (T,), q_THE, k_TKE, out_q_THE, out_k_TKE, cos_TE, sin_TE, cos_TE if positions_T is None else positions_T,
            q_THE.stride(0), q_THE.stride(1), k_TKE.stride(0), k_TKE.stride(1),
            out_q_THE.stride(0), out_q_THE.stride(1), out_k_TKE.stride(0), out_k_TKE.stride(1),
            cos_TE.stride(0), sin_TE.stride(0), H, K, R // 2, positions_T is not None, transpose,
            config.q_heads, config.k_heads, config.half, num_warps=config.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    # A kernel's write is invisible to autograd: count it, so that a use of what was overwritten raises.
    torch.autograd.graph.increment_version([t for t in (out_q_THE, out_k_TKE) if not t.is_inference()])
