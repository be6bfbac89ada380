"""Maximum and sum of exponentials of a row of logits, by an order of its own that any number of programs can follow.

The log-probability that a trainer computes and the one that a sampler recorded have the same bits only if every sum
was taken in the same order, and the trainer gives a row to one program where the sampler spreads it over dozens. So:

- Column v belongs to lane ``v % block``. A lane goes down its columns in order and keeps its maximum and its sum of
  exponentials, rescaled as the maximum grows (Milakov and Gimelshein, arXiv:1805.02867). Lanes never meet here, so
  whoever does it, the bits are the same.
- Lanes are joined in groups of neighbours, then groups to the row, each time scaled to the maximum and rounded to a
  whole number of 2^-40. Whole numbers have the same sum in any order, by any layout of threads.

Kernels that use this are compiled without fusing products into sums (``enable_fp_fusion=False``), which a compiler may
do in one and not in the other.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # where maxima start: finite, so that a masked -inf is not -inf - -inf
ONE = tl.constexpr(1099511627776.0)  # 2^40; a sum over fewer than 2^22 columns stays below 2^62
_PROGRAM = 4096  # logits of a program that holds a group's columns of all blocks


class Partition(NamedTuple):
    """How a row of V columns is cut: lanes of a block, blocks of a row, lanes of a group."""

    block: int
    blocks: int
    group: int


def partition(V: int) -> Partition:
    """The cut of a row; a function of V alone, since log-probabilities' last bits depend on it."""
    block = min(max(triton.next_power_of_2(V), 128), 8192)
    blocks = triton.cdiv(V, block)
    return Partition(block, blocks, min(block, max(_PROGRAM // triton.next_power_of_2(blocks), 16)))


@triton.jit
def logit(x, bias_ptr, column, inside, scale, softcap, inverse_temperature, BIAS: tl.constexpr, CAP: tl.constexpr):
    """The distribution's logit ``z`` of each raw product, -inf outside of the row, and ``dz/dx`` (one, or one each)."""
    if BIAS:
        x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    slope = scale * inverse_temperature
    if CAP:
        u = x * (scale / softcap)
        decay = tl.exp(-2.0 * tl.abs(u))
        size = (1.0 - decay) / (1.0 + decay)
        z = tl.where(u < 0, -size, size) * (softcap * inverse_temperature)
        slope = slope * (1.0 - size * size)
    else:
        z = x * slope
    return tl.where(inside, z, float("-inf")), slope


@triton.jit
def follow(z, peaks, sums):
    """A lane's next logit: new maximum and sum; and whether it is higher, how far off, and the exponential of that."""
    higher = z > peaks
    distance = -tl.abs(z - peaks)
    factor = tl.exp(distance)  # NaN for a NaN, and for inf - inf: it stays in the sum
    new_sums = tl.where(higher, sums * factor + 1.0, sums + factor)
    return tl.where(higher, z, peaks), new_sums, higher, distance, factor


@triton.jit
def join_lanes(peaks, sums):
    """``[groups, lanes]`` to the maximum and sum of each group; the maximum of one with a NaN is infinite."""
    known = sums == sums
    tops = tl.max(tl.where(known, peaks, float("inf")), axis=1)
    parts = tl.where(known, sums * tl.exp(peaks - tops[:, None]), 0.0)
    parts = tl.where(parts == parts, parts, 0.0)
    return tops, tl.sum((parts * ONE).to(tl.int64), axis=1).to(tl.float32) * (1.0 / ONE)


@triton.jit
def join_groups(tops, totals):
    """``[groups]`` to the row's maximum, sum, and its logarithm, which is NaN where a logit was NaN or +inf."""
    peak = tl.max(tops, axis=0)
    parts = totals * tl.exp(tops - peak)
    parts = tl.where(parts == parts, parts, 0.0)
    total = tl.sum((parts * ONE).to(tl.int64), axis=0).to(tl.float32) * (1.0 / ONE)
    total = tl.where(peak == float("inf"), float("nan"), total)
    return peak, total, tl.log(total)
