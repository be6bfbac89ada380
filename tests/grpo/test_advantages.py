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


def test_normalize_then_sum_by_hand() -> None:
    """Each function is scaled in its groups, so one with rewards of hundreds counts as much as one of hundredths."""
    rewards = torch.tensor([[0.0, 300.0], [0.02, 100.0], [0.0, 500.0], [0.04, 500.0]])
    result = group_advantages(rewards, torch.tensor([1.0, 0.5]), 2, aggregation="normalize_then_sum")
    unit = math.sqrt(0.5)
    small = [0.01 / (0.02 * unit + EPSILON), 0.02 / (0.04 * unit + EPSILON)]
    large = 100 / (200 * unit + EPSILON)
    total = torch.tensor([-small[0] + large / 2, small[0] - large / 2, -small[1], small[1]])
    torch.testing.assert_close(result.advantages_B, total / (total.std() + EPSILON), rtol=1e-5, atol=1e-6)
    assert result.rewards_B.tolist() == pytest.approx([150.0, 50.02, 250.0, 250.04])
    assert not result.flat_B.any()


def test_normalize_then_sum_with_abstentions_and_no_spread() -> None:
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN], [2.0, NAN], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    result = group_advantages(rewards, torch.ones(2), 3, aggregation="normalize_then_sum")
    assert math.isnan(result.rewards_B[1]) and result.advantages_B[1] == 0
    assert result.advantages_B[0] == -result.advantages_B[2] != 0
    assert result.advantages_B[3:].tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    flat = group_advantages(torch.ones(4, 2), torch.ones(2), 2, aggregation="normalize_then_sum")
    assert flat.flat_B.all() and not flat.advantages_B.any()
    one = group_advantages(torch.tensor([[2.0]]), ONE, 1, aggregation="normalize_then_sum")
    assert one.advantages_B.tolist() == [0] and one.flat_B.tolist() == [True]
