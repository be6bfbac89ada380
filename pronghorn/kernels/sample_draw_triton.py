"""The second kernel of a sampling step, one program a row: cut the distribution, draw a token, keep the row's books."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

import triton
import triton.language as tl

from pronghorn.kernels.row_stats_triton import LOWEST, ONE, join_groups
from pronghorn.kernels.sample_logits_triton import OUTSIDE, key_of, load_logits, mass_of, number_at
from pronghorn.kernels.sample_select_triton import LEVELS, chunk_tile, list_chunks, load_gathered, search
from pronghorn.kernels.sample_state import FULL, NOT_A_NUMBER, STOPPED

_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
_STOPPED, _FULL, _NOT_A_NUMBER = tl.constexpr(STOPPED), tl.constexpr(FULL), tl.constexpr(NOT_A_NUMBER)


@triton.jit
def uniform(key, count):
    """SplitMix64's number ``count`` of the stream ``key``, as a float64 in [0, 1)."""
    x = key.to(tl.uint64, bitcast=True) + (count + 1).to(tl.uint64) * _GOLDEN
    x = (x ^ (x >> 30)) * _MIX1
    x = (x ^ (x >> 27)) * _MIX2
    x = x ^ (x >> 31)
    return (x >> 11).to(tl.float64) * tl.full([], 1.1102230246251565e-16, tl.float64)


