"""The fields of ``GRPOConfig`` that say how the rollout engine runs: how equal to the trainer, in how much memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..config.errors import ConfigError

PRECISIONS = ("auto", "exact")

# What the native engine alone acts on.
_NATIVE = ("rollout_precision", "rollout_oom_retry", "rollout_overlap", "rollout_keep_share")


@dataclass
class RolloutFields:
    """Settings beyond TRL's; ``docs/rollout.md`` says what each promises and costs.

    Attributes:
        rollout_precision: ``"auto"``: sampler and trainer sum in one order wherever the kernels for it run, and what
            differs is measured and corrected. ``"exact"``: their log-probs are equal bit for bit, or the run stops:
            checked for every shape of product before training, and for every token in every loss.
        rollout_oom_retry: where a rollout runs out of GPU memory, run it again with half as many completions at once,
            and say so. By default it raises.
        rollout_keep_share: share of the GPU's memory up to which the native engine keeps KV cache, graphs and weights
            in 16 bits while the policy trains; more is given back after each generation and taken again for the next.
    """

    rollout_precision: str = field(
        default="auto", metadata={"help": "auto, or exact: sampler and trainer log-probs equal bit for bit, or stop."}
    )
    rollout_oom_retry: bool = field(
        default=False, metadata={"help": "Run a rollout that ran out of memory again with half the rows at once."}
    )
    rollout_keep_share: float = field(
        default=0.1, metadata={"help": "Share of GPU memory that the rollout engine may keep while the policy trains."}
    )


def check_rollouts(args: Any) -> None:
    """Refuse values out of range, and what the chosen engine would not act on.

    Raises:
        ConfigError: naming field, value and remedy.
    """
    if args.rollout_precision not in PRECISIONS:
        raise ConfigError(
            f"GRPOConfig: rollout_precision={args.rollout_precision!r} is unknown; give 'auto' or 'exact'"
        )
    if not 0.0 <= args.rollout_keep_share <= 1.0:
        raise ConfigError(
            f"GRPOConfig: rollout_keep_share={args.rollout_keep_share} is no share of memory; give a number from 0 to 1"
        )
    if args.rollout_overlap and args.rollout_oom_retry:
        raise ConfigError(
            "GRPOConfig: rollout_oom_retry=True with rollout_overlap=True: graphs of another size cannot be made while "
            "the policy trains; leave rollout_oom_retry out and lower gpu_memory_utilization, or leave out "
            "rollout_overlap"
        )
    if args.rollout_engine == "native":
        return
    for name in _NATIVE:
        off = getattr(type(args), name)  # a dataclass keeps a field's default as an attribute of the class
        if getattr(args, name) != off:
            raise ConfigError(
                f"GRPOConfig: {name}={getattr(args, name)!r} with rollout_engine={args.rollout_engine!r}, which does "
                f"not act on it; use rollout_engine='native', or {name}={off!r}"
            )
