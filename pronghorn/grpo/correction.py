"""Importance weights for the mismatch between the sampler's and the trainer's log-probabilities.

Sampler and trainer read the same weights through different kernels, so the policy that drew a token differs slightly
from the one that is differentiated. The policy term is weighted by ``pi_trainer / pi_sampler``, bounded so that few
tokens cannot dominate: truncated importance sampling (Yao et al. 2025, https://fengyao.notion.site/off-policy-rl) or
masked (Liu et al. 2025, "When Speed Kills Stability"), by token or by sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .segments import row_sum


def truncate(ratio: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """Ratios clipped to ``[low, high]``; None leaves a side open (truncated importance sampling, Yao et al. 2025,
    https://fengyao.notion.site/off-policy-rl)."""
    return ratio if low is None and high is None else torch.clamp(ratio, min=low, max=high)


def mask(ratio: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """Ratios outside ``[low, high]`` become 0, which takes their tokens out of the policy term (masked importance
    sampling, Liu et al. 2025, https://yingru.notion.site/When-Speed-Kills-Stability-271211a558b7808d8b12d403fd15edda).
    """
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)


Bound = Callable[[torch.Tensor, float | None, float | None], torch.Tensor]

MODES: dict[str, tuple[bool, Bound]] = {
    "token_truncate": (False, truncate),
    "token_mask": (False, mask),
    "sequence_truncate": (True, truncate),
    "sequence_mask": (True, mask),
}
"""Mode to (one ratio a sequence, how it is bounded)."""


@dataclass(frozen=True)
class Correction:
    """Bounded weights and what the metrics report.

    Attributes:
        weights_N: weight of each token's policy term, without gradient.
        ratios: the bounded ratios as the mode sees them, ``[B]`` or ``[N]``.
        gap_M: absolute differences of log-probability, of the M tokens that the sampler could score.
        kl: mean of ``r - 1 - log r`` over those tokens, ``r = pi_trainer / pi_sampler``: the k3 estimate of
            KL(sampler || trainer) in nats; 0 when there are none.
    """

    weights_N: torch.Tensor
    ratios: torch.Tensor
    gap_M: torch.Tensor
    kl: torch.Tensor


def correct(
    trainer_logps_N: torch.Tensor,
    sampler_logps_N: torch.Tensor,
    row_N: torch.Tensor,
    rows: int,
    mode: str,
    low: float | None,
    high: float | None,
    complete: bool = False,
) -> Correction:
    """Weights of N tokens in ``rows`` rows under ``mode`` (a key of :data:`MODES`) with bounds ``[low, high]``.

    A NaN in ``sampler_logps_N`` (a token that the sampler could not score) counts as no mismatch; ``complete`` says
    that there is none, so that the host need not wait to see how many there are. By token the ratio is that
    of Yao et al. 2025 (https://fengyao.notion.site/off-policy-rl), by sequence that of Liu et al. 2025
    (https://yingru.notion.site/When-Speed-Kills-Stability-271211a558b7808d8b12d403fd15edda).
    """
    by_sequence, bound = MODES[mode]
    difference_N = trainer_logps_N.detach() - sampler_logps_N
    known_M = difference_N if complete else difference_N[~torch.isnan(difference_N)]
    difference_N = torch.nan_to_num(difference_N, nan=0.0)
    if by_sequence:
        ratios = bound(torch.exp(row_sum(difference_N, row_N, rows)), low, high)
        weights_N = ratios[row_N]
    else:
        ratios = weights_N = bound(torch.exp(difference_N), low, high)
    kl = (torch.expm1(known_M) - known_M).mean() if known_M.numel() else difference_N.new_zeros(())
    return Correction(weights_N, ratios, known_M.abs(), kl)
