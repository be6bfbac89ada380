"""``rollout_precision="exact"``: the sampler's log-probabilities and the trainer's are equal, or training stops."""

from __future__ import annotations

import torch

from ..config.errors import ConfigError
from .batch import PackedRollouts
from .config import GRPOConfig


def check_device(args: GRPOConfig, device: torch.device) -> None:
    """Refuse what is known not to be exact before anything is loaded or sampled.

    Raises:
        ConfigError: the model is on the CPU.
    """
    if args.rollout_precision == "exact" and device.type != "cuda":
        raise ConfigError(
            f"GRPOConfig: rollout_precision='exact' with a model on {device.type}: only a GPU's 16-bit kernels sum in "
            "one order for sampler and trainer; in float32 on the CPU their log-probs agree to about 1e-5. Use "
            "rollout_precision='auto'"
        )


def require_equal(trainer_N: torch.Tensor, batch: PackedRollouts) -> None:
    """Every scored token of ``batch`` has one log-probability, whoever computed it, bit for bit.

    Tokens of rollouts that an earlier policy sampled (sampled ahead, or replayed) are left out.

    Args:
        trainer_N: what the trainer's forward gives under the policy that sampled.
        batch: what was sampled.

    Raises:
        ArithmeticError: one differs (a NaN always does); it names the first, how many there are, and the remedy.
    """
    sampler_N = batch.sampler_logps_N
    unequal_N = trainer_N != sampler_N
    if batch.stale_N is not None:
        unequal_N &= ~batch.stale_N
    count = int(unequal_N.sum())
    if not count:
        return
    at = int(unequal_N.nonzero()[0])
    row = int(batch.row_N[at])
    place = at - int((batch.row_N == row).nonzero()[0])
    gap = float((trainer_N - sampler_N).abs().nan_to_num(torch.inf).max())
    raise ArithmeticError(
        f"rollout_precision='exact' is broken: of {trainer_N.numel()} tokens in {batch.rows} completions, {count} have "
        f"other log-probs in the trainer than in the sampler; the first is token {place} of completion {row} (id "
        f"{int(batch.targets_N[at])}): {float(trainer_N[at])!r} against {float(sampler_N[at])!r}, at most {gap:.3g} "
        "apart. Something computes in another order than was checked before training: please report it with the model "
        "and the GPU; rollout_precision='auto' corrects for the difference instead"
    )
