"""The weight with which each token enters a loss: how lengths and rows are averaged over the optimizer step."""

from __future__ import annotations

import torch

from .segments import row_count
from .tokens import LossSettings, Tokens, Window


def sequence_mean(tokens: Tokens, window: Window, settings: LossSettings) -> torch.Tensor:
    """``[N]`` weights: mean over each completion, then over completions (GRPO, arXiv:2402.03300, eq. 3)."""
    length_B = row_count(tokens.row_N, tokens.rows).to(tokens.logps_N.dtype)
    return (1 / (length_B.clamp(min=1) * max(window.rows, 1)))[tokens.row_N]


def token_mean(tokens: Tokens, window: Window, settings: LossSettings) -> torch.Tensor:
    """``[N]`` weights: mean over all tokens of the step (DAPO, arXiv:2503.14476, eq. 8).

    BNPO is the mean over a local batch's tokens (as TRL names it, after arXiv:2506.02864); the local batch is here the
    optimizer step's, so that accumulation is exact and the two agree in one process.
    """
    return torch.full_like(tokens.logps_N, 1 / max(window.tokens, 1))


def constant_length(tokens: Tokens, window: Window, settings: LossSettings) -> torch.Tensor:
    """``[N]`` weights: one constant length for all, so that none favours short ones (Dr. GRPO, arXiv:2503.20783)."""
    return torch.full_like(tokens.logps_N, 1 / (max(window.rows, 1) * settings.max_completion_length))


def sequence_sum(tokens: Tokens, window: Window, settings: LossSettings) -> torch.Tensor:
    """``[N]`` weights: sum over each completion, mean over completions, so that a sequence-level term counts by length
    (LUSPO, arXiv:2602.05261)."""
    return torch.full_like(tokens.logps_N, 1 / max(window.rows, 1))
