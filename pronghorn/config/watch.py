"""When a training run is warned about: thresholds on the metrics that it logs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .errors import ConfigError, reject_unknown


@dataclass(frozen=True)
class WatchConfig:
    """Thresholds of :mod:`pronghorn.grpo.watch`; each warning comes once a run.

    Attributes:
        enabled: False says nothing.
        window: logs over which a metric is averaged before it counts, and no warning comes before so many.
        accuracy_drop: standard errors by which held-out accuracy lies under its best so far, while the reward rose
            since. The errors are those of evaluations on other problems each time; on the same problems, chance moves
            accuracy by about half of them, so ten evaluations that differ by chance alone stay under 2.5.
        reward_rise: standard errors of the window's mean by which the reward must have risen for that.
        no_spread: share of groups whose completions all earned the same (``frac_reward_zero_std``).
        entropy_share: entropy against what it was in the first window; learning a format or greedy arithmetic halves
            it, a collapse leaves next to nothing.
        clipped: share of completions cut at ``max_completion_length`` (``completions/clipped_ratio``).
        drift: mean difference of log-probability between sampler and trainer, in nats a token. Float32 agrees within
            1e-5, bfloat16 on an 8B model within 0.05.

    Raises:
        ConfigError: a value out of range.
    """

    enabled: bool = True
    window: int = 10
    accuracy_drop: float = 2.5
    reward_rise: float = 2.0
    no_spread: float = 0.8
    entropy_share: float = 0.1
    clipped: float = 0.5
    drift: float = 0.1

    def __post_init__(self) -> None:
        for name in ("no_spread", "entropy_share", "clipped"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"watch: {name}={getattr(self, name)} is out of range; give a share in (0, 1]")
        for name in ("accuracy_drop", "reward_rise", "drift"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"watch: {name}={getattr(self, name)} is out of range; give more than 0")
        if self.window < 2:
            raise ConfigError(f"watch: window={self.window} is out of range; give 2 or more")

    @classmethod
    def of(cls, given: dict[str, Any] | None) -> WatchConfig:
        """Build from a mapping of the fields that differ; an unknown one raises with the nearest known name."""
        given = given or {}
        reject_unknown("watch", given, [f.name for f in fields(cls)])
        return cls(**given)
