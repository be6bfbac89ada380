"""The Triton side of the logits of a chunk: one program a row, two sweeps, the gradient written over the logits.

The formulas are in ``logits.py``. The first sweep goes up the row, the second down, so that it starts with what the L2
cache still holds: a row of 128,256 floats is 0.5 MB, and one program fills an SM, so 68 MB of rows are under way.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.row_stats_triton import LOWEST, follow, join_groups, join_lanes, logit, partition


def launch_config(V: int) -> tuple[int, int]:
    """Columns of a block, 8 of them a thread at full size, and warps: 32 KB a block, another one on its way."""
    block = partition(V).block
    return block, min(max(block // 256, 1), 32)


@triton.jit
def _stats_kernel(
    x_ptr, gradient_ptr, targets_ptr, bias_ptr, weights_ptr, entropy_weights_ptr, logps_ptr, entropy_ptr,
    weights_stride, entropy_weights_stride, scale, softcap, inverse_temperature, ignore_index,
    V: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, IGNORE: tl.constexpr, WEIGHTS: tl.constexpr,
    ENTROPY: tl.constexpr, ENTROPY_WEIGHTS: tl.constexpr, GRADIENT: tl.constexpr, NARROW: tl.constexpr,
    BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * V
    lanes = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    known = (target >= 0) & (target < V)
    # Read before anything is written. An unknown target's log-probability is NaN, not that of some other token.
    chosen = tl.load(x_row + target, mask=known, other=float("nan"))
    chosen, _slope = logit(chosen, bias_ptr, target, known, scale, softcap, inverse_temperature, BIAS, CAP)
    chosen = tl.where(known, chosen, float("nan"))

    # Each lane keeps its own maximum, sum and weighted sum: one exponential an element, and no exchange between threads
    # before the end.
    peaks = tl.full((BLOCK,), LOWEST, dtype=tl.float32)
    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    moments = tl.zeros((BLOCK,), dtype=tl.float32)
    ahead = tl.load(x_row + lanes, mask=lanes < V, other=0.0)
    for block in range(BLOCKS):
        x = ahead
        column = block * BLOCK + lanes
        ahead = tl.load(x_row + column + BLOCK, mask=column + BLOCK < V, other=0.0)
        z, _slopes = logit(x, bias_ptr, column, column < V, scale, softcap, inverse_temperature, BIAS, CAP)
        new_peaks, new_sums, higher, distance, factor = follow(z, peaks, sums)
        if ENTROPY:
            distance = tl.maximum(distance, -200.0)  # the factor is 0 there, and 0 * -inf is not 0
            moments = tl.where(higher, factor * (moments + sums * distance), moments + factor * distance)
        peaks, sums = new_peaks, new_sums
    tops, totals = join_lanes(tl.reshape(peaks, (BLOCK // GROUP, GROUP)), tl.reshape(sums, (BLOCK // GROUP, GROUP)))
    peak, total, log_total = join_groups(tops, totals)
    logp = (chosen - peak) - log_total
    ignored = target == ignore_index
    if IGNORE:
        logp = tl.where(ignored, 0.0, logp)
    tl.store(logps_ptr + row, logp)
    if ENTROPY:
        distance = peaks - peak
        factor = tl.exp(distance)
        moment = tl.sum(factor * (moments + sums * tl.maximum(distance, -200.0)), axis=0)
        entropy = log_total - moment / total
        tl.store(entropy_ptr + row, entropy)

    if GRADIENT:
        row_weight = tl.where(known, 1.0, float("nan"))
        if WEIGHTS:
            row_weight *= tl.load(weights_ptr + row * weights_stride).to(tl.float32)
        if ENTROPY_WEIGHTS:
            entropy_weight = tl.load(entropy_weights_ptr + row * entropy_weights_stride).to(tl.float32)
        # A narrow gradient lies in the back half of its row: V values of 2 bytes, from byte 2V of the row's 4V on.
        # Blocks run downwards, and a block that starts at column k writes no byte below 2V + 2k. Columns below k, all
        # that is still to be read, end at byte 4k, and 4k <= 2V + 2k since k <= V. So a write meets columns of its own
        # block and of those above it only, and these have been read: by each thread before it reaches the barrier, and
        # no thread writes before all have reached it. Reading a block ahead only makes that earlier. (No write leaves
        # its row, so programs do not meet; a wide gradient takes the place of its own column.)
        out_row = gradient_ptr + (row * 2 * V + V if NARROW else row * V)
        first: tl.constexpr = (BLOCKS - 1) * BLOCK
        ahead = tl.load(x_row + first + lanes, mask=first + lanes < V, other=0.0)
        for block in range(BLOCKS):
            x = ahead
            column = first - block * BLOCK + lanes
            ahead = tl.load(x_row + column - BLOCK, mask=column >= BLOCK, other=0.0)
            z, slope = logit(x, bias_ptr, column, column < V, scale, softcap, inverse_temperature, BIAS, CAP)
            log_p = (z - peak) - log_total
            p = tl.exp(log_p)
            d = tl.where(column == target, 1.0 - p, -p) * slope * row_weight
            if ENTROPY_WEIGHTS:  # p is 0 below a log of -104, and 0 * -inf is not 0
                d -= p * (tl.maximum(log_p, -200.0) + entropy) * slope * entropy_weight
            if IGNORE:
                d = tl.where(ignored, 0.0, d)
            tl.debug_barrier()
            tl.store(out_row + column, d.to(gradient_ptr.dtype.element_ty), mask=column < V)


_stats = Launcher(_stats_kernel)


def logit_stats_(
    x_CV: torch.Tensor,
    targets_C: torch.Tensor,
    bias_V: torch.Tensor | None,
    weights_C: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int | None,
    with_entropy: bool,
    gradient: torch.dtype | None,
    entropy_weights_C: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As :func:`pronghorn.kernels.logits.logit_stats_`; overwrites ``x_CV`` where a gradient is asked."""
    C, V = x_CV.shape
    if x_CV.dtype != torch.float32 or gradient not in (None, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"the logits kernel takes float32 and gives float32 or 16 bits, not {x_CV.dtype} to {gradient}"
        )
    logps_C = x_CV.new_empty(C)
    entropy_C = x_CV.new_empty(C) if with_entropy else None
    narrow = gradient not in (None, torch.float32)
    written = x_CV.view(gradient) if narrow and gradient is not None else x_CV
    if C:
        block, num_warps = launch_config(V)
        with torch.cuda.device_of(x_CV):
            _stats(
                (C,), x_CV, written, targets_C.contiguous(), bias_V, weights_C, entropy_weights_C, logps_C, entropy_C,
                0 if weights_C is None else weights_C.stride(0),
                0 if entropy_weights_C is None else entropy_weights_C.stride(0),
                float(scale), float(softcap or 1), 1 / temperature, -1 if ignore_index is None else ignore_index,
                V, bias_V is not None, softcap is not None, ignore_index is not None, weights_C is not None,
                with_entropy, entropy_weights_C is not None, gradient is not None, narrow, block, partition(V).group,
                num_warps=num_warps, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip
    gradient_CV = None if gradient is None else written[:, V:] if narrow else x_CV
    return logps_C, entropy_C, gradient_CV
