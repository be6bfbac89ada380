"""GRPO's losses as functions of packed tokens: one policy objective and one weighting of tokens for each loss type.

N scored tokens of B rows (completions) lie one after another without padding; ``row_N`` says whose they are. A loss is
``sum_N weight_N * term_N``, where the weights' denominators span the whole optimizer step (:class:`Window`). So
accumulating micro-batches gives, to rounding, the loss and gradient of the one large batch, for every loss type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .segments import row_count, row_mean

LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class Tokens:
    """The scored tokens of one micro-batch.

    Attributes:
        logps_N: log-probabilities under the policy being trained, with gradient.
        old_logps_N: under the policy that the samples are attributed to; ``logps_N.detach()`` on policy.
        advantages_B: one advantage a row.
        row_N: int64 row of each token.
        ref_logps_N: under the reference policy; needed where beta is not 0.
        correction_N: weight of each token's policy term for the mismatch of sampler and trainer; None for 1.
    """

    logps_N: torch.Tensor
    old_logps_N: torch.Tensor
    advantages_B: torch.Tensor
    row_N: torch.Tensor
    ref_logps_N: torch.Tensor | None = None
    correction_N: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return self.advantages_B.shape[0]

    @property
    def advantages_N(self) -> torch.Tensor:
        return self.advantages_B.to(self.logps_N.dtype)[self.row_N]


@dataclass(frozen=True)
class Window:
    """What one optimizer step spans: its rows (those without a scored token too) and its scored tokens."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class LossSettings:
    """The fields of ``GRPOConfig`` that the losses read; ``epsilon_high`` None means ``epsilon_low``."""

    loss_type: str = "dapo"
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    beta: float = 0.0
    use_bias_correction_kl: bool = True
    max_completion_length: int = 512

    @property
    def upper(self) -> float:
        return 1 + (self.epsilon_low if self.epsilon_high is None else self.epsilon_high)

    @property
    def lower(self) -> float:
        return 1 - self.epsilon_low


@dataclass(frozen=True)
class LossResult:
    """``loss`` with gradient; for the metrics, without it: importance ratio (after ``delta``) and KL of each token."""

    loss: torch.Tensor
    ratio_N: torch.Tensor
    kl_N: torch.Tensor | None


def importance_ratio(tokens: Tokens, level: str) -> torch.Tensor:
    """``[N]`` ratio of the policy to the old one.

    ``"token"``: per token (PPO, Schulman et al. 2017, arXiv:1707.06347). ``"sequence"``: the exponential of the row's
    mean log-ratio, the same for all its tokens (GSPO, Zheng et al. 2025, arXiv:2507.18071, eq. 7).
    """
    log_ratio_N = tokens.logps_N - tokens.old_logps_N
    if level == "sequence":
        log_ratio_N = row_mean(log_ratio_N, tokens.row_N, tokens.rows)[tokens.row_N]
    return torch.exp(log_ratio_N)


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


def clipped_surrogate(tokens: Tokens, ratio_N: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """``[N]`` terms ``-min(r A, clip(r, 1 - eps_low, 1 + eps_high) A)`` (PPO, arXiv:1707.06347, eq. 7).

    ``eps_high`` above ``eps_low`` is DAPO's clip-higher (arXiv:2503.14476, eq. 10); the unclipped side is
    :func:`bounded` by ``delta``.
    """
    advantages_N = tokens.advantages_N
    clipped_N = torch.clamp(ratio_N, settings.lower, settings.upper)
    return -torch.min(bounded(ratio_N, settings) * advantages_N, clipped_N * advantages_N)


def bounded(ratio_N: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """The ratio bounded above by ``delta``: two-sided clipping (INTELLECT-2, arXiv:2505.07291, section 3.4)."""
    return ratio_N if settings.delta is None else torch.clamp(ratio_N, max=settings.delta)


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


@dataclass(frozen=True)
class LossType:
    """A loss: the policy term of each token, and the weight with which the tokens are summed."""

    objective: Callable[[Tokens, torch.Tensor, LossSettings], torch.Tensor]
    weights: Callable[[Tokens, Window, LossSettings], torch.Tensor]


LOSSES: dict[str, LossType] = {
    "grpo": LossType(clipped_surrogate, sequence_mean),
    "bnpo": LossType(clipped_surrogate, token_mean),
    "dr_grpo": LossType(clipped_surrogate, constant_length),
    "dapo": LossType(clipped_surrogate, token_mean),
}


def policy_loss(tokens: Tokens, window: Window, settings: LossSettings) -> LossResult:
    """The share of the optimizer step's loss that this micro-batch holds; shares add up to the step's loss."""
    kind = LOSSES[settings.loss_type]
    ratio_N = importance_ratio(tokens, settings.importance_sampling_level)
    term_N = kind.objective(tokens, ratio_N, settings)
    if tokens.correction_N is not None:
        term_N = term_N * tokens.correction_N
    kl_N = None
    if settings.beta != 0.0:
        kl_N = reference_kl(tokens, ratio_N, settings.use_bias_correction_kl)
        term_N = term_N + settings.beta * kl_N
    loss = (term_N * kind.weights(tokens, window, settings)).sum()
    return LossResult(loss, bounded(ratio_N, settings).detach(), None if kl_N is None else kl_N.detach())
