"""The policy term of each token, one short function for each family of losses: what the optimizer lowers."""

from __future__ import annotations

import math

import torch

from .segments import row_mean, row_sum
from .tokens import LossSettings, Tokens

_LOG_LOW, _LOG_HIGH = math.log(1e-8), 20.0
"""Bounds of VESPO's log-weights, those of its authors' code and TRL's."""


def importance_ratio(tokens: Tokens, level: str) -> torch.Tensor:
    """``[N]`` ratio of the policy to the old one.

    ``"token"``: per token (PPO, Schulman et al. 2017, arXiv:1707.06347). ``"sequence"``: the exponential of the row's
    mean log-ratio, the same for all its tokens (GSPO, Zheng et al. 2025, arXiv:2507.18071, eq. 7).
    """
    log_ratio_N = tokens.logps_N - tokens.old_logps_N
    if level == "sequence":
        log_ratio_N = row_mean(log_ratio_N, tokens.row_N, tokens.rows)[tokens.row_N]
    return torch.exp(log_ratio_N)


def bounded(ratio_N: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """The ratio bounded above by ``delta``: two-sided clipping (INTELLECT-2, arXiv:2505.07291, section 3.4)."""
    return ratio_N if settings.delta is None else torch.clamp(ratio_N, max=settings.delta)


def clipped_surrogate(tokens: Tokens, ratio_N: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """``[N]`` terms ``-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)`` (PPO, arXiv:1707.06347, eq. 7).

    ``eps_high`` above ``eps_low`` is DAPO's clip-higher (arXiv:2503.14476, eq. 10); the unclipped side is
    :func:`bounded` by ``delta``.
    """
    advantages_N = tokens.advantages_N
    clipped_N = torch.clamp(ratio_N, settings.lower, settings.upper)
    return -torch.min(bounded(ratio_N, settings) * advantages_N, clipped_N * advantages_N)


def clipped_weight(tokens: Tokens, ratio_N: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """``[N]`` terms ``-sg(min(r, eps_high)) A log p`` (CISPO, MiniMax-M1, arXiv:2506.13585, section 3.1).

    The weight is clipped, not the update, so every token keeps a gradient. ``epsilon_high`` is the bound itself, not
    its distance from 1 (ScaleRL, arXiv:2510.13786, takes 5).
    """
    weight_N = torch.clamp(ratio_N, max=settings.highest).detach()
    return -weight_N * tokens.advantages_N * tokens.logps_N


def soft_gate(tokens: Tokens, ratio_N: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """``[N]`` terms ``-(4 / t) sigmoid(t (r - 1)) A`` (SAPO, Gao et al. 2025, arXiv:2511.20347).

    A smooth gate in place of the clip: slope 1 at r = 1, falling off on both sides. The temperature t differs by the
    advantage's sign.
    """
    t_B = torch.where(tokens.advantages_B > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg)
    t_N = t_B[tokens.row_N]
    return -torch.sigmoid(t_N * (ratio_N - 1)) * 4 / t_N * tokens.advantages_N


@torch.no_grad()
def gamma_weights(tokens: Tokens, settings: LossSettings) -> torch.Tensor:
    """``[B]`` weights ``phi(w) = e^lambda w^k e^(-lambda w)`` of whole sequences, without gradient, 1 at w = 1.

    w is the product of a row's token ratios, policy over sampler: the old policy's ratio times ``correction_N``, which
    is thus part of the weight and not applied again (VESPO, arXiv:2602.10693). Logs are clamped as TRL does.
    """
    log_N = torch.clamp(tokens.logps_N - tokens.old_logps_N, -_LOG_HIGH, _LOG_HIGH)
    log_w_B = row_sum(log_N, tokens.row_N, tokens.rows)
    if tokens.correction_N is not None:
        log_c_N = torch.clamp(torch.log(tokens.correction_N), _LOG_LOW, _LOG_HIGH)
        log_w_B = log_w_B + row_sum(log_c_N, tokens.row_N, tokens.rows)
    log_w_B = torch.clamp(log_w_B, _LOG_LOW, _LOG_HIGH)
    gained_B = tokens.advantages_B >= 0
    k_B = torch.where(gained_B, settings.vespo_k_pos, settings.vespo_k_neg)
    lambda_B = torch.where(gained_B, settings.vespo_lambda_pos, settings.vespo_lambda_neg).clamp(min=1e-4)
    phi_B = torch.exp(lambda_B + k_B * log_w_B - lambda_B * torch.exp(log_w_B))
    return phi_B.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def gamma_weighted(tokens: Tokens, ratio_N: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """``[N]`` terms ``-phi(w) A log p`` (VESPO, arXiv:2602.10693), with :func:`gamma_weights`."""
    return -gamma_weights(tokens, settings)[tokens.row_N] * tokens.advantages_N * tokens.logps_N


def reference_kl(tokens: Tokens, ratio_N: torch.Tensor, bias_correction: bool) -> torch.Tensor:
    """``[N]`` estimate of KL(policy || reference): ``exp(d) - d - 1`` with ``d = ref - policy``.

    The k3 estimator of Schulman (http://joschu.net/blog/kl-approx.html), as in GRPO (arXiv:2402.03300, eq. 4). With
    ``bias_correction`` it is weighted by the importance ratio, so that its gradient is that of the reverse KL
    (DeepSeek-V3.2, arXiv:2512.02556).
    """
    if tokens.ref_logps_N is None:
        raise ValueError("ref_logps_N=None: a loss with beta != 0 needs the reference policy's log-probabilities")
    d_N = tokens.ref_logps_N - tokens.logps_N
    kl_N = torch.exp(d_N) - d_N - 1
    return kl_N * ratio_N if bias_correction else kl_N
