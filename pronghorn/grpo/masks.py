"""Which tokens' policy terms count: those of high entropy, those of sequences that are not too far off policy."""

from __future__ import annotations

import torch

from .segments import row_mean
from .tokens import Tokens


def high_entropy_mask(entropy_N: torch.Tensor, top: float) -> torch.Tensor:
    """``[N]`` bool, the share ``top`` of tokens with the highest entropy ("forking tokens", Wang et al. 2025,
    arXiv:2506.01939): entropy at or above the (1 - top) quantile of all N.

    The quantile interpolates linearly between tokens; with ``top=0`` the highest token alone is left. N is all that the
    quantile spans: TRL takes a micro-batch, Pronghorn the optimizer step (``loss_step.py``).
    """
    if not entropy_N.numel():
        return torch.zeros_like(entropy_N, dtype=torch.bool)
    return entropy_N >= torch.quantile(entropy_N.float(), 1 - top)


def off_policy_mask(tokens: Tokens, threshold: float) -> torch.Tensor:
    """``[B]`` bool, rows whose policy terms count: advantage not negative, or near enough to the sampling policy.

    Near means that the row's mean of ``log p_sampler - log p`` is at most ``threshold`` (off-policy sequence masking,
    DeepSeek-V3.2, arXiv:2512.02556, eq. 9). It is taken from the sampler's own log-probabilities, so drift by updates
    and mismatch of the two engines both count; a token that the sampler could not score counts as no drift.
    """
    if tokens.sampler_logps_N is None:
        raise ValueError("sampler_logps_N=None: off_policy_mask_threshold needs the sampler's log-probabilities")
    drift_N = torch.nan_to_num(tokens.sampler_logps_N - tokens.logps_N.detach(), nan=0.0)
    return (tokens.advantages_B >= 0) | (row_mean(drift_N, tokens.row_N, tokens.rows) <= threshold)
