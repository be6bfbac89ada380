"""Where top-k, top-p and min-p cut a row: the least logit that stays, found without sorting. One program a row.

A cut is the greatest key t (an integer in the order of the logits) such that the logits at or above it are k at least,
or weigh p of the whole at least. Counts and masses are whole numbers, so each such question has one answer, however the
row is walked. The first kernel counted, for each whole logit below the maximum, how many logits lie above it: that
brackets the cut from below, mostly with few logits inside. They are gathered, in the order of ids, and the bracket is
halved until one key is left. Where they are too many, sweeps over the row narrow the bracket to a quarter each, first.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import triton
import triton.language as tl

from pronghorn.kernels.row_stats_triton import ONE
from pronghorn.kernels.sample_logits_triton import OUTSIDE, key_of, load_logits, mass_of

LEVELS = tl.constexpr(32)  # whole logits below the maximum whose counts the first kernel gives; the last counts all


@triton.jit
def list_chunks(chunk_peaks, lowest, list_ptr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr):
    """Write the numbers of the chunks that hold a key of ``lowest`` or more, in order; their count."""
    chunk = tl.arange(0, CHUNKS_P2)
    active = (key_of(chunk_peaks) >= lowest) & (chunk < CHUNKS)
    flags = active.to(tl.int32)
    tl.debug_barrier()  # the list before may still be read
    tl.store(list_ptr + tl.cumsum(flags, 0) - 1, chunk, mask=active)
    tl.debug_barrier()
    return tl.sum(flags, axis=0)


@triton.jit
def chunk_tile(
    row, tile, active, list_ptr, V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """TILE listed chunks: their numbers, which of them there are, and ``[TILE, GROUP]`` columns, logits and keys."""
    P: tl.constexpr = BLOCK // GROUP
    r = tile * TILE + tl.arange(0, TILE)
    chunk = tl.load(list_ptr + r, mask=r < active, other=0)
    column = ((chunk // P) * BLOCK + (chunk % P) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    inside = (r < active)[:, None] & (column < V)
    _z, y = load_logits(row, column, inside, BIAS, CAP, PENALTY, STOPS)
    return chunk, r < active, column, y, tl.where(inside, key_of(y), OUTSIDE)


@triton.jit
def _first_guess(above_ptr, tops, top, lowest, target, whole, by_count, V: tl.constexpr, P: tl.constexpr):
    """A bracket's likely lower end, and how many logits lie at or above it.

    ``above_ptr[g, i]`` counts group g's logits at or above ``floor(tops[g]) - i``. By mass, what lies below a level
    weighs at most what it would if each logit stood at the upper end of its unit.
    """
    i = tl.arange(0, LEVELS)
    g = tl.arange(0, P)
    shift = tl.minimum(tl.floor(top) - tl.floor(tops), 64.0).to(tl.int32)[:, None]
    at = above_ptr + g[:, None] * LEVELS
    here = i[None, :] - shift
    above = tl.sum(tl.load(at + here, mask=here >= 0, other=0), axis=0)
    above = tl.where(i == LEVELS - 1, V, above)
    before = tl.sum(tl.load(at + here - 1, mask=here >= 1, other=0), axis=0)
    bound = (above - before).to(tl.float32) * tl.exp(tl.floor(top) - top - (i - 1).to(tl.float32))
    bound = tl.where(i == 0, 0.0, bound)
    below = tl.sum(bound, axis=0) - tl.cumsum(bound, 0)
    slack = (whole - target).to(tl.float32) * (1.0 / ONE)
    enough = tl.where(by_count, above >= target, below <= slack)
    level = tl.minimum(tl.sum(1 - enough.to(tl.int32), axis=0), LEVELS - 1)
    key = key_of(tl.floor(top) - level.to(tl.float32)).to(tl.int64)
    guess = tl.where(level == LEVELS - 1, lowest, tl.maximum(key, lowest))
    return guess, tl.sum(tl.where(i == level, above, 0), axis=0).to(tl.int64)


@triton.jit
def _weigh(
    row, active, list_ptr, top, level0, level1, level2, level3,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """Counts and masses at or above four keys, over the listed chunks."""
    # The counts of two levels share an int32: a lane sees fewer than 32,768 tiles.
    counts01 = tl.zeros((TILE, GROUP), tl.int32)
    counts23 = tl.zeros((TILE, GROUP), tl.int32)
    mass0 = tl.zeros((TILE, GROUP), tl.int64)
    mass1 = tl.zeros((TILE, GROUP), tl.int64)
    mass2 = tl.zeros((TILE, GROUP), tl.int64)
    mass3 = tl.zeros((TILE, GROUP), tl.int64)
    for tile in range((active + TILE - 1) // TILE):
        _chunk, _real, _column, y, keys = chunk_tile(
            row, tile, active, list_ptr, V, BLOCK, GROUP, TILE, BIAS, CAP, PENALTY, STOPS
        )
        masses = mass_of(y, top)
        over0, over1 = keys >= level0.to(tl.int32), keys >= level1.to(tl.int32)
        over2, over3 = keys >= level2.to(tl.int32), keys >= level3.to(tl.int32)
        counts01 += over0.to(tl.int32) + (over1.to(tl.int32) << 16)
        counts23 += over2.to(tl.int32) + (over3.to(tl.int32) << 16)
        mass0 += tl.where(over0, masses, 0)
        mass1 += tl.where(over1, masses, 0)
        mass2 += tl.where(over2, masses, 0)
        mass3 += tl.where(over3, masses, 0)
    c0, c1 = tl.sum(counts01 & 65535).to(tl.int64), tl.sum(counts01 >> 16).to(tl.int64)
    c2, c3 = tl.sum(counts23 & 65535).to(tl.int64), tl.sum(counts23 >> 16).to(tl.int64)
    return c0, c1, c2, c3, tl.sum(mass0), tl.sum(mass1), tl.sum(mass2), tl.sum(mass3)


@triton.jit
def _gather(
    row, active, list_ptr, values_ptr, ids_ptr, low, high,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """Write the logits with keys in ``[low, high)`` and their ids, in the order of ids; how many there are."""
    found = tl.zeros([], tl.int32)
    for tile in range((active + TILE - 1) // TILE):
        _chunk, _real, column, y, keys = chunk_tile(
            row, tile, active, list_ptr, V, BLOCK, GROUP, TILE, BIAS, CAP, PENALTY, STOPS
        )
        chosen = (keys >= low.to(tl.int32)) & (keys < high.to(tl.int32))
        chosen = tl.reshape(chosen.to(tl.int32), (TILE * GROUP,))
        place = found + tl.cumsum(chosen, 0) - 1
        fits = (chosen != 0) & (place < ROOM)
        tl.store(values_ptr + place, tl.reshape(y, (TILE * GROUP,)), mask=fits)
        tl.store(ids_ptr + place, tl.reshape(column, (TILE * GROUP,)), mask=fits)
        found += tl.sum(chosen, axis=0)
    tl.debug_barrier()
    return found


@triton.jit
def load_gathered(values_ptr, held, top, ROOM: tl.constexpr):
    """Keys and masses of what was gathered."""
    slot = tl.arange(0, ROOM)
    values = tl.load(values_ptr + slot, mask=slot < held, other=float("-inf"))
    return tl.where(slot < held, key_of(values), OUTSIDE), tl.where(slot < held, mass_of(values, top), 0)


@triton.jit
def _halve(keys, weights, low, high, missing):
    """The greatest key of ``[low, high)`` at or above which the weights come to ``missing``; ``low`` is one such."""
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum(tl.where(keys >= middle.to(tl.int32), weights, 0), axis=0) >= missing
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    return low


@triton.jit
def search(
    row, lowest, target, whole, by_count, top, tops, held, chunk_peaks, above_ptr, list_ptr, values_ptr, ids_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr,
    TILE: tl.constexpr, ROOM: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr,
    STOPS: tl.constexpr,
):  # fmt: skip
    """The greatest key from ``lowest`` on at or above which lies ``target`` (else ``lowest``), and the mass there.

    The cut is in ``[low, high)``. At or above ``high`` lie ``high_count`` and ``high_mass``, less than the target, and
    about ``inside`` logits lie between the two. ``held`` logits (-1: none yet) are gathered: all from some key on that
    is not above ``lowest``; the third result is that number after this search.
    """
    WEIGHED: tl.constexpr = TILE // 2 if TILE > 1 else 1  # a dozen registers a logit
    low, inside = _first_guess(above_ptr, tops, top, lowest, target, whole, by_count, V, BLOCK // GROUP)
    low = tl.where(held >= 0, lowest, low)
    inside = tl.where(held >= 0, 0, inside)
    high = key_of(top).to(tl.int64) + 1
    high_count = tl.zeros([], tl.int64)
    high_mass = tl.zeros([], tl.int64)
    low_mass = tl.zeros([], tl.int64)
    searching = low < high
    while searching:
        active = tl.zeros([], tl.int32)
        if held < 0:
            active = list_chunks(chunk_peaks, low.to(tl.int32), list_ptr, CHUNKS, CHUNKS_P2)
        if inside > ROOM:
            step = (high - low + 3) // 4
            level1, level2, level3 = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
            c0, c1, c2, c3, m0, m1, m2, m3 = _weigh(
                row, active, list_ptr, top, low, level1, level2, level3, V, BLOCK, GROUP, WEIGHED, BIAS, CAP, PENALTY,
                STOPS,
            )  # fmt: skip
            reached = tl.where(by_count, c0, m0) >= target
            r1, r2 = tl.where(by_count, c1, m1) >= target, tl.where(by_count, c2, m2) >= target
            r3 = tl.where(by_count, c3, m3) >= target
            count, mass = c0, m0
            if reached:
                high = tl.where(r3, high, tl.where(r2, level3, tl.where(r1, level2, level1)))
                high_count = tl.where(r3, high_count, tl.where(r2, c3, tl.where(r1, c2, c1)))
                high_mass = tl.where(r3, high_mass, tl.where(r2, m3, tl.where(r1, m2, m1)))
                low = tl.where(r3, level3, tl.where(r2, level2, tl.where(r1, level1, low)))
                low_mass = tl.where(r3, m3, tl.where(r2, m2, tl.where(r1, m1, m0)))
                inside = tl.where(r3, c3, tl.where(r2, c2, tl.where(r1, c1, c0))) - high_count
                searching = (high - low > 1) & (inside > 1)
        else:
            found = held
            if held < 0:
                found = _gather(
                    row, active, list_ptr, values_ptr, ids_ptr, low, high, V, BLOCK, GROUP, TILE, ROOM, BIAS, CAP,
                    PENALTY, STOPS,
                )  # fmt: skip
            keys, masses = load_gathered(values_ptr, tl.minimum(found, ROOM), top, ROOM)
            weights = tl.where(by_count, 1, masses)
            at_or_above = keys >= low.to(tl.int32)
            count = high_count + tl.sum(at_or_above.to(tl.int64), axis=0)
            mass = high_mass + tl.sum(tl.where(at_or_above, masses, 0), axis=0)
            missing = target - tl.where(by_count, high_count, high_mass)
            reached = tl.where(by_count, count, mass) >= target
            inside = found.to(tl.int64)
            if inside > ROOM:  # the number was a bad guess: back to sweeps
                reached = inside > ROOM
            elif reached:
                held = tl.where(high_count == 0, found, -1)
                low = _halve(keys, weights, low, high, missing)
                low_mass = high_mass + tl.sum(tl.where(keys >= low.to(tl.int32), masses, 0), axis=0)
                searching = low < lowest  # it is not: done
        if reached == 0:  # the guess was too high, or there is no such key
            low_mass = mass
            searching = low > lowest
            if searching:
                high, high_count, high_mass, low = low, count, mass, lowest
                inside = tl.full([], V, tl.int64)
    return low, low_mass, held
