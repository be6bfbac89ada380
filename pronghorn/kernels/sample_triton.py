"""The Triton side of a sampling step: a kernel over all of the logits, and one with a program a row that draws.

The first cuts each row into dozens of programs (``row_stats_triton.py``), reads the logits once from memory (the second
look is the cache's) and leaves a few numbers for each program and for each chunk, its lanes of one block: neighbours in
the order of ids. The second joins them, cuts the distribution where a row asks for it (``sample_select_triton.py``),
draws a chunk and then a token of it, and keeps the row's books.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.row_stats_triton import LOWEST, ONE, follow, join_groups, join_lanes, logit, partition
from pronghorn.kernels.sample_logits_triton import OUTSIDE, key_of, load_logits, mass_of
from pronghorn.kernels.sample_select_triton import LEVELS, chunk_tile, first_guess, list_chunks, search
from pronghorn.kernels.sample_state import FULL, NOT_A_NUMBER, STOPPED, SampleState, Variant

_ROOM = 2048  # logits that are gathered at most, before a bracket is halved
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX1, _MIX2 = tl.constexpr(0xBF58476D1CE4E5B9), tl.constexpr(0x94D049BB133111EB)
_STOPPED, _FULL, _NOT_A_NUMBER = tl.constexpr(STOPPED), tl.constexpr(FULL), tl.constexpr(NOT_A_NUMBER)


class Scratch(NamedTuple):
    """What the first kernel leaves for the second, for each of N rows; P groups, C chunks.

    ``tops`` and ``totals`` (float32 ``[N, P]``) are the policy's, ``chunk_tops`` (``[N, P]``) the maxima of what is
    drawn from, to which ``chunk_masses`` (int64 ``[N, C]``) are relative; ``chunk_peaks`` (float32 ``[N, C]``) are its
    maxima by chunk, ``above`` (int32 ``[N, P, 32]``) its counts by level. ``listed`` (int32 ``[N, C]``) and ``gathered``
    (float32 ``[N, room]``) are the second kernel's own.
    """

    tops: torch.Tensor
    totals: torch.Tensor
    chunk_tops: torch.Tensor
    chunk_peaks: torch.Tensor
    chunk_masses: torch.Tensor
    above: torch.Tensor
    listed: torch.Tensor
    gathered: torch.Tensor


def _scratch(state: SampleState, V: int) -> Scratch:
    if state.scratch is None:
        block, blocks, group = partition(V)
        P, N, device = block // group, state.rows, state.tokens_B.device

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(N, *shape, dtype=dtype, device=device)

        f32, i32 = torch.float32, torch.int32
        state.scratch = Scratch(
            empty(f32, P), empty(f32, P), empty(f32, P), empty(f32, P * blocks), empty(torch.int64, P * blocks),
            empty(i32, P, LEVELS.value), empty(i32, P * blocks), empty(f32, _ROOM),
        )  # fmt: skip
    found: Scratch = state.scratch
    return found


@triton.jit
def _sweep(
    x_ptr, bias_ptr, rows_ptr, finished_ptr, inverse_temperature_ptr, counts_ptr, min_tokens_ptr, stops_ptr, seen_ptr,
    penalty_ptr, tops_ptr, totals_ptr, chunk_tops_ptr, chunk_peaks_ptr, chunk_masses_ptr, above_ptr, scale, softcap,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCKS_P2: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, ROWS: tl.constexpr, TRUNCATED: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
    S: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One group of lanes of one row."""
    P: tl.constexpr = BLOCK // GROUP
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    g = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    row = tl.load(rows_ptr + n).to(tl.int64) if ROWS else n
    runs = row >= 0
    if runs:
        runs = tl.load(finished_ptr + row) == 0
    if runs:
        inverse_temperature = tl.load(inverse_temperature_ptr + row)
        x_row = x_ptr + n * V
        lanes = g * GROUP + tl.arange(0, GROUP)
        peaks = tl.full((GROUP,), LOWEST, dtype=tl.float32)
        sums = tl.zeros((GROUP,), dtype=tl.float32)
        for block in tl.static_range(BLOCKS):
            column = block * BLOCK + lanes
            x = tl.load(x_row + column, mask=column < V, other=0.0)
            z, _slope = logit(x, bias_ptr, column, column < V, scale, softcap, inverse_temperature, BIAS, CAP)
            peaks, sums, _higher, _distance, _factor = follow(z, peaks, sums)
        top, total = join_lanes(tl.reshape(peaks, (1, GROUP)), tl.reshape(sums, (1, GROUP)))
        own = n * P + g + tl.arange(0, 1)
        tl.store(tops_ptr + own, top)
        tl.store(totals_ptr + own, total)

        blocks = tl.arange(0, BLOCKS_P2)
        column = blocks[:, None] * BLOCK + lanes[None, :]
        early = tl.load(counts_ptr + row) < tl.load(min_tokens_ptr + row)
        _z, y = load_logits(
            x_row, bias_ptr, column, column < V, scale, softcap, inverse_temperature, seen_ptr + row * WORDS,
            tl.load(penalty_ptr + row), stops_ptr + row * S, early, BIAS, CAP, PENALTY, STOPS,
        )  # fmt: skip
        chunk_peaks = tl.max(y, axis=1)
        chunk_top = tl.maximum(tl.max(chunk_peaks, axis=0), LOWEST)
        chunk = n * (P * BLOCKS) + blocks * P + g
        tl.store(chunk_tops_ptr + n * P + g, chunk_top)
        tl.store(chunk_peaks_ptr + chunk, chunk_peaks, mask=blocks < BLOCKS)
        tl.store(chunk_masses_ptr + chunk, tl.sum(mass_of(y, chunk_top), axis=1), mask=blocks < BLOCKS)
        if TRUNCATED:
            depth = tl.minimum(tl.floor(chunk_top) - tl.floor(y), LEVELS - 1.0).to(tl.int32)
            depth = tl.reshape(tl.minimum(tl.maximum(depth, 0), LEVELS - 1), (BLOCKS_P2 * GROUP,))
            above = tl.cumsum(tl.histogram(depth, LEVELS), 0)
            tl.store(above_ptr + (n * P + g) * LEVELS + tl.arange(0, LEVELS), above)


