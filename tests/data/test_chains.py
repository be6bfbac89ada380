"""Problems of three to six steps: right, within their numbers, and split by content."""

from __future__ import annotations

import random
import re

import pytest

from pronghorn.config.errors import ConfigError
from pronghorn.data.answers import number_matches
from pronghorn.data.chains import STEPS, draw_chain
from pronghorn.data.synthetic import SPLITS, split_of


@pytest.mark.parametrize("split", SPLITS)
def test_every_written_step_is_right_and_leads_to_the_next(split: str) -> None:
    rng = random.Random(f"test-{split}")
    seen = set()
    for _ in range(200):
        problem = draw_chain(split, rng)
        steps = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)\.", problem.reasoning)
        assert " ".join(f"{a} {op} {b} = {c}." for a, op, b, c in steps) == problem.reasoning
        value = problem.numbers[0]
        for (a, op, b, c), number in zip(steps, problem.numbers[1:], strict=True):
            exact = {"+": value + number, "-": value - number, "*": value * number, "/": value / number}[op]
            assert (int(a), int(b), int(c)) == (value, number, exact) and 2 <= exact <= 9999
            value = int(c)
        assert value == problem.result and problem.answer.endswith(f"\n#### {value}")
        assert number_matches(problem.answer, value)
        assert problem.template == "chain-" + "".join(op for _, op, _, _ in steps)
        told = [int(number) for number in re.findall(r"\d+", problem.question)]
        assert told == list(problem.numbers), "the question tells every number, in order, and no result"
        assert split_of(problem.key) == split
        seen.add(len(steps))
    assert seen == set(STEPS)


def test_the_same_seed_gives_the_same_problems() -> None:
    first, second = ([draw_chain("sft", rng) for _ in range(20)] for rng in (random.Random(1), random.Random(1)))
    assert first == second


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"split='held_out' is unknown: use one of .*heldout"):
        draw_chain("held_out", random.Random(0))
