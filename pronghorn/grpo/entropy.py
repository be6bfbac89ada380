"""The entropy bonus: a coefficient that is fixed, or steered towards a target entropy from step to step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .config import GRPOConfig


def mean_entropy(entropy_N: torch.Tensor, kept_N: torch.Tensor | None, count: int | torch.Tensor) -> torch.Tensor:
    """The share of the step's mean entropy that these tokens hold, 0-d, in nats: what the bonus is of (A3C, Mnih et al.
    2016, arXiv:1602.01783).

    Args:
        entropy_N: entropy of each scored token's distribution.
        kept_N: tokens that count, as for the policy term; None for all.
        count: how many count in the whole optimizer step, so that shares of micro-batches add up to one mean.
    """
    total = entropy_N.sum() if kept_N is None else (entropy_N * kept_N).sum()
    return total / (count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1))


@dataclass
class EntropyBonus:
    """The coefficient of the entropy in ``loss = policy - coefficient * mean entropy``.

    Fixed at ``coef``, or adaptive (Skywork-OR1, He et al. 2025, arXiv:2505.22312): after each optimizer
    step ``coef`` grows by ``delta`` where the step's mean entropy was at or below ``target`` and falls by it elsewhere,
    within ``[low, high]``; the next step applies it only if that entropy was at or below the target. The entropy is the
    mean over all the step's tokens that count, whatever the micro-batches, as TRL measures it; TRL's bonus itself is a
    mean over each micro-batch, Pronghorn's over the step. The first step has no entropy to go by and applies nothing.

    ``coef`` and ``last`` are the state that a checkpoint keeps.
    """

    coef: float = 0.0
    adaptive: bool = False
    target: float = 0.2
    delta: float = 0.005
    low: float = 0.0
    high: float = 1.0
    last: float = math.inf
    _total: Any = field(default=0.0, repr=False)
    _count: Any = field(default=0, repr=False)

    @classmethod
    def of(cls, args: GRPOConfig) -> EntropyBonus:
        return cls(
            args.entropy_coef,
            args.use_adaptive_entropy,
            args.entropy_target,
            args.entropy_coef_delta,
            args.entropy_coef_min,
            args.entropy_coef_max,
        )

    @property
    def on(self) -> bool:
        """Whether the loss has such a term; an adaptive one does also while its coefficient is 0."""
        return self.adaptive or self.coef != 0.0

    @property
    def applied(self) -> float:
        """The coefficient of the step that is under way."""
        return self.coef if not self.adaptive or self.last <= self.target else 0.0

    def observe(self, entropy_N: torch.Tensor, kept_N: torch.Tensor | None) -> None:
        """One more micro-batch of the step."""
        entropy_N = entropy_N.detach()
        self._total = self._total + (entropy_N.sum() if kept_N is None else (entropy_N * kept_N).sum())
        self._count = self._count + (entropy_N.numel() if kept_N is None else kept_N.sum())

    def close(self) -> None:
        """The step is over: move the coefficient of an adaptive bonus for the next one."""
        if self.adaptive:
            self.last = float(self._total) / max(float(self._count), 1.0)
            moved = self.coef + (self.delta if self.last <= self.target else -self.delta)
            self.coef = min(moved, self.high) if self.last <= self.target else max(moved, self.low)
        self._total, self._count = 0.0, 0

    def state(self) -> dict[str, float]:
        return {"coef": self.coef, "last": self.last}

    def load(self, state: dict[str, float]) -> None:
        """Go on from :meth:`state`; a step that was under way is forgotten."""
        self.coef, self.last = state.get("coef", self.coef), state.get("last", self.last)
        self._total, self._count = 0.0, 0
