"""What the losses are functions of: packed tokens, the span of an optimizer step, and the settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch

LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class Tokens:
    """The N scored tokens of the B rows (completions) of one micro-batch, one after another without padding.

    Attributes:
        logps_N: log-probabilities under the policy being trained, with gradient.
        old_logps_N: under the policy that the samples are attributed to; ``logps_N.detach()`` on policy.
        advantages_B: one advantage a row.
        row_N: int64 row of each token.
        ref_logps_N: under the reference policy; needed where beta is not 0.
        correction_N: weight of each token's policy term for the mismatch of sampler and trainer; None for 1.
        sampler_logps_N: under the policy as the sampler computed it, NaN where it could not; needed by
            ``off_policy_mask_threshold``.
        kept_N: bool, tokens whose policy term counts (``top_entropy_quantile``); None for all.
    """

    logps_N: torch.Tensor
    old_logps_N: torch.Tensor
    advantages_B: torch.Tensor
    row_N: torch.Tensor
    ref_logps_N: torch.Tensor | None = None
    correction_N: torch.Tensor | None = None
    sampler_logps_N: torch.Tensor | None = None
    kept_N: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return self.advantages_B.shape[0]

    @property
    def advantages_N(self) -> torch.Tensor:
        return self.advantages_B.to(self.logps_N.dtype)[self.row_N]


@dataclass(frozen=True)
class Window:
    """What one optimizer step spans.

    Attributes:
        rows: its rows, those without a scored token too.
        tokens: its scored tokens.
        kept: its tokens of high entropy, where ``top_entropy_quantile`` was applied over the whole step; None where the
            step is one micro-batch, which finds them itself.
    """

    rows: int
    tokens: int
    kept: int | None = None


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
    off_policy_mask_threshold: float | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    @property
    def highest(self) -> float:
        """``epsilon_high`` with its default."""
        return self.epsilon_low if self.epsilon_high is None else self.epsilon_high

    @property
    def upper(self) -> float:
        return 1 + self.highest

    @property
    def lower(self) -> float:
        return 1 - self.epsilon_low
