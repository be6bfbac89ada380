"""Soft overlong punishment: a reward that lowers completions near their length limit instead of cutting them off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config.errors import ConfigError


class SoftOverlongPunishment:
    """A reward function of completion lengths |y| in tokens (DAPO, Yu et al. 2025, arXiv:2503.14476, eq. 13).

    0 up to ``longest - cache``, then falling in a straight line to -1 at ``longest``, and -1 beyond. A class and not a
    closure, so that it can be sent to another process.
    """

    __name__ = "soft_overlong_punishment_reward"  # the name under which TRL logs its own

    def __init__(self, longest: int, cache: int) -> None:
        self.longest, self.cache = longest, cache

    def __call__(self, completion_ids: Sequence[Sequence[int]], **_: Any) -> list[float]:
        return [self.of(len(ids)) for ids in completion_ids]

    def of(self, length: int) -> float:
        """The reward of a completion of ``length`` tokens."""
        over = length - (self.longest - self.cache)
        if over <= 0:
            return 0.0
        return -1.0 if length > self.longest else -over / self.cache


def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int) -> SoftOverlongPunishment:
    """A reward function for ``reward_funcs``, with the name, arguments and values of TRL's.

    Args:
        max_completion_len: longest completion in tokens, normally ``max_completion_length``.
        soft_punish_cache: tokens before it over which the reward falls to -1; 0 punishes longer ones alone.

    Raises:
        ConfigError: a length below 1, or a cache that is negative or longer than the completion.
    """
    if max_completion_len < 1:
        raise ConfigError(f"max_completion_len={max_completion_len} is out of range; give 1 or more")
    if not 0 <= soft_punish_cache <= max_completion_len:
        raise ConfigError(
            f"soft_punish_cache={soft_punish_cache} is out of range; give 0 to max_completion_len={max_completion_len}"
        )
    return SoftOverlongPunishment(max_completion_len, soft_punish_cache)