@triton.jit
def _cut(
    row, chunk_peaks, masses, tops, top, k, p, log_min_p, above_ptr, list_ptr, values_ptr, ids_ptr, masses_ptr,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr,
    TILE: tl.constexpr, ROOM: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr,
    STOPS: tl.constexpr,
):  # fmt: skip
    """The least key that stays; how many gathered logits hold all that stays, or -1; and then what stays of each chunk.

    Masses are relative to the row's maximum.
    """
    floor = top + log_min_p
    least = key_of(floor).to(tl.int64)
    whole = tl.sum(masses, axis=0)
    held = tl.full([], -1, tl.int32)
    for question in range(2):
        by_count = question == 0
        k_asks = by_count & ((k < V) | ((floor > float("-inf")) & (p < 1.0)))
        if k_asks | ((question == 1) & (p < 1.0)):
            share = tl.ceil(p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
            target = tl.where(by_count, k.to(tl.int64), share)
            least, whole, held = search(
                row, least, target, whole, by_count, top, tops, held, chunk_peaks, above_ptr, list_ptr, values_ptr,
                ids_ptr, V, BLOCK, GROUP, CHUNKS, CHUNKS_P2, TILE, ROOM, BIAS, CAP, PENALTY, STOPS,
            )  # fmt: skip
    lowest = least.to(tl.int32)
    if held < 0:
        chunk = tl.arange(0, CHUNKS_P2)
        tl.debug_barrier()  # every warp has read what the first kernel left there
        tl.store(masses_ptr + chunk, tl.zeros((CHUNKS_P2,), tl.int64), mask=chunk < CHUNKS)
        active = list_chunks(chunk_peaks, lowest, list_ptr, CHUNKS, CHUNKS_P2)
        for tile in range((active + TILE - 1) // TILE):
            listed, real, _column, y, keys = chunk_tile(
                row, tile, active, list_ptr, V, BLOCK, GROUP, TILE, BIAS, CAP, PENALTY, STOPS
            )
            kept = tl.sum(tl.where(keys >= lowest, mass_of(y, top), 0), axis=1)
            tl.store(masses_ptr + listed, kept, mask=real)
        tl.debug_barrier()
        masses = tl.load(masses_ptr + chunk, mask=chunk < CHUNKS, other=0)
    return lowest, held, masses


@triton.jit
def _from_chunks(
    row, number, greedy, cut, lowest, masses, chunk_peaks, chunk_tops, top,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr,
    BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
):  # fmt: skip
    """Draw a chunk, and a token of it; and the mass of all. Greedy rows take the first of the likeliest."""
    P: tl.constexpr = BLOCK // GROUP
    chunk = tl.arange(0, CHUNKS_P2)
    drawn, whole, target = number_at(masses, number)
    likeliest = tl.min(tl.where(chunk_peaks == top, chunk, CHUNKS), axis=0)
    drawn = tl.minimum(tl.where(greedy, likeliest, drawn), CHUNKS - 1)
    target -= tl.sum(tl.where(chunk < drawn, masses, 0), axis=0)
    mass = tl.sum(tl.where(chunk == drawn, masses, 0), axis=0)
    # Where nothing is cut, a chunk's masses are relative to the maximum of its group, as the first kernel had them.
    unit = tl.where(cut, top, tl.sum(tl.where(chunk == drawn, chunk_tops, 0.0), axis=0))
    lane = tl.arange(0, GROUP)
    first = (drawn // P) * BLOCK + (drawn % P) * GROUP
    _z, y = load_logits(row, first + lane, first + lane < V, BIAS, CAP, PENALTY, STOPS)
    inside = tl.where(key_of(y) >= lowest, mass_of(y, unit), 0)
    share = target.to(tl.float64) / tl.maximum(mass, 1).to(tl.float64)
    place, _own, _target = number_at(inside, share)
    place = tl.where(greedy, tl.min(tl.where(y == top, lane, GROUP), axis=0), place)
    return first + tl.minimum(place, GROUP - 1), whole


@triton.jit
def _record(
    token, token_logp, policy_logp, known, row, count, stops_row, seen_row, tally_row, tokens_ptr, token_logps_ptr,
    policy_logps_ptr, out_tokens_ptr, out_token_logps_ptr, out_policy_logps_ptr, counts_ptr, min_tokens_ptr,
    max_tokens_ptr, positions_ptr, slots_ptr, lengths_ptr, finished_ptr, T, PENALTY: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The row's outputs, counters and end."""
    stopped = token < 0
    for s in range(S):
        stopped = stopped | (token == tl.load(stops_row + s))
    drawn = count + 1
    stopped = stopped & (drawn >= tl.load(min_tokens_ptr + row))
    full = drawn >= tl.minimum(tl.load(max_tokens_ptr + row), T)
    ends = tl.where(known, tl.where(stopped, _STOPPED, tl.where(full, _FULL, 0)), _NOT_A_NUMBER)
    nan = float("nan")
    token_logp, policy_logp = tl.where(known, token_logp, nan), tl.where(known, policy_logp, nan)
    tl.store(token_logps_ptr + row, token_logp)
    tl.store(policy_logps_ptr + row, policy_logp)
    at = row * T + count
    tl.store(out_tokens_ptr + at, tl.where(known, token, -1), mask=count < T)
    tl.store(out_token_logps_ptr + at, token_logp, mask=count < T)
    tl.store(out_policy_logps_ptr + at, policy_logp, mask=count < T)
    tl.store(tokens_ptr + row, token.to(tl.int64), mask=known)
    if PENALTY % 2 == 1:
        word = seen_row + token // 32
        tl.store(word, tl.load(word) | (1 << (token % 32)), mask=known)
    if PENALTY >= 2:
        tl.store(tally_row + token, tl.load(tally_row + token, mask=known, other=0) + 1, mask=known)
    position = tl.load(positions_ptr + row) + 1
    tl.store(counts_ptr + row, drawn)
    tl.store(positions_ptr + row, position)
    tl.store(slots_ptr + row, tl.where(ends == 0, position, -1))
    tl.store(lengths_ptr + row, tl.where(ends == 0, position + 1, 0))
    tl.store(finished_ptr + row, ends)


@triton.jit(do_not_specialize=["T"])  # one compilation serves all lengths
def draw(
    x_ptr, bias_ptr, rows_ptr, finished_ptr, inverse_temperature_ptr, greedy_ptr, counts_ptr, min_tokens_ptr,
    max_tokens_ptr, stops_ptr, seen_ptr, penalty_ptr, tally_ptr, presence_ptr, frequency_ptr, top_k_ptr, top_p_ptr,
    log_min_p_ptr, keys_ptr, tops_ptr, totals_ptr, chunk_tops_ptr, chunk_peaks_ptr, chunk_masses_ptr, above_ptr,
    list_ptr, values_ptr, ids_ptr, cuts_ptr, tokens_ptr, token_logps_ptr, policy_logps_ptr, out_tokens_ptr,
    out_token_logps_ptr, out_policy_logps_ptr, positions_ptr, slots_ptr, lengths_ptr, scale, softcap, T,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNKS_P2: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, ROWS: tl.constexpr, TRUNCATED: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
    S: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = BLOCK // GROUP
    CHUNKS: tl.constexpr = P * ((V + BLOCK - 1) // BLOCK)
    n = tl.program_id(0).to(tl.int64)
    b = tl.load(rows_ptr + n).to(tl.int64) if ROWS else n
    runs = b >= 0
    if runs:
        runs = tl.load(finished_ptr + b) == 0
    if runs:
        greedy, penalty, count = tl.load(greedy_ptr + b) != 0, tl.load(penalty_ptr + b), tl.load(counts_ptr + b)
        presence, frequency = tl.load(presence_ptr + b), tl.load(frequency_ptr + b)
        early = count < tl.load(min_tokens_ptr + b)
        number = uniform(tl.load(keys_ptr + b), count)
        stops_row, seen_row, tally_row = stops_ptr + b * S, seen_ptr + b * WORDS, tally_ptr + b * V
        row = (x_ptr + n * V, bias_ptr, scale, softcap, tl.load(inverse_temperature_ptr + b), seen_row, penalty,
               tally_row, presence, frequency, stops_row, early)  # fmt: skip
        group = tl.arange(0, P)
        peak, _total, log_total = join_groups(tl.load(tops_ptr + n * P + group), tl.load(totals_ptr + n * P + group))
        chunk = tl.arange(0, CHUNKS_P2)
        real = chunk < CHUNKS
        chunk_peaks = tl.load(chunk_peaks_ptr + n * CHUNKS + chunk, mask=real, other=float("-inf"))
        top = tl.maximum(tl.max(chunk_peaks, axis=0), LOWEST)
        chunk_tops = tl.load(chunk_tops_ptr + n * P + chunk % P)
        factor = tl.exp(chunk_tops - top)
        factor = tl.where(factor <= 1.0, factor, 0.0)
        masses = tl.load(chunk_masses_ptr + n * CHUNKS + chunk, mask=real, other=0)
        masses = (masses.to(tl.float32) * factor).to(tl.int64)
        lowest, held = tl.full([], OUTSIDE, tl.int32), tl.full([], -1, tl.int32)
        cut = count < 0  # false
        if TRUNCATED:
            k, p, log_min_p = tl.load(top_k_ptr + b), tl.load(top_p_ptr + b), tl.load(log_min_p_ptr + b)
            cut = (k < V) | (p < 1.0) | (log_min_p > float("-inf"))
            cut = cut & (greedy == 0) & (log_total == log_total)
            if cut:
                lowest, held, masses = _cut(
                    row, chunk_peaks, masses, tl.load(chunk_tops_ptr + n * P + group), top, k, p, log_min_p,
                    above_ptr + n * P * LEVELS, list_ptr + n * CHUNKS, values_ptr + n * ROOM, ids_ptr + n * ROOM,
                    chunk_masses_ptr + n * CHUNKS, V, BLOCK, GROUP, CHUNKS, CHUNKS_P2, TILE, ROOM, BIAS, CAP, PENALTY,
                    STOPS,
                )  # fmt: skip
        tl.store(cuts_ptr + n, lowest)
        if held >= 0:
            keys, gathered = load_gathered(values_ptr + n * ROOM, held, top, ROOM)
            place, whole, _target = number_at(tl.where(keys >= lowest, gathered, 0), number)
            token = tl.load(ids_ptr + n * ROOM + tl.minimum(place, held - 1))
        else:
            token, whole = _from_chunks(
                row, number, greedy, cut, lowest, masses, chunk_peaks, chunk_tops, top, V, BLOCK, GROUP, CHUNKS,
                CHUNKS_P2, BIAS, CAP, PENALTY, STOPS,
            )  # fmt: skip
        z, y = load_logits(row, token, token < V, BIAS, CAP, PENALTY, STOPS)
        policy_logp = (z - peak) - log_total
        token_logp = (y - top) - tl.log(whole.to(tl.float32) * (1.0 / ONE))
        shaped = cut
        if PENALTY % 2 == 1:
            shaped = shaped | (penalty != 1.0)
        if PENALTY >= 2:
            shaped = shaped | (presence != 0.0) | (frequency != 0.0)
        if STOPS > 0:
            shaped = shaped | early
        token_logp = tl.where(shaped, token_logp, policy_logp)
        known = (policy_logp == policy_logp) & (token_logp == token_logp) & (whole > 0) & (token < V)
        tl.debug_barrier()  # every warp has read the counters that change now
        _record(
            token, token_logp, policy_logp, known, b, count, stops_row, seen_row, tally_row, tokens_ptr,
            token_logps_ptr, policy_logps_ptr, out_tokens_ptr, out_token_logps_ptr, out_policy_logps_ptr, counts_ptr,
            min_tokens_ptr, max_tokens_ptr, positions_ptr, slots_ptr, lengths_ptr, finished_ptr, T, PENALTY, S,
        )  # fmt: skip
