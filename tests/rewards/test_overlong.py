"""Soft overlong punishment against TRL's, and by hand."""

from __future__ import annotations

import pickle

import pytest
from trl.rewards import get_soft_overlong_punishment as trls

from pronghorn.config.errors import ConfigError
from pronghorn.rewards import get_soft_overlong_punishment
from pronghorn.rewards.runner import RewardRunner


@pytest.mark.parametrize("longest, cache", [(100, 20), (10, 10), (10, 0), (7, 3)])
def test_equals_trls(longest: int, cache: int) -> None:
    ids = [[1] * n for n in range(longest + 3)]
    ours, theirs = get_soft_overlong_punishment(longest, cache), trls(longest, cache)
    assert ours(completion_ids=ids, prompts=[], completions=[]) == theirs(completion_ids=ids)


def test_by_hand_and_as_a_reward_function() -> None:
    reward = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    assert reward([[1] * 80, [1] * 90, [1] * 100, [1] * 101]) == [0.0, -0.5, -1.0, -1.0]
    assert pickle.loads(pickle.dumps(reward))([[1] * 90]) == [-0.5]
    runner = RewardRunner(reward)
    assert runner.names == ["soft_overlong_punishment_reward"]
    assert runner.score(["a"], ["b"], [[1] * 95], {}).tolist() == [[-0.75]]


@pytest.mark.parametrize("longest, cache, named", [(0, 0, "max_completion_len=0"), (9, -1, "cache=-1"), (9, 10, "=10")])
def test_nonsense_raises(longest: int, cache: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        get_soft_overlong_punishment(longest, cache)
