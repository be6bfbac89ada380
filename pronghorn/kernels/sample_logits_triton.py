"""A row's logits as the sampling kernels see them: the distribution drawn from, and an order-preserving integer of each."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import triton
import triton.language as tl

from pronghorn.kernels.row_stats_triton import ONE, logit

OUTSIDE = tl.constexpr(-2147483648)  # key of what is no column of the row: below that of -inf


@triton.jit
def drawn_logit(
    z, column, inside, seen_row, penalty, stops_row, early, PENALTY: tl.constexpr, STOPS: tl.constexpr
):  # fmt: skip
    """The policy's logit z after minimum length (``early``: the row may not end yet) and repetition penalty."""
    y = z
    for s in range(STOPS):
        y = tl.where(early & (column == tl.load(stops_row + s)), float("-inf"), y)
    if PENALTY:
        word = tl.load(seen_row + (column >> 5), mask=inside, other=0)
        penalised = tl.where(y > 0, tl.div_rn(y, penalty), y * penalty)
        y = tl.where(((word >> (column & 31)) & 1) != 0, penalised, y)
    return y


@triton.jit
def load_logits(
    x_row, bias_ptr, column, inside, scale, softcap, inverse_temperature, seen_row, penalty, stops_row, early,
    BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """``(z, y)`` at ``column``: the policy's logits and those drawn from; -inf where not ``inside``."""
    x = tl.load(x_row + column, mask=inside, other=0.0)
    z, _slope = logit(x, bias_ptr, column, inside, scale, softcap, inverse_temperature, BIAS, CAP)
    return z, drawn_logit(z, column, inside, seen_row, penalty, stops_row, early, PENALTY, STOPS)


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
