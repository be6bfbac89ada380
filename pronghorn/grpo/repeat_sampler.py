"""The order in which prompts are visited, with TRL's repeats, and resumable at any epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class RepeatSampler(Sampler[int]):
    """Indices of a data set, each repeated for its group, each batch of prompts repeated for its reuses.

    For 7 rows, ``group=2, prompts=3, repeats=2`` yields, shuffled say to 4 3 0 1 2 6 5:
    ``4 4 3 3 0 0, 4 4 3 3 0 0, 1 1 2 2 6 6, 1 1 2 2 6 6``; an incomplete last batch of prompts is left out.

    Args:
        rows: length of the data set.
        group: completions of each prompt.
        prompts: prompts in one generation.
        repeats: dataloader batches that one generation serves (steps_per_generation x num_iterations).
        shuffle: permute the rows anew in every epoch; the order equals TRL's for the same seed.
        seed: seeds the permutations, and nothing else.
        epoch: tells the current epoch when iteration begins, so that a resumed run visits what the run would have
            visited, in any epoch.
    """

    def __init__(
        self,
        rows: int,
        group: int,
        prompts: int = 1,
        repeats: int = 1,
        shuffle: bool = True,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        self.rows, self.group, self.prompts, self.repeats = rows, group, prompts, repeats
        self.shuffle, self.seed, self.epoch = shuffle, seed, epoch

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.rows))
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.epoch()):
            torch.randperm(self.rows, generator=generator)
        order: list[int] = torch.randperm(self.rows, generator=generator).tolist()
        return order

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        for start in range(0, self.rows - self.prompts + 1, self.prompts):
            for _ in range(self.repeats):
                for index in order[start : start + self.prompts]:
                    yield from [index] * self.group

    def __len__(self) -> int:
        return self.rows // self.prompts * self.prompts * self.group * self.repeats
