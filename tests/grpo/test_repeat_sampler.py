"""The order of prompts is TRL's, and any epoch can be entered directly."""

from __future__ import annotations

import pytest
from trl.trainer.utils import RepeatSampler as TRLRepeatSampler

from pronghorn.grpo.repeat_sampler import RepeatSampler


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("rows, group, prompts, repeats", [(7, 2, 3, 2), (6, 3, 2, 1), (5, 1, 5, 4), (9, 4, 1, 3)])
def test_order_is_trls_in_every_epoch(rows: int, group: int, prompts: int, repeats: int, shuffle: bool) -> None:
    theirs = TRLRepeatSampler(range(rows), group, prompts, repeats, shuffle, seed=11)
    for epoch in range(3):
        ours = RepeatSampler(rows, group, prompts, repeats, shuffle, seed=11, epoch=lambda e=epoch: e)
        order = list(theirs)
        assert list(ours) == order
        assert len(ours) == len(theirs) == len(order)
