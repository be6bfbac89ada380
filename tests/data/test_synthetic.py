"""Synthetic problems: right by an independent reading of their own text, and split so that no split leaks."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
from fractions import Fraction

import pytest

from pronghorn.config.errors import ConfigError
from pronghorn.data import synthetic
from pronghorn.data.gsm8k import extract_hash_answer
from pronghorn.data.synthetic import SPLITS, problems, split_of, stream
from pronghorn.data.templates import ITEMS, NAMES, TEMPLATES

STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")
OPS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__, "/": lambda a, b: Fraction(a, b)}


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[synthetic.Problem]]:
    return {split: list(itertools.islice(stream(split, seed=3), 1500)) for split in SPLITS}


def test_each_step_is_right_and_follows_from_the_question(drawn: dict[str, list[synthetic.Problem]]) -> None:
    """Reads the text alone: each written step holds, uses numbers given or found, and the last one is the answer."""
    for problem in itertools.chain.from_iterable(drawn.values()):
        known = {int(n) for n in re.findall(r"\d+", problem.question)}
        steps = STEP.findall(problem.reasoning)
        assert len(steps) == (1 if problem.template.startswith("one") else 2)
        for a, op, b, c in steps:
            assert OPS[op](int(a), int(b)) == int(c), problem
            assert {int(a), int(b)} <= known, problem
            known.add(int(c))
        assert int(steps[-1][3]) == problem.result > 0
        if len(steps) == 2:
            assert steps[0][3] in (steps[1][0], steps[1][2]), problem
        # The numbers of the question are the canonical ones, all of them.
        assert sorted(int(n) for n in re.findall(r"\d+", problem.question)) == sorted(problem.numbers)


def test_schema_is_gsm8ks(drawn: dict[str, list[synthetic.Problem]]) -> None:
    for problem in drawn["sft"][:500]:
        lines = problem.answer.split("\n")
        assert extract_hash_answer(problem.answer) == str(problem.result) == lines[-1].removeprefix("#### ")
        assert " ".join(lines[:-1]) == problem.reasoning and "\n" not in problem.reasoning
        assert not re.search(r"[{}]", problem.question + problem.answer)
        assert problem.question.endswith("?")


def test_templates_are_many_and_every_operation_is_covered(drawn: dict[str, list[synthetic.Problem]]) -> None:
    shapes = [t.shape for t in TEMPLATES]
    assert sum(len(s) == 1 for s in shapes) >= 20 and sum(len(s) == 2 for s in shapes) >= 20
    assert {s[0] for s in shapes} == set("+-*/")
    assert len({t.id for t in TEMPLATES}) == len({t.question for t in TEMPLATES}) == len(TEMPLATES)
    for split, rows in drawn.items():
        assert {p.template for p in rows} == {t.id for t in TEMPLATES}, split


def test_splits_share_no_question_and_no_numbers(drawn: dict[str, list[synthetic.Problem]]) -> None:
    """Other seeds too: what is in a split is decided by the problem, not by the draw."""
    again = {split: list(itertools.islice(stream(split, seed=4), 1500)) for split in SPLITS}
    for one, other in itertools.permutations(SPLITS, 2):
        for theirs in (drawn[other], again[other]):
            assert not {p.key for p in drawn[one]} & {p.key for p in theirs}
            assert not {p.question for p in drawn[one]} & {p.question for p in theirs}
    # The check could fail: within a split, two seeds do meet.
    assert {p.key for p in drawn["heldout"]} & {p.key for p in again["heldout"]}


def test_renamed_near_duplicates_stay_in_their_split(drawn: dict[str, list[synthetic.Problem]]) -> None:
    """With names and things blanked out of the text itself, no question is in two splits."""
    words = re.compile(r"\b(" + "|".join(NAMES + ITEMS) + r")\b")
    blank = {split: {words.sub("_", p.question) for p in rows} for split, rows in drawn.items()}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not blank[one] & blank[other]
    # The check could fail: the same blanked text does come with several names within a split.
    assert len(blank["heldout"]) < len({p.question for p in drawn["heldout"]})


def test_split_shares_are_as_declared() -> None:
    assert sum(SPLITS.values()) == 100
    rng = random.Random(0)
    keys = {synthetic._draw(rng.choice(TEMPLATES), rng).key for _ in range(20_000)}
    for split, percent in SPLITS.items():
        assert abs(100 * sum(split_of(k) == split for k in keys) / len(keys) - percent) < 1.5


def test_same_seed_same_problems_in_another_process() -> None:
    code = "from pronghorn.data.synthetic import problems; print([p.question for p in problems('grpo', 20, seed=5)])"
    out = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert out[0] == out[1] == str([p.question for p in problems("grpo", 20, seed=5)]) + "\n"
    assert problems("grpo", 20, seed=5) != problems("grpo", 20, seed=6)


def test_published_splits_do_not_move() -> None:
    """A shipped model was trained on `sft`: were the hash or a template to change, its held-out set would leak."""
    pinned = ["sft", "sft", "dev", "grpo", "grpo", "sft", "grpo", "sft"]
    assert [split_of(f"one-{i:02d}|{i},7") for i in range(8)] == pinned
    first = problems("heldout", 1, seed=0)[0]
    assert first.key == "two-12|8,13,21"
    assert first.question.startswith("Zoe sells 8 cakes for $13 each and spends $21 of the money.")


def test_problems_are_distinct_and_enough() -> None:
    heldout = problems("heldout", 1000, seed=0)
    assert len({p.key for p in heldout}) == 1000
    assert {len(t.shape) for t in TEMPLATES if t.id in {p.template for p in heldout}} == {1, 2}


def test_bad_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="split='held_out' is unknown.*heldout"):
        next(stream("held_out"))
    monkeypatch.setattr(synthetic, "TEMPLATES", [t for t in TEMPLATES if t.shape == "/"][:1])
    few = len(problems("heldout", 3))
    assert few == 3
    with pytest.raises(ConfigError, match=r"count=1000 is more than split='heldout' can give: it gave \d+"):
        problems("heldout", 1000)


def test_dataset_has_gsm8ks_columns() -> None:
    data = synthetic.arithmetic_dataset("grpo", 12, seed=1)
    assert data.column_names == ["question", "answer"] and len(data) == 12
    assert data[3]["question"] == problems("grpo", 12, seed=1)[3].question
