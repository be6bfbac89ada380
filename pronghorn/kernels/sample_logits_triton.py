"""A row's logits as the sampling kernels see them: what is drawn from, and an order-preserving integer of each.

A row is read through a tuple ``row = (x, bias, scale, softcap, inverse_temperature, seen, penalty, tally, presence,
frequency, stops, early)``: the start of its logits, what :func:`pronghorn.kernels.row_stats_triton.logit` takes, the
bits of the ids that it holds, its repetition penalty, how often it drew each id, its presence and frequency penalties,
its stop ids, and whether it may not end yet. ``PENALTY`` says which penalties are read: 1 the repetition penalty, 2 the
other two, 3 all.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import triton
import triton.language as tl

from pronghorn.kernels.row_stats_triton import ONE, logit

OUTSIDE = tl.constexpr(-2147483648)  # key of what is no column of the row: below that of -inf


@triton.jit
def load_logits(row, column, inside, BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr):
    """``(z, y)`` at ``column``: the policy's logits, and after minimum length and penalties; -inf outside."""
    (x_ptr, bias_ptr, scale, softcap, inverse_temperature, seen_ptr, penalty, tally_ptr, presence, frequency, stops_ptr,
     early) = row  # fmt: skip
    x = tl.load(x_ptr + column, mask=inside, other=0.0)
    z, _slope = logit(x, bias_ptr, column, inside, scale, softcap, inverse_temperature, BIAS, CAP)
    y = z
    for s in range(STOPS):
        y = tl.where(early & (column == tl.load(stops_ptr + s)), float("-inf"), y)
    if PENALTY % 2 == 1:
        word = tl.load(seen_ptr + (column >> 5), mask=inside, other=0)
        penalised = tl.where(y > 0, tl.div_rn(y, penalty), y * penalty)
        y = tl.where(((word >> (column & 31)) & 1) != 0, penalised, y)
    if PENALTY >= 2:
        count = tl.load(tally_ptr + column, mask=inside, other=0)
        less = frequency * count.to(tl.float32) + tl.where(count > 0, presence, 0.0)
        y -= less * inverse_temperature
    return z, y


@triton.jit
def key_of(y):
    """An int32 in the order of the floats; both zeros have one."""
    bits = (y + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def mass_of(y, top):
    """``exp(y - top)`` in whole numbers of 2^-40; 0 where ``y <= top`` is not true, which the row's total tells."""
    p = tl.exp(y - top)
    return (tl.where(p <= 1.0, p, 0.0) * ONE).to(tl.int64)


@triton.jit
def number_at(masses, number):
    """Where the cumulative masses, in order, pass ``number`` (in [0, 1)) of their sum; and the sum.

    What has no mass is never the place, unless nothing has any.
    """
    whole = tl.sum(masses, axis=0)
    target = tl.minimum((number * whole.to(tl.float64)).to(tl.int64), whole - 1)
    return tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), axis=0), whole, target
