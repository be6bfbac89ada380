"""From rewards to advantages: each completion against the others of its prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""


@dataclass(frozen=True)
class Advantages:
    """B completions, in groups of G for the same prompt.

    Attributes:
        advantages_B: 0 where no reward function scored the completion.
        rewards_B: weighted sums of the rewards; NaN where no function scored the completion.
        flat_B: bool, whether the spread that scales the completion's reward is 0 (nothing to learn from it).
    """

    advantages_B: torch.Tensor
    rewards_B: torch.Tensor
    flat_B: torch.Tensor


def weighted_sum(rewards_BF: torch.Tensor, weights_F: torch.Tensor) -> torch.Tensor:
    """``[B]`` weighted sums; a NaN (a function that abstained) adds nothing, a row of only NaN stays NaN."""
    total_B = (rewards_BF * weights_F).nansum(dim=1)
    return total_B.masked_fill(torch.isnan(rewards_BF).all(dim=1), torch.nan)


def nanstd(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sample standard deviation (n - 1) over ``dim`` without the NaNs, keeping ``dim``; NaN for under two values."""
    count = (~torch.isnan(values)).sum(dim=dim, keepdim=True)
    square = (values - values.nanmean(dim=dim, keepdim=True)).square().nansum(dim=dim, keepdim=True)
    return torch.sqrt(square / (count - 1)).masked_fill(count < 2, torch.nan)


def group_advantages(
    rewards_BF: torch.Tensor,
    weights_F: torch.Tensor,
    group_size: int,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
) -> Advantages:
    """Centre each group's rewards and scale them (GRPO, DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    Args:
        rewards_BF: B rewards of F functions, NaN where a function abstained; B is a multiple of ``group_size``.
        weights_F: weight of each function.
        scale: a member of :data:`SCALES`; see :func:`scaled`.
        aggregation: ``"sum_then_normalize"`` weighs and sums the functions' rewards, then centres and scales;
            ``"normalize_then_sum"`` is :func:`decoupled`, which scales in its own way.
    """
    rewards_B = weighted_sum(rewards_BF, weights_F)
    if aggregation == "normalize_then_sum":
        advantages_B, std_B = decoupled(rewards_BF, weights_F, group_size)
    else:
        advantages_B, std_B = scaled(rewards_B, group_size, scale)
    flat_B = torch.isclose(std_B, torch.zeros_like(std_B))
    return Advantages(advantages_B.nan_to_num(nan=0.0), rewards_B, flat_B)


def scaled(rewards_B: torch.Tensor, group_size: int, scale: str) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B]`` rewards centred in their groups and scaled, and the spread that says whether there is a signal.

    ``"group"`` divides by the group's standard deviation, ``"batch"`` by that of all rewards (Liu et al. 2025,
    arXiv:2508.08221), ``"none"`` does not divide (Dr. GRPO, arXiv:2503.20783).
    """
    grouped_PG = rewards_B.view(-1, group_size)
    centred_PG = grouped_PG - grouped_PG.nanmean(dim=1, keepdim=True)
    if scale == "batch":
        std_PG = nanstd(rewards_B, dim=0).expand_as(grouped_PG)
    else:
        std_PG = nanstd(grouped_PG, dim=1).expand_as(grouped_PG)
    if rewards_B.numel() == 1 or (scale != "batch" and group_size == 1):
        std_PG = torch.zeros_like(grouped_PG)
    advantages_PG = centred_PG if scale == "none" else centred_PG / (std_PG + EPSILON)
    return advantages_PG.flatten(), std_PG.flatten()


def decoupled(rewards_BF: torch.Tensor, weights_F: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B]`` advantages with each function's rewards normalized by itself, and the spread over the batch.

    Each function is centred and scaled in its groups, so that functions of a large spread do not drown the others; the
    weighted sum is then centred and scaled over the whole batch (GDPO, Liu et al. 2026, arXiv:2601.05242). A function
    that abstained adds nothing; a row that none scored is left out of the batch's mean and spread.
    """
    grouped_PGF = rewards_BF.view(-1, group_size, rewards_BF.shape[1])
    mean_PGF = grouped_PGF.nanmean(dim=1, keepdim=True)
    std_PGF = nanstd(grouped_PGF, dim=1) if group_size > 1 else torch.zeros_like(mean_PGF)
    normalized_BF = ((grouped_PGF - mean_PGF) / (std_PGF + EPSILON)).view_as(rewards_BF)
    total_B = (normalized_BF * weights_F).nansum(dim=1)
    total_B = total_B.masked_fill(torch.isnan(rewards_BF).all(dim=1), torch.nan)
    std_B = nanstd(total_B, dim=0).expand_as(total_B) if total_B.numel() > 1 else torch.zeros_like(total_B)
    return (total_B - total_B.nanmean()) / (std_B + EPSILON), std_B
