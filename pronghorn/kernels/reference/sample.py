"""A sampling step in plain PyTorch: the CPU path and the oracle. Top-k and top-p sort."""

from __future__ import annotations

import torch

from pronghorn.kernels.reference.cumulative import cumulative
from pronghorn.kernels.sample_state import FULL, NOT_A_NUMBER, RUNS, STOPPED, SampleState, Variant

_BELOW_ONE = 1.0 - 2.0**-52
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # SplitMix64's constants as signed integers
_M1, _M2 = 0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64)


def _shifted(x: torch.Tensor, by: int) -> torch.Tensor:
    """Logical shift right: int64's own is arithmetic."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def uniforms(keys_B: torch.Tensor, counts_B: torch.Tensor) -> torch.Tensor:
    """One float64 in [0, 1) for each row, from its int64 key and its counter; 53 random bits (SplitMix64)."""
    x = keys_B + (counts_B.long() + 1) * GOLDEN
    x = (x ^ _shifted(x, 30)) * _M1
    x = (x ^ _shifted(x, 27)) * _M2
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() * 2.0**-53


def draw(logps_BV: torch.Tensor, uniforms_B: torch.Tensor) -> torch.Tensor:
    """The inverse of the cumulative distribution at one uniform number a row; ids of probability 0 are never drawn."""
    cumulative_BV = cumulative(logps_BV.double().exp_())
    total_B1 = cumulative_BV[:, -1:]
    target_B1 = torch.minimum(uniforms_B.unsqueeze(1) * total_B1, total_B1 * _BELOW_ONE)
    return torch.searchsorted(cumulative_BV, target_B1, right=True).squeeze(1).clamp_(max=logps_BV.shape[1] - 1)


def seen(seen_BW: torch.Tensor, V: int) -> torch.Tensor:
    """The bits of ``seen_BW`` as a bool mask ``[B, V]``."""
    bits = (seen_BW.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=seen_BW.device)) & 1
    return bits.flatten(1)[:, :V] != 0


def cut_(y_BV: torch.Tensor, state: SampleState, at: torch.Tensor) -> torch.Tensor:
    """Put -inf where min-p, top-k and top-p, in this order, leave nothing; greedy rows stay as they are."""
    V = y_BV.shape[1]
    drawn_B1 = (state.greedy_B[at] == 0).unsqueeze(1)
    k_B1, p_B1 = state.top_k_B[at].long().unsqueeze(1), state.top_p_B[at].double().unsqueeze(1)
    floor_B1 = y_BV.amax(-1, keepdim=True) + state.log_min_p_B[at].unsqueeze(1)
    y_BV.masked_fill_((y_BV < floor_B1) & drawn_B1, float("-inf"))
    sorted_BV = y_BV.sort(dim=-1, descending=True).values
    kth_B1 = torch.where(k_B1 < V, sorted_BV.gather(1, (k_B1 - 1).clamp(0, V - 1)), float("-inf"))
    kept_BV = sorted_BV.masked_fill(sorted_BV < kth_B1, float("-inf"))
    cumulative_BV = cumulative(kept_BV.double().softmax(-1))
    at_B1 = (cumulative_BV < p_B1).sum(-1, keepdim=True).clamp(max=V - 1)
    least_B1 = torch.where(p_B1 < 1, torch.maximum(sorted_BV.gather(1, at_B1), kth_B1), kth_B1)
    return y_BV.masked_fill_((y_BV < least_B1) & drawn_B1, float("-inf"))


def sample_step(
    x_NV: torch.Tensor,
    state: SampleState,
    variant: Variant,
    rows_N: torch.Tensor | None,
    bias_V: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> None:
    """As :func:`pronghorn.kernels.sample.sample_step`."""
    rows = torch.arange(len(x_NV), device=x_NV.device) if rows_N is None else rows_N.long()
    runs = rows >= 0
    runs = runs & (state.finished_B[rows.clamp(min=0)] == RUNS)
    at = rows[runs]
    if not len(at):
        return
    u_BV = (x_NV[runs] if bias_V is None else x_NV[runs] + bias_V.to(x_NV.dtype)) * scale
    if softcap is not None:
        u_BV = torch.tanh(u_BV / softcap) * softcap
    z_BV = u_BV / state.temperature_B[at].unsqueeze(1)
    policy_BV = z_BV.log_softmax(-1)
    y_BV, counts_B = z_BV.clone(), state.counts_B[at]
    shaped_B = torch.zeros_like(runs[runs])
    V = y_BV.shape[1]
    if variant.held:
        early_B = counts_B < state.min_tokens_B[at]
        b, s = torch.nonzero(early_B.unsqueeze(1) & (state.stop_ids_BS[at] >= 0), as_tuple=True)
        y_BV[b, state.stop_ids_BS[at][b, s].long()] = float("-inf")
        shaped_B |= early_B
    if variant.penalised:
        penalty_B1 = state.penalty_B[at].unsqueeze(1)
        y_BV = torch.where(
            seen(state.seen_BW[at], V), torch.where(y_BV > 0, y_BV / penalty_B1, y_BV * penalty_B1), y_BV
        )
        shaped_B |= penalty_B1.squeeze(1) != 1
    if variant.tallied:
        tally_BV, presence_B, frequency_B = state.tally_BV[at], state.presence_B[at], state.frequency_B[at]
        less_BV = frequency_B.unsqueeze(1) * tally_BV + presence_B.unsqueeze(1) * (tally_BV > 0)
        y_BV = y_BV - less_BV / state.temperature_B[at].unsqueeze(1)
        shaped_B |= (presence_B != 0) | (frequency_B != 0)
    greedy_B = state.greedy_B[at] != 0
    if variant.truncated:
        y_BV = cut_(y_BV, state, at)
        asks_B = (state.top_k_B[at] < V) | (state.top_p_B[at] < 1) | (state.log_min_p_B[at] > float("-inf"))
        shaped_B |= asks_B & ~greedy_B
    drawn_BV = y_BV.log_softmax(-1)
    tokens_B = draw(drawn_BV, uniforms(state.keys_B[at], counts_B))
    tokens_B = torch.where(greedy_B, y_BV.argmax(-1), tokens_B)
    policy_B = policy_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1)
    own_B = torch.where(shaped_B, drawn_BV.gather(1, tokens_B.unsqueeze(1)).squeeze(1), policy_B)
    known_B = ~(policy_B.isnan() | own_B.isnan())
    _record(state, at, tokens_B, own_B, policy_B, known_B, variant)


def _record(
    state: SampleState,
    at: torch.Tensor,
    tokens_B: torch.Tensor,
    own_B: torch.Tensor,
    policy_B: torch.Tensor,
    known_B: torch.Tensor,
    variant: Variant,
) -> None:
    """The rows' outputs, counters and ends."""
    counts_B = state.counts_B[at].long()
    nan = float("nan")
    own_B, policy_B = own_B.masked_fill(~known_B, nan), policy_B.masked_fill(~known_B, nan)
    drawn_B = counts_B + 1
    stopped_B = (state.stop_ids_BS[at] == tokens_B.unsqueeze(1)).any(1) & (drawn_B >= state.min_tokens_B[at])
    ends_B = torch.full_like(state.finished_B[at], RUNS)
    ends_B[drawn_B >= state.max_tokens_B[at].clamp(max=state.max_tokens)] = FULL
    ends_B[stopped_B] = STOPPED
    ends_B[~known_B] = NOT_A_NUMBER
    state.token_logps_B[at], state.policy_logps_B[at] = own_B, policy_B
    state.out_tokens_BT[at, counts_B] = tokens_B.masked_fill(~known_B, -1).int()
    state.out_token_logps_BT[at, counts_B], state.out_policy_logps_BT[at, counts_B] = own_B, policy_B
    state.tokens_B[at] = torch.where(known_B, tokens_B, state.tokens_B[at])
    if variant.penalised:
        rows, ids = at[known_B], tokens_B[known_B]
        bit = torch.ones_like(ids).int() << (ids % 32).int()
        state.seen_BW[rows, ids // 32] |= bit
    if variant.tallied:
        state.tally_BV[at[known_B], tokens_B[known_B]] += 1
    positions_B = state.positions_B[at] + 1
    state.counts_B[at], state.positions_B[at] = drawn_B.int(), positions_B
    state.slots_B[at] = torch.where(ends_B == RUNS, positions_B, -1)
    state.lengths_B[at] = torch.where(ends_B == RUNS, positions_B + 1, 0)
    state.finished_B[at] = ends_B
