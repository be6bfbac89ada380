"""Shares and their intervals: Wilson's, pass@k and maj@k. Plain Python, no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping

_Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


def wilson_interval(successes: float, n: int, z: float = _Z95) -> tuple[float, float]:
    """The Wilson score interval of a binomial share (Wilson 1927, JASA 22:209; eq. 4 of Brown et al. 2001).

    Args:
        successes: from 0 to ``n``; a fraction of a success where a trial is itself a mean.
        n: trials, 1 or more.
        z: normal quantile; the default gives 95%.

    Returns:
        (low, high), shares in [0, 1].

    Raises:
        ValueError: counts out of range.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"successes={successes}, n={n}: give n of 1 or more and successes from 0 to n")
    share = successes / n
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    centre = share + z * z / (2 * n)
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def pass_at_k(n: int, right: int, k: int) -> float:
    r"""The chance that at least one of ``k`` completions is right, unbiased from ``n >= k`` of which ``right`` are.

    :math:`1 - \binom{n - c}{k} / \binom{n}{k}` (Chen et al. 2021, arXiv:2107.03374, eq. 1), in whole numbers.

    Raises:
        ValueError: counts out of range.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"n={n}, right={right}, k={k}: give 0 <= right <= n and 1 <= k <= n")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority_at_k(votes: Mapping[bool, list[int]], silent: int, k: int) -> float:
    """The chance that the most frequent answer of ``k`` completions is a right one (self-consistency; Wang et al. 2023,
    arXiv:2203.11171), exactly, over all choices of ``k`` of the completions that there are.

    Equally frequent answers share the vote: each wins with the same chance. Completions without an answer do not vote;
    where none votes, the answer is wrong.

    Args:
        votes: for right (True) and wrong (False) answers, how many completions gave each different one.
        silent: completions without an answer.
        k: completions that vote together, at most all of them.

    Raises:
        ValueError: ``k`` out of range.
    """
    right, wrong = list(votes.get(True, [])), list(votes.get(False, []))
    n = sum(right) + sum(wrong) + silent
    if not 1 <= k <= n:
        raise ValueError(f"k={k} of {n} completions: give 1 <= k <= {n}")
    every = right + wrong
    ways = 0.0
    for place, count in enumerate(right):
        others = every[:place] + every[place + 1 :]
        for top in range(1, min(count, k) + 1):
            for ties, number in _others_below(others, silent, top, k - top).items():
                ways += math.comb(count, top) * number / (ties + 1)
    return ways / math.comb(n, k)


def _others_below(counts: list[int], silent: int, top: int, size: int) -> dict[int, int]:
    """Choices of ``size`` completions in which no answer comes more than ``top`` times, by how many come exactly so."""
    # table[chosen][ties]: a polynomial for each number of completions chosen so far
    table: dict[tuple[int, int], int] = {(taken, 0): math.comb(silent, taken) for taken in range(min(silent, size) + 1)}
    for count in counts:
        grown: dict[tuple[int, int], int] = {}
        for (chosen, ties), number in table.items():
            for taken in range(min(count, top, size - chosen) + 1):
                key = (chosen + taken, ties + (taken == top))
                grown[key] = grown.get(key, 0) + number * math.comb(count, taken)
        table = grown
    return {ties: number for (chosen, ties), number in table.items() if chosen == size}
