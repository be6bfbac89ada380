"""Arithmetic word problems of one and two steps, in GSM8K's schema, split by construction.

Which split a problem belongs to is a hash of its canonical content, the template and the numbers, and of nothing else:
the same problem with another name or another fruit is in the same split, so a held-out problem is never a training
problem in disguise, whatever the seed and however many are drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.errors import ConfigError, nearest
from .templates import ITEMS, NAMES, TEMPLATES, Template

if TYPE_CHECKING:
    from datasets import Dataset

# Percent of the canonical problems. "dev" is for choices made while building (when to stop, which sizes), so that
# nothing is ever chosen on "heldout".
SPLITS: dict[str, int] = {"sft": 78, "grpo": 12, "dev": 4, "heldout": 6}

_Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Problem:
    """One word problem.

    `question` and `answer` are GSM8K's fields: `answer` is one step a line, then `#### N`. `reasoning` is the same
    steps on a single line, `result` the integer N, `template` and `numbers` the canonical content, `name` the person.
    """

    question: str
    answer: str
    reasoning: str
    result: int
    template: str
    numbers: _Numbers
    name: str

    @property
    def key(self) -> str:
        """The canonical content, which alone decides the split."""
        return f"{self.template}|{','.join(map(str, self.numbers))}"


def split_of(key: str) -> str:
    """The split of a canonical key; stable across processes, platforms and releases."""
    bucket = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") % 100
    for split, percent in SPLITS.items():
        if bucket < percent:
            return split
        bucket -= percent
    raise AssertionError("SPLITS sum to less than 100")


def _first(op: str, two_step: bool, rng: random.Random) -> tuple[int, int, int]:
    """Operands and result of a first step; two-step problems start from somewhat smaller numbers."""
    if op == "+":
        if not two_step and rng.random() < 0.2:
            a, b = rng.randint(20, 400), rng.randint(20, 400)
        else:
            a = rng.randint(2, 60 if two_step else 97)
            b = rng.randint(2, 40 if two_step else 99 - a + 1)
        return a, b, a + b
    if op == "-":
        a = rng.randint(101, 500) if not two_step and rng.random() < 0.2 else rng.randint(6, 100)
        b = rng.randint(2, a - 2)
        return a, b, a - b
    if op == "*":
        if rng.random() < (0.25 if two_step else 0.5):
            a, b = rng.randint(11, 25 if two_step else 60), rng.randint(2, 9)
            if rng.random() < 0.5:
                a, b = b, a
        else:
            a, b = rng.randint(2, 12), rng.randint(2, 12)
        return a, b, a * b
    divisor, quotient = rng.randint(2, 12), rng.randint(2, 15)
    return divisor * quotient, divisor, quotient


def _second(op: str, a: int, c: int, rng: random.Random) -> tuple[_Numbers, str, int] | None:
    """The drawn {d} (none for `t`), the written step and the result; None where no number fits."""
    if op == "t":
        return (), f"{a} + {c}", a + c
    if op == "+":
        d = rng.randint(2, 99)
        return (d,), f"{c} + {d}", c + d
    if op == "-":
        if c < 4:
            return None
        d = rng.randint(2, c - 2)
        return (d,), f"{c} - {d}", c - d
    if op == "r":
        d = c + rng.randint(2, 60)
        return (d,), f"{d} - {c}", d - c
    if op == "*":
        d = rng.randint(2, 9)
        return ((d,), f"{c} * {d}", c * d) if 2 <= c <= 40 else None
    divisors = [d for d in range(2, 13) if c % d == 0 and c // d >= 2]
    if not divisors:
        return None
    d = rng.choice(divisors)
    return (d,), f"{c} / {d}", c // d


def _draw(template: Template, rng: random.Random) -> Problem:
    """One problem of the template, of whatever split."""
    two_step = len(template.shape) == 2
    while True:
        a, b, c = _first(template.shape[0], two_step, rng)
        numbers: _Numbers = (a, b)
        steps = [f"{a} {template.shape[0]} {b} = {c}"]
        result = c
        if two_step:
            second = _second(template.shape[1], a, c, rng)
            if second is None:
                continue
            more, text, result = second
            numbers += more
            steps.append(f"{text} = {result}")
        name, other = rng.sample(NAMES, 2)
        fields = {"name": name, "other": other, "item": rng.choice(ITEMS), "a": a, "b": b, "d": numbers[-1]}
        sentences = [s.format(s1=steps[0], s2=steps[-1], **fields) for s in template.sentences]
        return Problem(
            question=template.question.format(**fields),
            answer="\n".join([*sentences, f"#### {result}"]),
            reasoning=" ".join(sentences),
            result=result,
            template=template.id,
            numbers=numbers,
            name=name,
        )


def of_split(split: str, make: Callable[[], Problem]) -> Problem:
    """The first problem that ``make`` gives of the split.

    Raises `ConfigError` for an unknown split.
    """
    if split not in SPLITS:
        hint = nearest(split, SPLITS)
        raise ConfigError(
            f"split={split!r} is unknown: use one of {', '.join(SPLITS)}" + (f" ({hint}?)" if hint else "")
        )
    while True:
        problem = make()
        if split_of(problem.key) == split:
            return problem


def draw(split: str, rng: random.Random) -> Problem:
    """One problem of the split, templates equally likely.

    Raises `ConfigError` for an unknown split.
    """
    return of_split(split, lambda: _draw(rng.choice(TEMPLATES), rng))


def stream(split: str, seed: int = 0) -> Iterator[Problem]:
    """Problems of the split without end; the same seed gives the same sequence on any machine."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        yield draw(split, rng)


def problems(split: str, count: int, seed: int = 0) -> list[Problem]:
    """`count` problems of the split, no two with the same template and numbers.

    Raises `ConfigError` when the split cannot give so many different ones.
    """
    found: dict[str, Problem] = {}
    misses = 0
    for problem in stream(split, seed):
        if len(found) >= count:
            break
        misses = 0 if problem.key not in found else misses + 1
        if misses > 2000:
            raise ConfigError(
                f"count={count} is more than split={split!r} can give: it gave {len(found)}; ask for fewer"
            )
        found.setdefault(problem.key, problem)
    return list(found.values())


def arithmetic_dataset(split: str, count: int, seed: int = 0) -> Dataset:
    """The problems as a `datasets.Dataset` with GSM8K's columns `question` and `answer`."""
    from datasets import Dataset

    drawn = problems(split, count, seed)
    return Dataset.from_dict({"question": [p.question for p in drawn], "answer": [p.answer for p in drawn]})
