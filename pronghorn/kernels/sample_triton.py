"""The Triton side of a sampling step: a kernel over all of the logits, and one with a program a row that draws.

The first, here, cuts each row into dozens of programs (``row_stats_triton.py``), reads the logits once from memory
(its second look is the cache's) and leaves a few numbers for each program and for each chunk: a program's lanes of one
block, neighbours in the order of ids. The second (``sample_draw_triton.py``) joins them, cuts the distribution where a
row asks for it (``sample_select_triton.py``), draws a chunk and then a token of it, and keeps the row's books.
"""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.row_stats_triton import LOWEST, follow, join_lanes, logit, partition
from pronghorn.kernels.sample_draw_triton import draw
from pronghorn.kernels.sample_logits_triton import load_logits, mass_of
from pronghorn.kernels.sample_select_triton import LEVELS
from pronghorn.kernels.sample_state import SampleState, Variant

_ROOM = 2048  # logits that are gathered at most, before a bracket is halved


class Scratch(NamedTuple):
    """What the first kernel leaves for the second, for each of N rows; P groups, C chunks.

    ``tops`` and ``totals`` (float32 ``[N, P]``) are the policy's, ``chunk_tops`` (``[N, P]``) the maxima of what is
    drawn from, to which ``chunk_masses`` (int64 ``[N, C]``) are relative; ``chunk_peaks`` (float32 ``[N, C]``) are its
    maxima by chunk, ``above`` (int32 ``[N, P, 32]``) its counts by level. The second kernel's own: ``listed`` (int32
    ``[N, C]``), ``values`` and ``ids`` (float32 and int32 ``[N, room]``), and ``cuts`` (int32 ``[N]``), the least key
    that stayed, which only tests read.
    """

    tops: torch.Tensor
    totals: torch.Tensor
    chunk_tops: torch.Tensor
    chunk_peaks: torch.Tensor
    chunk_masses: torch.Tensor
    above: torch.Tensor
    listed: torch.Tensor
    values: torch.Tensor
    ids: torch.Tensor
    cuts: torch.Tensor


def _scratch(state: SampleState, V: int) -> Scratch:
    if state.scratch is None:
        block, blocks, group = partition(V)
        P, N, device = block // group, state.rows, state.tokens_B.device

        def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
            return torch.empty(N, *shape, dtype=dtype, device=device)

        f32, i32 = torch.float32, torch.int32
        state.scratch = Scratch(
            empty(f32, P), empty(f32, P), empty(f32, P), empty(f32, P * blocks), empty(torch.int64, P * blocks),
            empty(i32, P, LEVELS.value), empty(i32, P * blocks), empty(f32, _ROOM), empty(i32, _ROOM), empty(i32),
        )  # fmt: skip
    found: Scratch = state.scratch
    return found


@triton.jit
def _sweep(
    x_ptr, bias_ptr, rows_ptr, finished_ptr, inverse_temperature_ptr, counts_ptr, min_tokens_ptr, stops_ptr, seen_ptr,
    penalty_ptr, tally_ptr, presence_ptr, frequency_ptr, tops_ptr, totals_ptr, chunk_tops_ptr, chunk_peaks_ptr,
    chunk_masses_ptr, above_ptr, scale, softcap,
    V: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, BLOCKS_P2: tl.constexpr, BIAS: tl.constexpr,
    CAP: tl.constexpr, ROWS: tl.constexpr, TRUNCATED: tl.constexpr, PENALTY: tl.constexpr, STOPS: tl.constexpr,
    S: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """One group of lanes of one row."""
    P: tl.constexpr = BLOCK // GROUP
    BLOCKS: tl.constexpr = (V + BLOCK - 1) // BLOCK
    g = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64)
    b = tl.load(rows_ptr + n).to(tl.int64) if ROWS else n
    runs = b >= 0
    if runs:
        runs = tl.load(finished_ptr + b) == 0
    if runs:
        inverse_temperature = tl.load(inverse_temperature_ptr + b)
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
        row = (x_row, bias_ptr, scale, softcap, inverse_temperature, seen_ptr + b * WORDS, tl.load(penalty_ptr + b),
               tally_ptr + b * V, tl.load(presence_ptr + b), tl.load(frequency_ptr + b), stops_ptr + b * S,
               tl.load(counts_ptr + b) < tl.load(min_tokens_ptr + b))  # fmt: skip
        _z, y = load_logits(row, column, column < V, BIAS, CAP, PENALTY, STOPS)
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


_launch_sweep, _launch_draw = Launcher(_sweep), Launcher(draw)


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
    S, words = state.stop_ids_BS.shape[1], state.seen_BW.shape[1] if variant.penalised else 0
    chunks_p2 = int(triton.next_power_of_2(blocks * (block // group)))
    stops = S if variant.held else 0
    maps = float(scale), float(softcap or 1)
    penalty = variant.penalised + 2 * variant.tallied
    flags = bias_V is not None, softcap is not None, rows_N is not None, variant.truncated, penalty, stops
    with torch.cuda.device_of(x_NV):
        _launch_sweep(
            (block // group, N), x_NV, bias_V, rows_N, state.finished_B, state.inverse_temperature_B, state.counts_B,
            state.min_tokens_B, state.stop_ids_BS, state.seen_BW, state.penalty_B, state.tally_BV, state.presence_B,
            state.frequency_B, s.tops, s.totals, s.chunk_tops, s.chunk_peaks, s.chunk_masses, s.above, *maps, V, block,
            group, blocks_p2, *flags, S, words, num_warps=8 if penalty else 4, enable_fp_fusion=False,
        )  # fmt: skip
        _launch_draw(
            (N,), x_NV, bias_V, rows_N, state.finished_B, state.inverse_temperature_B, state.greedy_B, state.counts_B,
            state.min_tokens_B, state.max_tokens_B, state.stop_ids_BS, state.seen_BW, state.penalty_B, state.tally_BV,
            state.presence_B, state.frequency_B, state.top_k_B, state.top_p_B, state.log_min_p_B, state.keys_B, s.tops,
            s.totals, s.chunk_tops, s.chunk_peaks, s.chunk_masses, s.above, s.listed, s.values, s.ids, s.cuts,
            state.tokens_B, state.token_logps_B, state.policy_logps_B, state.out_tokens_BT, state.out_token_logps_BT,
            state.out_policy_logps_BT, state.positions_B, state.slots_B, state.lengths_B, *maps, state.max_tokens, V,
            block, group, chunks_p2, *flags, S, words, blocks_p2, _ROOM, num_warps=8 if variant.truncated else 4,
            enable_fp_fusion=False,
        )  # fmt: skip
