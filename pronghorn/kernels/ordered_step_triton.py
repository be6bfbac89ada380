"""The arithmetic of ordered attention, shared by every kernel that computes it: what makes their results equal bits.

``ordered_attention.py`` defines the order. Kernels that use these helpers are compiled with ``enable_fp_fusion=False``:
whether a product and a sum become one rounding must not depend on what stands around them.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import triton
import triton.language as tl

COLUMNS = tl.constexpr(16)
"""The row sums come from the tensor core as a product with ones, this wide: all columns are equal."""


@triton.jit
def finite(peak):
    """The exponent's reference: 0 where no key has been seen, as -inf minus -inf is NaN."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def tile_step(q, k, v, ones, seen, partial, scale, peak, total, acc):
    """One tile of keys into a segment's running softmax; a tile without a seen key changes no bit.

    q ``[M, E]``, k and v ``[TILE, E]``, ones ``[TILE, COLUMNS]`` in v's dtype, seen ``[M, TILE]`` (or broadcast to it),
    read where the scalar ``partial`` says that a key may be hidden; ``scale`` > 0 times log2(e). Peak ``[M]``, total
    ``[M, COLUMNS]`` and acc ``[M, E]`` are float32; with a peak of -inf, total and acc count as 0 if they are finite.
    """
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if partial:
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(peak, tl.max(s, axis=1) * scale)
    base = finite(higher)
    decay = tl.exp2(peak - base)
    p = tl.exp2(tl.fma(s, scale, -base[:, None])).to(v.dtype)
    total = tl.dot(p, ones, total * decay[:, None], input_precision="ieee")
    acc = tl.dot(p, v, acc * decay[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def merge_step(peak, total, acc, next_peak, next_total, next_acc):
    """The next segment into those before it; a segment without a seen key changes no bit.

    Of M rows: peaks ``[M]``, totals ``[M, any]``, accs ``[M, E]``, all float32.
    """
    higher = tl.maximum(peak, next_peak)
    base = finite(higher)
    old = tl.exp2(peak - base)[:, None]
    new = tl.exp2(next_peak - base)[:, None]
    return higher, total * old + next_total * new, acc * old + next_acc * new


@triton.jit
def finish(total, acc):
    """o ``[M, E]`` in float32 of rows with ``total`` ``[M]``; 0 for a row that saw no key."""
    return tl.div_rn(acc, tl.where(total == 0.0, 1.0, total)[:, None])
