"""Wilson's interval against published and brute-force values; the split of a gain against its definition."""

from __future__ import annotations

import math
import random

import pytest

from pronghorn.report.stats import decompose_gain, decompose_rates, wilson_interval


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_against_newcombe(successes: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_wilson_bounds_solve_the_score_equation() -> None:
    """|share - p| = z sqrt(p (1 - p) / n) at both bounds, which is how the interval is defined."""
    for successes, n in ((1, 2), (212, 500), (499, 500), (3, 7)):
        for p in wilson_interval(successes, n):
            assert abs(successes / n - p) == pytest.approx(1.959963984540054 * math.sqrt(p * (1 - p) / n), rel=1e-9)


def test_wilson_edges_and_errors() -> None:
    assert wilson_interval(0, 500)[0] == 0.0 and wilson_interval(500, 500)[1] == 1.0
    for successes, n in ((1, 0), (-1, 5), (6, 5)):
        with pytest.raises(ValueError, match=f"n={n}"):
            wilson_interval(successes, n)


def test_gain_of_pure_format_and_of_pure_arithmetic() -> None:
    formatted = decompose_rates(0.2, 0.4, 0.4, 0.4)
    assert (formatted.format, formatted.arithmetic) == pytest.approx((0.2, 0.0))
    arithmetic = decompose_rates(0.2, 0.4, 0.3, 0.6)
    assert (arithmetic.format, arithmetic.arithmetic) == pytest.approx((0.0, 0.1))
    forgotten = decompose_rates(0.2, 0.6, 0.5, 0.5)
    assert forgotten.format > forgotten.total > 0 > forgotten.arithmetic


def test_parts_add_up_and_the_split_is_symmetric() -> None:
    draw = random.Random(0)
    for _ in range(200):
        n0, n1 = draw.random(), draw.random()
        a0, a1 = n0 * draw.random(), n1 * draw.random()
        gain, back = decompose_rates(a0, n0, a1, n1), decompose_rates(a1, n1, a0, n0)
        assert gain.format + gain.arithmetic == pytest.approx(gain.total, abs=1e-12)
        assert (back.format, back.arithmetic) == pytest.approx((-gain.format, -gain.arithmetic), abs=1e-12)
        # Shapley: the mean over the two orders in which the factors can change.
        f0, f1 = a0 / n0, a1 / n1
        assert gain.format == pytest.approx(((f1 - f0) * n0 + (f1 - f0) * n1) / 2, abs=1e-12)


def test_gain_from_problems() -> None:
    in_tags_before, number_before = [True, False, False, False], [True, True, False, False]
    in_tags_after, number_after = [True, True, True, False], [True, True, False, False]  # the third: tags count
    gain = decompose_gain(in_tags_before, number_before, in_tags_after, number_after)
    assert gain == decompose_rates(0.25, 0.5, 0.75, 0.75)
    assert gain.total == pytest.approx(0.5)
    nothing = decompose_gain([False], [False], [True], [True])
    assert (nothing.format, nothing.arithmetic) == (0.0, 1.0)


def test_gain_refuses_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="same length"):
        decompose_gain([True], [True], [True, False], [True, False])
    with pytest.raises(ValueError, match="same length"):
        decompose_gain([], [], [], [])
    with pytest.raises(ValueError, match="accuracy=0.5, number=0.4"):
        decompose_rates(0.5, 0.4, 0.5, 0.5)
