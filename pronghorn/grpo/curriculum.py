"""A difficulty curriculum: prompts are drawn by how often the policy solves them, near half of the time most often.

A group teaches by the spread of its rewards, which for a solve rate p is p (1 - p): nothing at 0 and 1, most at 1/2.
Foster et al. (2025, arXiv:2502.12272) call it learnability and sample by it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from ..config.errors import ConfigError
from .seeds import request_seed

DECAY = 0.5
"""Weight of what was measured before, each time a prompt is measured anew: the policy that was measured is gone."""


class Curriculum:
    """Solve rates of a data set's rows, and rows drawn by them: by learnability p (1 - p) (Foster et al. 2025,
    arXiv:2502.12272).

    A row's rate is estimated as ``(solved + 1) / (seen + 2)`` over decayed counts, so a row never seen stands at 1/2
    and is tried early. Draw number d of a run is a function of (seed, d, rates), nothing else.

    Args:
        rows: length of the data set.
        seed: of the draws.
        floor: share of the draws without preference, in (0, 1].
    """

    def __init__(self, rows: int, seed: int = 0, floor: float = 0.1) -> None:
        self.rows, self.seed, self.floor = rows, seed, floor
        self.draws = 0
        self.solved_R = torch.zeros(rows, dtype=torch.float64)
        self.seen_R = torch.zeros(rows, dtype=torch.float64)

    @property
    def rates_R(self) -> torch.Tensor:
        return (self.solved_R + 1) / (self.seen_R + 2)

    @property
    def weights_R(self) -> torch.Tensor:
        """Relative probability of each row in a draw: ``(1 - floor) 4 p (1 - p) + floor``."""
        rates_R = self.rates_R
        return (1 - self.floor) * 4 * rates_R * (1 - rates_R) + self.floor

    def take(self, count: int, exclude: Collection[int] = ()) -> list[int]:
        """``count`` different rows, none of ``exclude``, by weight without replacement.

        The rows with the largest ``log w + Gumbel noise`` are such a draw (Kool et al. 2019, arXiv:1903.06059). Where
        too few rows are left, ``exclude`` is forgotten; rows come more than once only where the data set is too small.
        """
        generator = torch.Generator().manual_seed(request_seed(self.seed, self.draws))
        self.draws += 1
        noise_R = torch.rand(self.rows, generator=generator, dtype=torch.float64).clamp(min=1e-300)
        keys_R = self.weights_R.log() - torch.log(-torch.log(noise_R))
        order = torch.argsort(keys_R, descending=True, stable=True).tolist()
        if len(order) - len(set(exclude)) >= count:
            order = [row for row in order if row not in exclude]
        return [order[i % len(order)] for i in range(count)]

    def record(self, rows: Sequence[int], solved: Sequence[int], completions: int) -> None:
        """One group measured of each row: ``solved`` of its ``completions`` counted as solved."""
        for row, n in zip(rows, solved):
            self.solved_R[row] = self.solved_R[row] * DECAY + n
            self.seen_R[row] = self.seen_R[row] * DECAY + completions

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self.draws, "solved_R": self.solved_R.clone(), "seen_R": self.seen_R.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ``ConfigError`` for the state of a data set of another length."""
        if len(state["solved_R"]) != self.rows:
            raise ConfigError(
                f"the checkpoint's curriculum measured {len(state['solved_R'])} rows, train_dataset has {self.rows}; "
                "resume with the data set of that run"
            )
        self.draws = state["draws"]
        self.solved_R, self.seen_R = state["solved_R"].clone(), state["seen_R"].clone()
