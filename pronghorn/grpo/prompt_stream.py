"""Prompts one after another, without end: the data set in its shuffled order, epoch after epoch."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch


class PromptStream:
    """Row numbers of a data set, each epoch a fresh permutation, the same that ``RepeatSampler`` makes for the seed.

    How many are taken may depend on what was sampled (refills), so the stream keeps its own place: ``cursor``, rows
    taken since the start of the run. What comes next is a function of cursor and seed alone.

    Args:
        rows: length of the data set.
        shuffle: permute anew in every epoch; else in order.
        seed: of the permutations.
    """

    def __init__(self, rows: int, shuffle: bool = True, seed: int = 0) -> None:
        self.rows, self.shuffle, self.seed = rows, shuffle, seed
        self.cursor = 0
        self._epoch, self._order = -1, list(range(rows))

    def take(self, count: int, exclude: Collection[int] = ()) -> list[int]:
        """The next ``count`` rows. ``exclude`` is passed over as long as an epoch has other rows."""
        taken: list[int] = []
        passed = 0
        while len(taken) < count:
            row = self._at(self.cursor)
            self.cursor += 1
            if row in exclude and passed < self.rows:
                passed += 1
                continue
            passed = 0
            taken.append(row)
        return taken

    def _at(self, cursor: int) -> int:
        epoch = cursor // self.rows
        if self.shuffle and epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(epoch + 1):
                order = torch.randperm(self.rows, generator=generator)
            self._order = order.tolist()
        self._epoch = epoch
        return self._order[cursor % self.rows]

    def state_dict(self) -> dict[str, Any]:
        return {"cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.cursor = state["cursor"]
