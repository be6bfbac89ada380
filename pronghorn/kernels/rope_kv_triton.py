"""The Triton side of the fused rotation and cache write of a decode step; see ``rope_kv.py``."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.rope_triton import rotate_heads, rotated


@triton.jit(do_not_specialize=["N", "P", "table_stride"])
def _rope_kv(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, places_ptr, positions_ptr,
    q_stride, k_stride, v_stride, cos_stride, sin_stride, table_stride, N, P,
    K: tl.constexpr, R: tl.constexpr, E: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr,
    BLOCK_E: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """One kv head of one row with its R query heads. SLOTS: places are slots, not tables of blocks."""
    if CHAIN:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(1)
    b = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + b)
    if (position >= 0) & (position < N * PAGE) & (position < P):
        if SLOTS:
            place = tl.load(places_ptr + b).to(tl.int64)
        else:
            page = tl.load(places_ptr + b * table_stride + position // PAGE).to(tl.int64)
            place = page * PAGE + position % PAGE
        slot = (place * K + head) * E
        column = tl.arange(0, BLOCK_HALF)
        inside = column < HALF
        at = position.to(tl.int64)
        cos = tl.load(cos_ptr + at * cos_stride + column, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + at * sin_stride + column, mask=inside, other=0.0).to(tl.float32)
        k_at = k_ptr + b * k_stride + head * E
        left = tl.load(k_at + column, mask=inside, other=0.0).to(tl.float32)
        right = tl.load(k_at + HALF + column, mask=inside, other=0.0).to(tl.float32)
        e = tl.arange(0, BLOCK_E)
        v = tl.load(v_ptr + b * v_stride + head * E + e, mask=e < E)
        q_at = q_ptr + b * q_stride + head * R * E
        rotate_heads(q_at, E, q_at, E, cos[None, :], sin[None, :], R, HALF, BLOCK_R, BLOCK_HALF)
        # Its barrier stands between these loads and stores too: a small tile is loaded by several threads.
        new_left, new_right = rotated(left, right, cos, sin)
        new_left = new_left.to(k_ptr.dtype.element_ty)
        new_right = new_right.to(k_ptr.dtype.element_ty)
        tl.store(k_at + column, new_left, mask=inside)
        tl.store(k_at + HALF + column, new_right, mask=inside)
        tl.store(k_cache_ptr + slot + column, new_left, mask=inside)
        tl.store(k_cache_ptr + slot + HALF + column, new_right, mask=inside)
        if 2 * HALF < E:
            rest = 2 * HALF + tl.arange(0, BLOCK_REST)
            tl.store(k_cache_ptr + slot + rest, tl.load(k_at + rest, mask=rest < E), mask=rest < E)
        tl.store(v_cache_ptr + slot + e, v, mask=e < E)


_launch = Launcher(_rope_kv, chains=True)


def rope_and_write_kv(
    q_BHE: torch.Tensor,
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    cos_PE: torch.Tensor,
    sin_PE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    places: torch.Tensor,
    positions_B: torch.Tensor,
) -> None:
    """See :func:`pronghorn.kernels.rope_kv.rope_and_write_kv`."""
    (B, H, E), K, (P, rotary) = q_BHE.shape, k_BKE.shape[1], cos_PE.shape
    if not q_BHE.numel():
        return
    R, half = H // K, rotary // 2
    block_half, block_rest, block_e = (int(triton.next_power_of_2(max(n, 1))) for n in (half, E - rotary, E))
    block_r = min(int(triton.next_power_of_2(R)), max(1, 512 // block_half))  # at most 16 pairs a thread
    slots = places.ndim == 1
    N = -(-P // k_cache.shape[1]) if slots else places.shape[1]  # of slots any position holds that has angles
    with torch.cuda.device_of(q_BHE):
        _launch(
            (B, K), q_BHE, k_BKE, v_BKE, cos_PE, sin_PE, k_cache, v_cache, places, positions_B,
            q_BHE.stride(0), k_BKE.stride(0), v_BKE.stride(0), cos_PE.stride(0), sin_PE.stride(0),
            places.stride(0), N, P, K, R, E, half, k_cache.shape[1], slots,
            block_r, block_half, block_rest, block_e,
            num_warps=1, enable_fp_fusion=False,
        )  # fmt: skip
    # A kernel's write is invisible to autograd: count it, so that a use of what was overwritten raises.
    torch.autograd.graph.increment_version([t for t in (q_BHE, k_BKE) if not t.is_inference()])
