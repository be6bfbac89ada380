"""Prompts by solve rate: the weights as written, draws that follow them, exact state."""

from __future__ import annotations

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.grpo.curriculum import Curriculum


def measured() -> Curriculum:
    curriculum = Curriculum(4, seed=3, floor=0.2)
    curriculum.record([0, 1, 2], [0, 4, 8], 8)
    return curriculum


def test_weights_are_the_variance_of_the_solve_rate() -> None:
    curriculum = measured()
    rates = torch.tensor([1 / 10, 5 / 10, 9 / 10, 1 / 2], dtype=torch.float64)
    torch.testing.assert_close(curriculum.rates_R, rates)
    torch.testing.assert_close(curriculum.weights_R, 0.2 + 0.8 * 4 * rates * (1 - rates))
    curriculum.record([1], [8], 8)  # half of what was known before stays: 4 / 2 + 8 of 8 / 2 + 8
    assert curriculum.rates_R[1] == pytest.approx(11 / 14)


def test_draws_follow_the_weights() -> None:
    """4,000 draws of one row: each row's share within five standard errors of its weight."""
    curriculum, draws = measured(), 4000
    counts = torch.zeros(4)
    for _ in range(draws):
        counts[curriculum.take(1)[0]] += 1
    share = (curriculum.weights_R / curriculum.weights_R.sum()).float()
    error = (share * (1 - share) / draws).sqrt()
    assert ((counts / draws - share).abs() < 5 * error).all()


def test_draws_are_distinct_deterministic_and_resumable() -> None:
    first, second = measured(), measured()
    assert first.take(3) == second.take(3) and len(set(first.take(4))) == 4
    second.load_state_dict(first.state_dict())
    assert [first.take(2) for _ in range(5)] == [second.take(2) for _ in range(5)]
    assert len({tuple(measured().take(4)), *(tuple(first.take(4)) for _ in range(9))}) > 3  # not one order always
    assert set(first.take(2, exclude={0, 3})) == {1, 2}
    assert sorted(first.take(4, exclude={0})) == [0, 1, 2, 3]  # too few others: excluded ones come again
    with pytest.raises(ConfigError, match="measured 4 rows, train_dataset has 5"):
        Curriculum(5).load_state_dict(first.state_dict())
