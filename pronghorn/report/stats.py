"""Intervals for a share, and the split of a gain in accuracy into format and arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z95 = 1.959963984540054  # the 97.5% quantile of the standard normal distribution


def wilson_interval(successes: int, n: int, z: float = _Z95) -> tuple[float, float]:
    """The Wilson score interval of a binomial share (Wilson 1927, JASA 22:209; eq. 4 of Brown et al. 2001).

    Args:
        successes: from 0 to ``n``.
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


@dataclass(frozen=True)
class Gain:
    """A change in accuracy, split; shares in [0, 1], ``format + arithmetic == total`` up to rounding.

    Attributes:
        total: accuracy after minus accuracy before; accuracy counts the right number inside the answer tags.
        format: the part from putting right numbers into the tags more often.
        arithmetic: the part from getting more numbers right.
    """

    total: float
    format: float
    arithmetic: float


def decompose_gain(
    in_tags_before: Sequence[bool],
    number_before: Sequence[bool],
    in_tags_after: Sequence[bool],
    number_after: Sequence[bool],
) -> Gain:
    """Split the change in accuracy between two gradings of the same P problems.

    ``in_tags[i]`` says that the right number stands in the answer tags, ``number[i]`` that the response gives the
    right number in whatever format. What is right in the tags counts as a right number, even where a looser grader
    did not find it. The split is that of :func:`decompose_rates`.

    Raises:
        ValueError: no problems, or sequences of different length.
    """
    lengths = {len(in_tags_before), len(number_before), len(in_tags_after), len(number_after)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"gradings of {sorted(lengths)} problems: give four of the same length, 1 or more")
    count = len(number_before)
    right_before = sum(a or b for a, b in zip(in_tags_before, number_before, strict=True)) / count
    right_after = sum(a or b for a, b in zip(in_tags_after, number_after, strict=True)) / count
    return decompose_rates(sum(in_tags_before) / count, right_before, sum(in_tags_after) / count, right_after)


def decompose_rates(accuracy_before: float, number_before: float, accuracy_after: float, number_after: float) -> Gain:
    """Split ``accuracy_after - accuracy_before`` into a format and an arithmetic part.

    Accuracy is a product: A = N F, with N = P(number right) and F = P(in the tags | number right). Each factor's part
    is its change times the mean of the other (the Shapley value of a product of two; Shorrocks 2013), so that neither
    comes first and the two add up exactly::

        arithmetic = (N1 - N0) (F0 + F1) / 2        format = (F1 - F0) (N0 + N1) / 2

    Where no number was right, F is unknown; it is then taken to be the other side's, and all of the change is
    arithmetic.

    Raises:
        ValueError: a share outside [0, 1], or an accuracy above its share of right numbers.
    """
    for accuracy, number in ((accuracy_before, number_before), (accuracy_after, number_after)):
        if not 0 <= accuracy <= number <= 1:
            raise ValueError(f"accuracy={accuracy}, number={number}: give 0 <= accuracy <= number <= 1")
    total = accuracy_after - accuracy_before
    if number_before == 0 or number_after == 0:
        return Gain(total, 0.0, total)
    tagged_before, tagged_after = accuracy_before / number_before, accuracy_after / number_after
    arithmetic = (number_after - number_before) * (tagged_before + tagged_after) / 2
    formatted = (tagged_after - tagged_before) * (number_before + number_after) / 2
    return Gain(total, formatted, arithmetic)
