"""Which groups have spread, what counts as solved, how many prompts a refill draws."""

from __future__ import annotations

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.grpo.spread import Outcome, refill_size

NAN = float("nan")
REWARDS = torch.tensor(
    [[0.0, 1.0], [0.0, 2.0], [1.0, -1.0], [0.0, 0.0], [NAN, 3.0], [NAN, 3.0], [1.0, NAN], [NAN, 5.0]]
)
WEIGHTS = torch.tensor([1.0, 1.0])


def test_spread_is_of_the_named_reward_or_the_weighted_sum() -> None:
    names = ["right", "style"]
    assert Outcome(None, names, WEIGHTS).spread(REWARDS, 2) == [True, False, False, True]
    assert Outcome("right", names, WEIGHTS).spread(REWARDS, 2) == [False, True, False, False]
    assert Outcome("style", names, WEIGHTS).spread(REWARDS, 2) == [True, True, False, False]
    assert Outcome(None, names, torch.tensor([1.0, 0.0])).spread(REWARDS, 2) == [False, True, False, True]
    assert Outcome("right", names, WEIGHTS).solved(REWARDS, 2, at=1.0) == [0, 1, 0, 1]
    with pytest.raises(ConfigError, match="outcome_reward='rihgt' names no reward function; did you mean 'right'"):
        Outcome("rihgt", names, WEIGHTS)


def test_a_refill_draws_what_may_be_expected_to_suffice() -> None:
    assert refill_size(missing=4, kept=4, drawn=8, most=8) == 8
    assert refill_size(missing=1, kept=7, drawn=8, most=8) == 2
    assert refill_size(missing=3, kept=1, drawn=9, most=8) == 8
    assert refill_size(missing=2, kept=0, drawn=2, most=2) == 2
