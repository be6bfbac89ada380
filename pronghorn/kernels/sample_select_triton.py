"""Where top-k, top-p and min-p cut a row: the least logit that stays, found without sorting. One program a row.

A cut is the greatest key t (an integer in the order of the logits) such that the logits at or above it are k at least,
or weigh p of the whole at least. Counts and weights are whole numbers, so each such question has one answer, however
the row is walked. The first kernel counted, for each whole logit below the maximum, how many lie above it: that brackets
the cut from below, mostly with few logits inside. They are gathered, and the bracket is halved until one key is left.
Where they are too many, sweeps over the row narrow the bracket to a quarter each, first.
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
    tile, active, list_ptr, x_row, bias_ptr, scale, softcap, inverse_temperature, seen_row, penalty, stops_row, early,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """TILE listed chunks: their numbers, which of them there are, and ``[TILE, GROUP]`` logits and keys."""
    P: tl.constexpr = BLOCK // GROUP
    r = tile * TILE + tl.arange(0, TILE)
    chunk = tl.load(list_ptr + r, mask=r < active, other=0)
    column = ((chunk // P) * BLOCK + (chunk % P) * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    inside = (r < active)[:, None] & (column < V)
    _z, y = load_logits(
        x_row, bias_ptr, column, inside, scale, softcap, inverse_temperature, seen_row, penalty, stops_row, early,
        BIAS, CAP, PENALTY, STOPS,
    )  # fmt: skip
    return chunk, r < active, y, tl.where(inside, key_of(y), OUTSIDE)


@triton.jit
def first_guess(above_ptr, tops, top, lowest, target, whole, by_count, V: tl.constexpr, P: tl.constexpr):
    """A bracket's likely lower end, and how many logits lie at or above it.

    ``above_ptr[g, i]`` counts group g's logits at or above ``floor(tops[g]) - i``. By weight, what lies below a level
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
    return guess, tl.sum(tl.where(i == level, above, 0), axis=0)


@triton.jit
def weights_of(keys, masses, at_least, by_count):
    """Count and mass of the keys at or above ``at_least``, and the one of the two that is asked for."""
    at_or_above = keys >= at_least.to(tl.int32)
    count = tl.sum(at_or_above.to(tl.int32)).to(tl.int64)
    mass = tl.sum(tl.where(at_or_above, masses, 0))
    return count, mass, tl.where(by_count, count, mass)