@triton.jit
def _uniform(key, count):
    """SplitMix64's number ``count`` of the stream ``key``, as a float64 in [0, 1)."""
    x = key.to(tl.uint64, bitcast=True) + (count + 1).to(tl.uint64) * _GOLDEN
    x = (x ^ (x >> 30)) * _MIX1
    x = (x ^ (x >> 27)) * _MIX2
    x = x ^ (x >> 31)
    return (x >> 11).to(tl.float64) * tl.full([], 1.1102230246251565e-16, tl.float64)


@triton.jit
def _cut(
    chunk_peaks, masses, tops, top, k, p, log_min_p, above_ptr, list_ptr, gathered_ptr, masses_ptr,
    x_row, bias_ptr, scale, softcap, inverse_temperature, seen_row, penalty, stops_row, early,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P2: tl.constexpr,
    TILE: tl.constexpr, ROOM: tl.constexpr, BIAS: tl.constexpr, CAP: tl.constexpr, PENALTY: tl.constexpr,
    STOPS: tl.constexpr,
):  # fmt: skip
    """The least key that stays, and the masses of what stays in each chunk, relative to the row's maximum."""
    P: tl.constexpr = BLOCK // GROUP
    floor = top + log_min_p
    cut = key_of(floor).to(tl.int64)
    whole = tl.sum(masses, axis=0)
    by_mass = p < 1.0
    for question in range(2):
        by_count = question == 0
        if by_count:
            asked = (k < V) | ((floor > float("-inf")) & by_mass)
            target = k.to(tl.int64)
        else:
            asked = by_mass
            target = tl.ceil(p.to(tl.float64) * whole.to(tl.float64)).to(tl.int64)
        if asked:
            guess, guessed = first_guess(above_ptr, tops, top, cut, target, whole, by_count, V, P)
            cut, whole = search(
                cut, guess, guessed, target, by_count, top, chunk_peaks, list_ptr, gathered_ptr,
                x_row, bias_ptr, scale, softcap, inverse_temperature, seen_row, penalty, stops_row, early,
                V, BLOCK, GROUP, CHUNKS, CHUNKS_P2, TILE, ROOM, BIAS, CAP, PENALTY, STOPS,
            )  # fmt: skip
    lowest = cut.to(tl.int32)
    chunk = tl.arange(0, CHUNKS_P2)
    tl.store(masses_ptr + chunk, tl.zeros((CHUNKS_P2,), tl.int64), mask=chunk < CHUNKS)
    active = list_chunks(chunk_peaks, lowest, list_ptr, CHUNKS, CHUNKS_P2)
    for tile in range((active + TILE - 1) // TILE):
        listed, real, y, keys = chunk_tile(
            tile, active, list_ptr, x_row, bias_ptr, scale, softcap, inverse_temperature, seen_row, penalty,
            stops_row, early, V, BLOCK, GROUP, TILE, BIAS, CAP, PENALTY, STOPS,
        )  # fmt: skip
        kept = tl.sum(tl.where(keys >= lowest, mass_of(y, top), 0), axis=1)
        tl.store(masses_ptr + listed, kept, mask=real)
    tl.debug_barrier()
    return lowest, tl.load(masses_ptr + chunk, mask=chunk < CHUNKS, other=0)


@triton.jit
def _record(
    token, token_logp, policy_logp, known, row, count, stops_row, tokens_ptr, token_logps_ptr, policy_logps_ptr,
    out_tokens_ptr, out_token_logps_ptr, out_policy_logps_ptr, counts_ptr, min_tokens_ptr, max_tokens_ptr,
    positions_ptr, slots_ptr, lengths_ptr, finished_ptr, seen_row,
    T, PENALTY: tl.constexpr, S: tl.constexpr,
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
    if count < T:
        at = row * T + count
        tl.store(out_tokens_ptr + at, tl.where(known, token, -1))
        tl.store(out_token_logps_ptr + at, token_logp)
        tl.store(out_policy_logps_ptr + at, policy_logp)
    tl.store(tokens_ptr + row, token.to(tl.int64), mask=known)
    if PENALTY:
        word = seen_row + token // 32
        tl.store(word, tl.load(word) | (1 << (token % 32)), mask=known)
    position = tl.load(positions_ptr + row) + 1
    tl.store(counts_ptr + row, drawn)
    tl.store(positions_ptr + row, position)
    tl.store(slots_ptr + row, tl.where(ends == 0, position, -1))
    tl.store(lengths_ptr + row, tl.where(ends == 0, position + 1, 0))
    tl.store(finished_ptr + row, ends)


@triton.jit(do_not_specialize=["T"])  # one compilation serves all lengths
def _draw(
    x_ptr, bias_ptr, rows_ptr, finished_ptr, inverse_temperature_ptr, greedy_ptr, counts_ptr, min_tokens_ptr,
    max_tokens_ptr, stops_ptr, seen_ptr, penalty_ptr, top_k_ptr, top_p_ptr, log_min_p_ptr, keys_ptr, tops_ptr, totals_ptr,
    chunk_tops_ptr, chunk_peaks_ptr, chunk_masses_ptr, above_ptr, list_ptr, gathered_ptr, tokens_ptr, token_logps_ptr,
    policy_logps_ptr, out_tokens_ptr, out_token_logps_ptr, out_policy_logps_ptr, positions_ptr, slots_ptr, lengths_ptr,
    scale, softcap, T,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, CHUNKS_P2: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, ROWS: tl.constexpr, TRUNCATED: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
    S: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """One row: a chunk, a token of it, its log-probabilities, and the books."""
    P: tl.constexpr = BLOCK // GROUP
    CHUNKS: tl.constexpr = P * ((V + BLOCK - 1) // BLOCK)
    n = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + n).to(tl.int64) if ROWS else n
    runs = row >= 0
    if runs:
        runs = tl.load(finished_ptr + row) == 0
    if runs:
        inverse_temperature = tl.load(inverse_temperature_ptr + row)
        greedy = tl.load(greedy_ptr + row) != 0
        penalty = tl.load(penalty_ptr + row)
        count = tl.load(counts_ptr + row)
        x_row, stops_row, seen_row = x_ptr + n * V, stops_ptr + row * S, seen_ptr + row * WORDS
        early = count < tl.load(min_tokens_ptr + row)
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
        lowest = tl.full([], OUTSIDE, tl.int32)
        cut = greedy & (count < 0)  # false
        if TRUNCATED:
            k, p, log_min_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row), tl.load(log_min_p_ptr + row)
            cut = (greedy == 0) & (log_total == log_total) & ((k < V) | (p < 1.0) | (log_min_p > float("-inf")))
            if cut:
                lowest, masses = _cut(
                    chunk_peaks, masses, tl.load(chunk_tops_ptr + n * P + group), top, k, p, log_min_p,
                    above_ptr + n * P * LEVELS, list_ptr + n * CHUNKS, gathered_ptr + n * ROOM,
                    chunk_masses_ptr + n * CHUNKS, x_row, bias_ptr, scale, softcap, inverse_temperature, seen_row,
                    penalty, stops_row, early, V, BLOCK, GROUP, CHUNKS, CHUNKS_P2, TILE, ROOM, BIAS, CAP, PENALTY, STOPS,
                )  # fmt: skip

        whole = tl.sum(masses, axis=0)
        number = _uniform(tl.load(keys_ptr + row), count)
        target = tl.minimum((number * whole.to(tl.float64)).to(tl.int64), whole - 1)
        drawn = tl.sum((tl.cumsum(masses, 0) <= target).to(tl.int32), axis=0)
        likeliest = tl.min(tl.where(chunk_peaks == top, chunk, CHUNKS), axis=0)
        drawn = tl.minimum(tl.where(greedy, likeliest, drawn), CHUNKS - 1)
        target -= tl.sum(tl.where(chunk < drawn, masses, 0), axis=0)
        mass = tl.sum(tl.where(chunk == drawn, masses, 0), axis=0)

        # Where nothing is cut, a chunk's masses are relative to the maximum of its group, as the first kernel had them.
        unit = tl.where(cut, top, tl.sum(tl.where(chunk == drawn, chunk_tops, 0.0), axis=0))
        lane = tl.arange(0, GROUP)
        column = (drawn // P) * BLOCK + (drawn % P) * GROUP + lane
        z, y = load_logits(
            x_row, bias_ptr, column, column < V, scale, softcap, inverse_temperature, seen_row, penalty, stops_row,
            early, BIAS, CAP, PENALTY, STOPS,
        )  # fmt: skip
        inside = tl.where(key_of(y) >= lowest, mass_of(y, unit), 0)
        own = tl.sum(inside, axis=0)
        share = target.to(tl.float64) / tl.maximum(mass, 1).to(tl.float64)
        target = tl.minimum((share * own.to(tl.float64)).to(tl.int64), own - 1)
        place = tl.sum((tl.cumsum(inside, 0) <= target).to(tl.int32), axis=0)
        place = tl.where(greedy, tl.min(tl.where(y == top, lane, GROUP), axis=0), place)
        place = tl.minimum(place, GROUP - 1)
        token = (drawn // P) * BLOCK + (drawn % P) * GROUP + place
        z = tl.sum(tl.where(lane == place, z, 0.0), axis=0)
        y = tl.sum(tl.where(lane == place, y, 0.0), axis=0)
        policy_logp = (z - peak) - log_total
        token_logp = (y - top) - tl.log(whole.to(tl.float32) * (1.0 / ONE))
        shaped = cut
        if PENALTY:
            shaped = shaped | (penalty != 1.0)
        if STOPS > 0:
            shaped = shaped | early
        token_logp = tl.where(shaped, token_logp, policy_logp)
        known = (policy_logp == policy_logp) & (token_logp == token_logp) & (whole > 0) & (token < V)
        _record(
            token, token_logp, policy_logp, known, row, count, stops_row, tokens_ptr, token_logps_ptr, policy_logps_ptr,
            out_tokens_ptr, out_token_logps_ptr, out_policy_logps_ptr, counts_ptr, min_tokens_ptr, max_tokens_ptr,
            positions_ptr, slots_ptr, lengths_ptr, finished_ptr, seen_row, T, PENALTY, S,
        )  # fmt: skip


_launch_sweep, _launch_draw = Launcher(_sweep), Launcher(_draw)


def sample_step(
    x_NV: torch.Tensor,
    state: SampleState,
    variant: Variant,
    rows_N: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """See :func:`pronghorn.kernels.sample.sample_step`."""
    N, V = x_NV.shape
    if not N:
        return
    block, blocks, group = partition(V)
    s, blocks_p2 = _scratch(state, V), int(triton.next_power_of_2(blocks))
    S, words = state.stop_ids_BS.shape[1], state.seen_BW.shape[1]
    chunks_p2 = int(triton.next_power_of_2(blocks * (block // group)))
    stops = S if variant.held else 0
    maps = float(scale), float(softcap or 1)
    flags = bias_V is not None, softcap is not None, rows_N is not None, variant.truncated, variant.penalised, stops
    _launch_sweep(
        (block // group, N), x_NV, bias_V, rows_N, state.finished_B, state.inverse_temperature_B, state.counts_B,
        state.min_tokens_B, state.stop_ids_BS, state.seen_BW, state.penalty_B, s.tops, s.totals, s.chunk_tops,
        s.chunk_peaks, s.chunk_masses, s.above, *maps, V, block, group, blocks_p2, *flags, S, words,
        num_warps=8 if variant.penalised else 4, enable_fp_fusion=False,
    )  # fmt: skip
    _launch_draw(
        (N,), x_NV, bias_V, rows_N, state.finished_B, state.inverse_temperature_B, state.greedy_B, state.counts_B,
        state.min_tokens_B, state.max_tokens_B, state.stop_ids_BS, state.seen_BW, state.penalty_B, state.top_k_B,
        state.top_p_B, state.log_min_p_B, state.keys_B, s.tops, s.totals, s.chunk_tops, s.chunk_peaks, s.chunk_masses,
        s.above, s.listed, s.gathered, state.tokens_B, state.token_logps_B, state.policy_logps_B, state.out_tokens_BT,
        state.out_token_logps_BT, state.out_policy_logps_BT, state.positions_B, state.slots_B, state.lengths_B, *maps,
        state.max_tokens, V, block, group, chunks_p2, *flags, S, words, blocks_p2, _ROOM,
        num_warps=16 if variant.truncated else 4, enable_fp_fusion=False,
    )  # fmt: skip
