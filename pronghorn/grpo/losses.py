"""GRPO's losses as functions of packed tokens: one policy term and one weighting of tokens for each loss type.

A loss is ``sum_N weight_N * term_N``, where the weights' denominators span the whole optimizer step (:class:`Window`).
So accumulating micro-batches gives, to rounding, the loss and gradient of the one large batch, for every loss type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .masks import off_policy_mask
from .objectives import (
    bounded,
    clipped_surrogate,
    clipped_weight,
    gamma_weighted,
    importance_ratio,
    reference_kl,
    soft_gate,
)
from .token_weights import constant_length, sequence_mean, sequence_sum, token_mean
from .tokens import LEVELS, LossSettings, Tokens, Window

__all__ = ["LEVELS", "LOSSES", "LossResult", "LossSettings", "LossType", "Tokens", "Window", "policy_loss"]


@dataclass(frozen=True)
class LossResult:
    """``loss`` with gradient; for the metrics, without it: importance ratio (after ``delta``) and KL of each token."""

    loss: torch.Tensor
    ratio_N: torch.Tensor
    kl_N: torch.Tensor | None


@dataclass(frozen=True)
class LossType:
    """A loss: the policy term of each token, and the weight with which the tokens are summed.

    ``corrects`` says that the term holds the sampler's correction already, so that it is not applied again.
    """

    objective: Callable[[Tokens, torch.Tensor, LossSettings], torch.Tensor]
    weights: Callable[[Tokens, Window, LossSettings], torch.Tensor]
    corrects: bool = False

    @property
    def clips(self) -> bool:
        """Whether ``delta``, ``epsilon`` and the ``clip_ratio`` metrics mean something."""
        return self.objective is clipped_surrogate


LOSSES: dict[str, LossType] = {
    "grpo": LossType(clipped_surrogate, sequence_mean),
    "bnpo": LossType(clipped_surrogate, token_mean),
    "dr_grpo": LossType(clipped_surrogate, constant_length),
    "dapo": LossType(clipped_surrogate, token_mean),
    "luspo": LossType(clipped_surrogate, sequence_sum),
    "cispo": LossType(clipped_weight, token_mean),
    "sapo": LossType(soft_gate, sequence_mean),
    "vespo": LossType(gamma_weighted, token_mean, corrects=True),
}


def policy_loss(tokens: Tokens, window: Window, settings: LossSettings) -> LossResult:
    """The share of the optimizer step's loss that this micro-batch holds; shares add up to the step's loss.

    Masks and the sampler's correction weigh the policy term alone: the KL term counts for every token, and the
    denominators are those of all tokens, as in TRL.
    """
    kind = LOSSES[settings.loss_type]
    ratio_N = importance_ratio(tokens, settings.importance_sampling_level)
    term_N = kind.objective(tokens, ratio_N, settings)
    if settings.off_policy_mask_threshold is not None:
        term_N = term_N * off_policy_mask(tokens, settings.off_policy_mask_threshold)[tokens.row_N]
    if tokens.kept_N is not None:
        term_N = term_N * tokens.kept_N
    if tokens.correction_N is not None and not kind.corrects:
        term_N = term_N * tokens.correction_N
    kl_N = None
    if settings.beta != 0.0:
        kl_N = reference_kl(tokens, ratio_N, settings.use_bias_correction_kl)
        term_N = term_N + settings.beta * kl_N
    loss = (term_N * kind.weights(tokens, window, settings)).sum()
    ratio_N = bounded(ratio_N, settings) if kind.clips else ratio_N
    return LossResult(loss, ratio_N.detach(), None if kl_N is None else kl_N.detach())
