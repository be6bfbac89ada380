"""Arithmetic stories of three to six steps, harder than `synthetic`'s problems and split by the same rule.

A number changes from step to step; each step is written out, so a model that gets a share p of single steps right gets
about p^k of the problems of k steps right: difficulty comes in degrees, whatever the model.
"""

from __future__ import annotations

import random

from .synthetic import Problem, of_split
from .templates import ITEMS, NAMES

STEPS = (3, 4, 5, 6)
_MOST = 9999

# How an operation is told; {b} is its number. None of them speaks of the result, which the reader is to work out.
_EVENTS: dict[str, tuple[str, ...]] = {
    "+": ("{name} buys {b} more.", "{other} gives {name} {b}.", "{name} finds {b}.", "Then {b} more arrive."),
    "-": ("{name} gives {b} to {other}.", "{name} loses {b}.", "{name} sells {b}.", "Then {b} break."),
    "*": ("Then {name} trades them for {b} times as many.", "A machine turns each of them into {b}."),
    "/": ("{name} keeps one of {b} equal parts.", "{name} shares them equally among {b} people and has one share."),
}


def _step(value: int, rng: random.Random) -> tuple[str, int, int]:
    """(operation, its number, the new value) from a value of 2 or more; the new one is between 2 and 9,999."""
    while True:
        op = rng.choice("++--*/")
        if op == "+":
            b = rng.randint(2, 10 ** rng.randint(1, 3) - 1)
            if value + b <= _MOST:
                return op, b, value + b
        elif op == "-" and value > 4:
            b = rng.randint(2, min(value - 2, 10 ** rng.randint(1, 3) - 1))
            return op, b, value - b
        elif op == "*" and value * 2 <= _MOST:
            b = rng.randint(2, min(9, _MOST // value))
            return op, b, value * b
        elif op == "/":
            divisors = [b for b in range(2, 13) if value % b == 0 and value // b >= 2]
            if divisors:
                b = rng.choice(divisors)
                return op, b, value // b


def _draw(steps: int, rng: random.Random) -> Problem:
    """One problem of so many steps, of whatever split."""
    name, other = rng.sample(NAMES, 2)
    item = rng.choice(ITEMS)
    value = rng.randint(2, 10 ** rng.randint(1, 3) - 1)
    told, written, numbers, ops = [f"{name} has {value} {item}."], [], [value], ""
    for _ in range(steps):
        op, b, after = _step(value, rng)
        told.append(rng.choice(_EVENTS[op]).format(name=name, other=other, b=b))
        written.append(f"{value} {op} {b} = {after}.")
        ops += op
        numbers.append(b)
        value = after
    told.append(f"How many {item} does {name} have now?")
    return Problem(
        question=" ".join(told),
        answer="\n".join([*written, f"#### {value}"]),
        reasoning=" ".join(written),
        result=value,
        template=f"chain-{ops}",
        numbers=tuple(numbers),
        name=name,
    )


def draw_chain(split: str, rng: random.Random) -> Problem:
    """One problem of the split, each number of steps equally likely.

    Raises `ConfigError` for an unknown split.
    """
    return of_split(split, lambda: _draw(rng.choice(STEPS), rng))
