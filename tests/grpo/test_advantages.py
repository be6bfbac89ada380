"""Advantages by hand, and the cases that break naive ones. (Equality with TRL: test_trl_loss.py.)"""

from __future__ import annotations

import math

import pytest
import torch

from pronghorn.grpo.advantages import EPSILON, group_advantages, nanstd, weighted_sum

NAN = math.nan
ONE = torch.ones(1)


def test_group_scaling_by_hand() -> None:
    rewards = torch.tensor([[1.0], [3.0], [5.0], [5.0]])
    result = group_advantages(rewards, ONE, group_size=2)
    std = math.sqrt(2)
    torch.testing.assert_close(result.advantages_B, torch.tensor([-1, 1, 0, 0]) / torch.tensor([std + EPSILON] * 4))
    assert result.flat_B.tolist() == [False, False, True, True]
    assert result.rewards_B.tolist() == [1, 3, 5, 5]


@pytest.mark.parametrize(
    "scale, divisor", [("none", 1.0), ("batch", torch.tensor([1.0, 3, 5, 5]).std().item() + EPSILON)]
)
def test_other_scalings(scale: str, divisor: float) -> None:
    rewards = torch.tensor([[1.0], [3.0], [5.0], [5.0]])
    result = group_advantages(rewards, ONE, group_size=2, scale=scale)
    torch.testing.assert_close(result.advantages_B, torch.tensor([-1.0, 1, 0, 0]) / divisor)
    assert result.flat_B.tolist() == ([False, False, True, True] if scale == "none" else [False] * 4)


def test_weights_and_abstentions() -> None:
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN], [2.0, 4.0]])
    assert weighted_sum(rewards, torch.tensor([1.0, 0.5])).tolist()[::2] == [1.0, 4.0]
    result = group_advantages(rewards, torch.tensor([1.0, 0.5]), group_size=3)
    assert math.isnan(result.rewards_B[1]) and result.advantages_B[1] == 0
    assert result.advantages_B[0] == -result.advantages_B[2] != 0  # the mean is of the two that were scored


def test_one_generation_and_one_completion_have_no_spread() -> None:
    assert group_advantages(torch.tensor([[2.0], [5.0]]), ONE, group_size=1).advantages_B.tolist() == [0, 0]
    assert group_advantages(torch.tensor([[2.0]]), ONE, group_size=1, scale="batch").flat_B.tolist() == [True]


def test_nanstd_is_the_sample_standard_deviation() -> None:
    values = torch.tensor([1.0, NAN, 4.0, 6.0])
    torch.testing.assert_close(nanstd(values, dim=0)[0], values[[0, 2, 3]].std())
    assert nanstd(torch.tensor([1.0, NAN]), dim=0).isnan()
