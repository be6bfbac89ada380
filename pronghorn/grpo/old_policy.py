"""Which log-probabilities stand for the policy that drew a token, in the importance ratio of the loss.

A rollout of this generation was drawn by the policy before this generation's updates, and the trainer's own
log-probabilities of then are the old ones. A rollout of an earlier generation (replayed, or sampled ahead) was drawn by
a policy that is gone: what the sampler recorded as it drew is then the only true record, and the ratio of PPO
(arXiv:1707.06347) is taken against it.
"""

from __future__ import annotations

import torch

from .batch import PackedRollouts


def old_policy(batch: PackedRollouts, logps_N: torch.Tensor, on_policy: bool) -> torch.Tensor:
    """``[N]`` log-probabilities under the old policy of PPO's ratio (arXiv:1707.06347), without gradient.

    Args:
        logps_N: under the policy being trained.
        on_policy: this generation is used up within one optimizer step, so its old policy is the trained one.

    A stale token that the sampler could not score (NaN) gets a ratio of 1.
    """
    old_N = logps_N.detach()
    if batch.old_logps_N is not None and not on_policy:
        old_N = batch.old_logps_N
    if batch.stale_N is None:
        return old_N
    recorded_N = torch.where(torch.isnan(batch.sampler_logps_N), logps_N.detach(), batch.sampler_logps_N)
    return torch.where(batch.stale_N, recorded_N, old_N)


def comparable(batch: PackedRollouts, trainer_logps_N: torch.Tensor) -> torch.Tensor:
    """``trainer_logps_N`` with NaN for stale tokens: a policy that has moved says nothing of how the engine errs.

    Their importance ratio is already against the sampler's record, so the correction leaves them at weight 1.
    """
    return trainer_logps_N if batch.stale_N is None else trainer_logps_N.masked_fill(batch.stale_N, torch.nan)
