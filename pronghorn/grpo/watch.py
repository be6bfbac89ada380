"""Signs that a run does not learn what it should, read from its own logs; each is said once, with the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..config.watch import WatchConfig

_WINDOWED = ("frac_reward_zero_std", "entropy", "completions/clipped_ratio", "sampling/sampling_logp_difference/mean")


class Watch:
    """Takes logs in order and gives warnings.

    Args:
        config: thresholds.
    """

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self.said: set[str] = set()
        self._values: dict[str, list[float]] = {name: [] for name in (*_WINDOWED, "reward")}
        self._best: tuple[float, float, int] | None = None  # accuracy, its standard error, rewards seen before it

    def see(self, logs: Mapping[str, Any]) -> list[str]:
        """One log more; the warnings that it gives rise to.

        Args:
            logs: metrics under TRL's names, and ``eval_accuracy`` with its interval where it was measured.
        """
        for name, values in self._values.items():
            value = logs.get(name)
            if isinstance(value, int | float) and math.isfinite(value):
                values.append(float(value))
        found = (
            ("accuracy", self._accuracy(logs)),
            ("spread", self._spread()),
            ("entropy", self._entropy()),
            ("length", self._length()),
            ("drift", self._drift()),
        )
        fresh = [(kind, line) for kind, line in found if line is not None and kind not in self.said]
        self.said.update(kind for kind, _ in fresh)
        return [line for _, line in fresh]

    def _recent(self, name: str) -> float | None:
        """Mean of the last window; None before there is a whole one."""
        values, window = self._values[name], self.config.window
        return sum(values[-window:]) / window if len(values) >= window else None

    def _accuracy(self, logs: Mapping[str, Any]) -> str | None:
        """Held-out accuracy under its best so far by more than chance, while the reward rose since."""
        if not all(isinstance(logs.get(f"eval_accuracy{end}"), int | float) for end in ("", "_low", "_high")):
            return None
        now = float(logs["eval_accuracy"])
        error = (float(logs["eval_accuracy_high"]) - float(logs["eval_accuracy_low"])) / (2 * 1.96)
        rewards = self._values["reward"]
        if self._best is None or now >= self._best[0]:
            self._best = (now, error, len(rewards))
            return None
        best, best_error, place = self._best
        if (best - now) < self.config.accuracy_drop * math.hypot(error, best_error):
            return None
        rise = _rise(rewards[max(0, place - self.config.window) :], self.config.window)
        if rise is None or rise[2] < self.config.reward_rise:
            return None
        return (
            f"held-out accuracy fell from {best:.1%} to {now:.1%} while the reward rose from {rise[0]:.2f} to "
            f"{rise[1]:.2f}: the reward is earned without being right; give correctness more weight (reward_weights), "
            "mend the reward that rose (see rewards/*), or lower the learning rate or raise beta"
        )

    def _spread(self) -> str | None:
        share = self._recent("frac_reward_zero_std")
        if share is None or share < self.config.no_spread:
            return None
        return (
            f"{share:.0%} of the groups have no spread (all completions of a prompt earn the same), so they teach "
            "nothing; give prompts that are neither always nor never solved, raise num_generations or temperature, "
            "or add a finer reward"
        )

    def _entropy(self) -> str | None:
        values, now, window = self._values["entropy"], self._recent("entropy"), self.config.window
        if now is None or len(values) < 2 * window:
            return None
        first = sum(values[:window]) / window
        if now > self.config.entropy_share * first:
            return None
        return (
            f"the policy's entropy collapsed from {first:.3g} to {now:.3g} nats a token, so samples hardly differ and "
            "exploration ends; lower the learning rate, raise temperature or epsilon_high, add beta, or stop here"
        )

    def _length(self) -> str | None:
        share = self._recent("completions/clipped_ratio")
        if share is None or share < self.config.clipped:
            return None
        return (
            f"{share:.0%} of the completions hit max_completion_length, so their endings are never scored; raise "
            "max_completion_length, ask for shorter answers, or set mask_truncated_completions=True"
        )

    def _drift(self) -> str | None:
        gap = self._recent("sampling/sampling_logp_difference/mean")
        if gap is None or gap < self.config.drift:
            return None
        return (
            f"sampler and trainer differ by {gap:.3g} nats a token, so the samples are not the policy's own; keep "
            "vllm_importance_sampling_correction on, lower the staleness (steps_per_generation, num_iterations), or "
            "train in a wider dtype"
        )


def _rise(values: list[float], window: int) -> tuple[float, float, float] | None:
    """(mean of the first part, mean of the last part, their difference in standard errors); None for under 6 values.

    The parts are a window long, or half of what there is.
    """
    size = min(window, len(values) // 2)
    if size < 3:
        return None
    first, last = values[:size], values[-size:]
    means = [sum(part) / size for part in (first, last)]
    spread = [sum((v - m) ** 2 for v in part) / (size - 1) for part, m in zip((first, last), means)]
    error = math.sqrt(sum(spread) / size)
    return means[0], means[1], (means[1] - means[0]) / error if error else math.copysign(math.inf, means[1] - means[0])