@triton.jit
def search(
    lowest, guess, guessed, target, by_count, top, chunk_peaks, list_ptr, gathered_ptr,
    x_row, bias_ptr, scale, softcap, inverse_temperature, seen_row, penalty, stops_row, early,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr,
    TILE: tl.constexpr, ROOM: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr,
    STOPS: tl.constexpr,
):  # fmt: skip
    """The greatest key from ``lowest`` on at or above which lies ``target`` (else ``lowest``), and the mass there.

    The cut is in ``[low, high)``; at or above ``high`` lie ``high_count`` and ``high_mass``, less than the target. About
    ``inside`` logits lie between them.
    """
    low = guess
    high = key_of(top).to(tl.int64) + 1
    high_count = tl.zeros([], tl.int64)
    high_mass = tl.zeros([], tl.int64)
    low_mass = tl.zeros([], tl.int64)
    inside = guessed.to(tl.int64)
    searching = low < high
    while searching:
        active = list_chunks(chunk_peaks, low.to(tl.int32), list_ptr, CHUNKS, CHUNKS_P2)
        tiles = (active + TILE - 1) // TILE
        if inside > ROOM:
            step = (high - low + 3) // 4
            level1, level2, level3 = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
            # Counts of three levels share an int32: a lane sees fewer than 1,024 tiles.
            counts = tl.zeros((TILE, GROUP), tl.int32)
            counts0 = tl.zeros((TILE, GROUP), tl.int32)
            mass0 = tl.zeros((TILE, GROUP), tl.int64)
            mass1 = tl.zeros((TILE, GROUP), tl.int64)
            mass2 = tl.zeros((TILE, GROUP), tl.int64)
            mass3 = tl.zeros((TILE, GROUP), tl.int64)
            for tile in range(tiles):
                _chunk, _real, y, keys = chunk_tile(
                    tile, active, list_ptr, x_row, bias_ptr, scale, softcap, inverse_temperature, seen_row, penalty,
                    stops_row, early, V, BLOCK, GROUP, TILE, BIAS, CAP, PENALTY, STOPS,
                )  # fmt: skip
                masses = mass_of(y, top)
                over0, over1 = keys >= low.to(tl.int32), keys >= level1.to(tl.int32)
                over2, over3 = keys >= level2.to(tl.int32), keys >= level3.to(tl.int32)
                counts0 += over0.to(tl.int32)
                counts += over1.to(tl.int32) + (over2.to(tl.int32) << 10) + (over3.to(tl.int32) << 20)
                mass0 += tl.where(over0, masses, 0)
                mass1 += tl.where(over1, masses, 0)
                mass2 += tl.where(over2, masses, 0)
                mass3 += tl.where(over3, masses, 0)
            c0, c1 = tl.sum(counts0).to(tl.int64), tl.sum(counts & 1023).to(tl.int64)
            c2, c3 = tl.sum((counts >> 10) & 1023).to(tl.int64), tl.sum(counts >> 20).to(tl.int64)
            m0, m1, m2, m3 = tl.sum(mass0), tl.sum(mass1), tl.sum(mass2), tl.sum(mass3)
            reached0 = tl.where(by_count, c0, m0) >= target
            reached1 = tl.where(by_count, c1, m1) >= target
            reached2 = tl.where(by_count, c2, m2) >= target
            reached3 = tl.where(by_count, c3, m3) >= target
            if reached0:
                high = tl.where(reached3, high, tl.where(reached2, level3, tl.where(reached1, level2, level1)))
                high_count = tl.where(reached3, high_count, tl.where(reached2, c3, tl.where(reached1, c2, c1)))
                high_mass = tl.where(reached3, high_mass, tl.where(reached2, m3, tl.where(reached1, m2, m1)))
                low = tl.where(reached3, level3, tl.where(reached2, level2, tl.where(reached1, level1, low)))
                low_mass = tl.where(reached3, m3, tl.where(reached2, m2, tl.where(reached1, m1, m0)))
                low_count = tl.where(reached3, c3, tl.where(reached2, c2, tl.where(reached1, c1, c0)))
                inside = low_count - high_count
                searching = (high - low > 1) & (inside > 1)
            else:  # the guess was too high, or there is no such key
                searching = low > lowest
                low_mass = m0
                if searching:
                    high, high_count, high_mass, low = low, c0, m0, lowest
                    inside = tl.full([], V, tl.int64)
        else:
            found = tl.zeros([], tl.int32)
            for tile in range(tiles):
                _chunk, _real, y, keys = chunk_tile(
                    tile, active, list_ptr, x_row, bias_ptr, scale, softcap, inverse_temperature, seen_row, penalty,
                    stops_row, early, V, BLOCK, GROUP, TILE, BIAS, CAP, PENALTY, STOPS,
                )  # fmt: skip
                chosen = (keys >= low.to(tl.int32)) & (keys < high.to(tl.int32))
                chosen = tl.reshape(chosen.to(tl.int32), (TILE * GROUP,))
                place = found + tl.cumsum(chosen, 0) - 1
                values = tl.reshape(y, (TILE * GROUP,))
                tl.store(gathered_ptr + place, values, mask=(chosen != 0) & (place < ROOM))
                found += tl.sum(chosen, axis=0)
            tl.debug_barrier()
            inside = found.to(tl.int64)
            if inside <= ROOM:  # else the number was a bad guess: back to sweeps
                slot = tl.arange(0, ROOM)
                values = tl.load(gathered_ptr + slot, mask=slot < found, other=float("-inf"))
                keys = tl.where(slot < found, key_of(values), OUTSIDE)
                masses = mass_of(values, top)
                count, mass, weight = weights_of(keys, masses, low, by_count)
                base = tl.where(by_count, high_count, high_mass)
                if base + weight >= target:
                    while high - low > 1:
                        middle = low + (high - low) // 2
                        _count, _mass, weight = weights_of(keys, masses, middle, by_count)
                        reached = base + weight >= target
                        low = tl.where(reached, middle, low)
                        high = tl.where(reached, high, middle)
                    _count, mass, _weight = weights_of(keys, masses, low, by_count)
                    low_mass = high_mass + mass
                    searching = low < lowest  # never: done
                else:
                    searching = low > lowest
                    low_mass = high_mass + mass
                    if searching:
                        high, high_count, high_mass, low = low, high_count + count, low_mass, lowest
                        inside = tl.full([], V, tl.int64)
    return low, low_mass
