"""Which groups have something to learn from: the spread of their outcome reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config.errors import ConfigError, nearest
from .advantages import nanstd, weighted_sum


class Outcome:
    """The reward that decides: of one named function, or the weighted sum of all.

    Raises:
        ConfigError: no reward function has the name.
    """

    def __init__(self, name: str | None, names: Sequence[str], weights_F: torch.Tensor) -> None:
        if name is not None and name not in names:
            close = nearest(name, names)
            hint = f"did you mean {close!r}?" if close else f"there are {', '.join(names)}"
            raise ConfigError(f"GRPOConfig: outcome_reward={name!r} names no reward function; {hint}")
        self.column = None if name is None else list(names).index(name)
        self.weights_F = weights_F

    def __call__(self, rewards_BF: torch.Tensor) -> torch.Tensor:
        """``[B]`` outcome rewards, NaN where the function abstained."""
        return weighted_sum(rewards_BF, self.weights_F) if self.column is None else rewards_BF[:, self.column]

    def spread(self, rewards_BF: torch.Tensor, group: int) -> list[bool]:
        """For each group, whether two of its completions differ in outcome (DAPO, arXiv:2503.14476, section 3.2)."""
        std_P = nanstd(self(rewards_BF).view(-1, group), dim=1).flatten()
        return (std_P.nan_to_num(nan=0.0) > 1e-8).tolist()

    def solved(self, rewards_BF: torch.Tensor, group: int, at: float) -> list[int]:
        """For each group, how many of its completions reach ``at``."""
        return (self(rewards_BF).view(-1, group) >= at).sum(dim=1).tolist()


def refill_size(missing: int, kept: int, drawn: int, most: int) -> int:
    """How many prompts to draw next, so that ``missing`` groups with spread may be expected among them, in the dynamic
    sampling of DAPO (arXiv:2503.14476, section 3.2).

    The share of groups with spread so far is taken as the chance of the next; never more than ``most`` at once, as one
    round then takes no more memory than a generation without refills.
    """
    expected = -(-missing * drawn // kept) if kept else most
    return max(1, min(most, expected))
