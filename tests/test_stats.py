"""pass@k and maj@k against every choice of k of n completions, counted one by one. Wilson's: tests/report."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.stats import majority_at_k, pass_at_k, wilson_interval


def by_counting(answers: list[str | None], k: int) -> tuple[float, float]:
    """(pass@k, maj@k) over all choices of k; answers that begin with "r" are right."""
    passed = won = 0.0
    choices = list(itertools.combinations(answers, k))
    for choice in choices:
        said = Counter(a for a in choice if a is not None)
        passed += any(a.startswith("r") for a in said)
        if said:
            best = [a for a, c in said.items() if c == max(said.values())]
            won += sum(a.startswith("r") for a in best) / len(best)
    return passed / len(choices), won / len(choices)


@given(st.lists(st.sampled_from(["r1", "r2", "w1", "w2", "w3", None]), min_size=1, max_size=8), st.data())
def test_against_every_choice(answers: list[str | None], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(answers)))
    said = Counter(a for a in answers if a is not None)
    votes = {
        right: [c for a, c in said.items() if a.startswith("r") == right]  # what was said, right and wrong
        for right in (True, False)
    }
    wanted_pass, wanted_majority = by_counting(answers, k)
    right = sum(votes[True])
    assert pass_at_k(len(answers), right, k) == pytest.approx(wanted_pass, abs=1e-12)
    assert majority_at_k(votes, answers.count(None), k) == pytest.approx(wanted_majority, abs=1e-12)


def test_many_completions_are_no_matter_and_one_vote_is_the_share() -> None:
    assert pass_at_k(1000, 10, 100) == pytest.approx(1 - (0.9**10), abs=5e-3)
    votes = {True: [40], False: [30, 20, 10]}
    assert majority_at_k(votes, 0, 1) == pytest.approx(0.4)
    assert majority_at_k(votes, 0, 100) == 1.0  # the right answer leads when all vote
    assert 0.4 < majority_at_k(votes, 0, 15) < 1.0
    assert majority_at_k({True: [], False: [3]}, 2, 4) == 0.0


@pytest.mark.parametrize("n, right, k", [(4, 5, 1), (4, 2, 5), (4, 2, 0), (4, -1, 2)])
def test_counts_out_of_range(n: int, right: int, k: int) -> None:
    with pytest.raises(ValueError):
        pass_at_k(n, right, k)


def test_majority_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError):
        majority_at_k({True: [2]}, 1, 4)


def test_a_fraction_of_a_success_lies_between_its_neighbours() -> None:
    low, middle, high = (wilson_interval(x, 20) for x in (7, 7.5, 8))
    assert low[0] < middle[0] < high[0] and low[1] < middle[1] < high[1]
