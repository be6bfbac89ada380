"""What a micro-batch's loss adds to the metrics, under TRL's names: means by tokens, or rows for a sequence's ratio."""

from __future__ import annotations

import torch

from .correction import Correction
from .losses import LOSSES, LossResult
from .metrics import Metrics
from .objectives import gamma_weights
from .segments import row_mean
from .tokens import LossSettings, Tokens


def loss_metrics(
    tokens: Tokens, result: LossResult, settings: LossSettings, entropy_N: torch.Tensor, metrics: Metrics
) -> None:
    """``entropy``, ``kl``, and ``clip_ratio/*``, ``cispo_clip_ratio`` or ``vespo/phi_seq_mean``."""
    N = entropy_N.numel()
    if not N:
        return
    metrics.mean("entropy", entropy_N.mean(), N)
    if result.kl_N is not None:
        metrics.mean("kl", result.kl_N.mean(), N)
    if LOSSES[settings.loss_type].clips:
        _clip_metrics(tokens, result.ratio_N, settings, metrics)
    elif settings.loss_type == "cispo":
        clipped_N = (result.ratio_N > settings.highest) & (tokens.advantages_N > 0)
        _share("cispo_clip_ratio", clipped_N.to(entropy_N.dtype), tokens, settings, metrics)
    elif settings.loss_type == "vespo":
        metrics.mean("vespo/phi_seq_mean", gamma_weights(tokens, settings).mean(), tokens.rows)


def _share(
    name: str, clipped_N: torch.Tensor, tokens: Tokens, settings: LossSettings, metrics: Metrics
) -> torch.Tensor:
    """Log the share of clipped tokens (rows, for a ratio by sequence); the share of each row, ``[B]``."""
    clipped_B = row_mean(clipped_N, tokens.row_N, tokens.rows)
    if settings.importance_sampling_level == "sequence":
        metrics.mean(name, clipped_B.mean(), tokens.rows)
    else:
        metrics.mean(name, clipped_N.mean(), clipped_N.numel())
    return clipped_B


def _clip_metrics(tokens: Tokens, ratio_N: torch.Tensor, settings: LossSettings, metrics: Metrics) -> None:
    sign_N, dtype = tokens.advantages_N, tokens.logps_N.dtype
    low_N = ((ratio_N < settings.lower) & (sign_N < 0)).to(dtype)
    high_N = ((ratio_N > settings.upper) & (sign_N > 0)).to(dtype)
    low_B = _share("clip_ratio/low_mean", low_N, tokens, settings, metrics)
    metrics.low("clip_ratio/low_min", low_B.min())
    high_B = _share("clip_ratio/high_mean", high_N, tokens, settings, metrics)
    metrics.high("clip_ratio/high_max", high_B.max())
    _share("clip_ratio/region_mean", low_N + high_N, tokens, settings, metrics)


TRLS_GAP = ("sampling_logp_difference/mean", "sampling_logp_difference/max")
"""TRL's names of the difference between sampler and trainer, mean and largest, in nats a token."""


def correction_metrics(correction: Correction, applied: bool, metrics: Metrics) -> None:
    """``sampling/*``: how far sampler and trainer are apart, and the weights where they are ``applied``."""
    known = correction.gap_M.numel()
    if known:
        for mean, most in (("logp_diff_mean", "logp_diff_max"), TRLS_GAP):
            metrics.mean(f"sampling/{mean}", correction.gap_M.mean(), known)
            metrics.high(f"sampling/{most}", correction.gap_M.max())
        metrics.mean("sampling/kl", correction.kl, known)
    ratios = correction.ratios
    if applied and ratios.numel():
        metrics.low("sampling/importance_sampling_ratio/min", ratios.min())
        metrics.mean("sampling/importance_sampling_ratio/mean", ratios.mean(), ratios.numel())
        metrics.high("sampling/importance_sampling_ratio/max", ratios.max())
