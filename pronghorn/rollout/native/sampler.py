"""Drawing the next token of every row at once, with the log-probs of what was drawn. Pure tensor functions.

The order is vLLM's: minimum length, repetition, frequency and presence penalties, temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.reference.cumulative import cumulative
from ...kernels.reference.sample import draw
from .random import uniforms
from .sampling_rows import SamplingRows

_CANDIDATES = 256  # likeliest tokens that are sorted first


@dataclass(frozen=True)
class Drawn:
    """What one step drew for B rows.

    Attributes:
        tokens_B: int64 ids.
        token_logps_B: float32, under the distribution drawn from (greedy rows: log softmax of the penalised logits).
        policy_logps_B: float32, log softmax(raw logits / temperature), full vocabulary.
        top_ids_BA, top_logps_BA: the A likeliest under softmax(raw logits), or None when no row wants them.
        raw_logps_B, ranks_B: the drawn token under softmax(raw logits), and its rank there from 1; or None.
    """

    tokens_B: torch.Tensor
    token_logps_B: torch.Tensor
    policy_logps_B: torch.Tensor
    top_ids_BA: torch.Tensor | None = None
    top_logps_BA: torch.Tensor | None = None
    raw_logps_B: torch.Tensor | None = None
    ranks_B: torch.Tensor | None = None


def sample(logits_BV: torch.Tensor, rows: SamplingRows) -> Drawn:
    """Draw one token a row from raw logits ``[B, V]`` of any float dtype; sums are float32, the draw float64."""
    raw_BV = logits_BV.float()
    tempered_BV = raw_BV / rows.temperature_B1 if rows.tempered else raw_BV
    policy_BV = tempered_BV.log_softmax(-1)
    drawn_BV = policy_BV
    if rows.shaped:
        drawn_BV = _shape(raw_BV, rows).log_softmax(-1)
    tokens_B = draw(drawn_BV, uniforms(rows.keys_B, rows.positions_B)) if rows.any_drawn else drawn_BV.argmax(-1)
    if rows.any_drawn and rows.greedy_B is not None:
        tokens_B = torch.where(rows.greedy_B, drawn_BV.argmax(-1), tokens_B)
    at_B1 = tokens_B.unsqueeze(1)
    token_logps_B = drawn_BV.gather(1, at_B1).squeeze(1)
    policy_logps_B = policy_BV.gather(1, at_B1).squeeze(1) if rows.shaped else token_logps_B
    if rows.alternatives < 0:
        return Drawn(tokens_B, token_logps_B, policy_logps_B)
    plain_BV = raw_BV.log_softmax(-1)
    chosen_B1 = plain_BV.gather(1, at_B1)
    top = plain_BV.topk(min(rows.alternatives, plain_BV.shape[1]), dim=-1)
    ranks_B = (plain_BV > chosen_B1).sum(-1) + 1
    return Drawn(tokens_B, token_logps_B, policy_logps_B, top.indices, top.values, chosen_B1.squeeze(1), ranks_B)


def _shape(raw_BV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Logits of the distribution to draw from; -inf where a token cannot be drawn."""
    x_BV = raw_BV.clone()
    if rows.early is not None:
        at, ids, least = rows.early
        x_BV[at, ids] = torch.where(rows.positions_B[at] < least, float("-inf"), x_BV[at, ids])
    if rows.seen_BV is not None and rows.penalty_B1 is not None:
        penalised_BV = torch.where(x_BV > 0, x_BV / rows.penalty_B1, x_BV * rows.penalty_B1)
        x_BV = torch.where(rows.seen_BV, penalised_BV, x_BV)
    if rows.tally_BV is not None:
        x_BV = x_BV - (rows.frequency_B1 * rows.tally_BV + rows.presence_B1 * (rows.tally_BV > 0))
    x_BV = x_BV / rows.temperature_B1
    if rows.log_min_p_B1 is not None:
        floor_B1 = x_BV.amax(-1, keepdim=True) + rows.log_min_p_B1
        x_BV = x_BV.masked_fill(_not_greedy(x_BV < floor_B1, rows), float("-inf"))
    if rows.top_k_B1 is None and rows.top_p_B1 is None:
        return x_BV
    return x_BV.masked_fill(_not_greedy(x_BV < _threshold(x_BV, rows), rows), float("-inf"))


def _not_greedy(mask_BV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Greedy rows are not truncated: their log-prob is of the penalised logits as they are."""
    return mask_BV if rows.greedy_B is None else mask_BV & ~rows.greedy_B.unsqueeze(1)


def _threshold(x_BV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """The least logit ``[B, 1]`` that top-k, then top-p over what top-k keeps, leave in; equal logits stay together.

    Only the likeliest few hundred are sorted: they nearly always hold the threshold, and sorting a whole vocabulary
    costs several times as much. Where a row needs more, all are sorted; the threshold is the same either way.
    """
    V = x_BV.shape[1]
    for count in (min(_CANDIDATES, V), V):
        top_BC = x_BV.topk(count, dim=-1).values
        threshold_B1 = torch.full_like(top_BC[:, :1], float("-inf"))
        if rows.top_k_B1 is not None:
            kth_B1 = top_BC.gather(1, (rows.top_k_B1 - 1).clamp(max=count - 1))
            threshold_B1 = torch.where(rows.top_k_B1 < V, kth_B1, threshold_B1)
            if count < V and bool(((rows.top_k_B1 > count) & (rows.top_k_B1 < V)).any()):
                continue
        if rows.top_p_B1 is None:
            break
        total_B1 = x_BV.masked_fill(x_BV < threshold_B1, float("-inf")).logsumexp(-1, keepdim=True)
        kept_BC = top_BC.masked_fill(top_BC < threshold_B1, float("-inf"))
        mass_BC = (kept_BC.double() - total_B1).exp()
        reached_BC = cumulative(mass_BC) >= rows.top_p_B1
        wanted_B1 = rows.top_p_B1 < 1
        if count < V and bool((wanted_B1 & ~reached_BC[:, -1:]).any()):
            continue
        at_B1 = (~reached_BC).sum(-1, keepdim=True).clamp_(max=count - 1)
        threshold_B1 = torch.where(wanted_B1, torch.maximum(top_BC.gather(1, at_B1), threshold_B1), threshold_B1)
        break
    return threshold_B1
