"""The split of a gain in accuracy into format and arithmetic, beside the interval of a share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..stats import wilson_interval as wilson_interval


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
