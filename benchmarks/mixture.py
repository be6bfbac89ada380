"""What the learning study's larger model learns from: word problems, chains of steps, and GSM8K, each in its split.

Of a hundred problems 15 are of one and two steps (:mod:`pronghorn.data.synthetic`), 60 of three to six
(:mod:`pronghorn.data.chains`) and 25 GSM8K's. The splits are those of the synthetic problems. GSM8K's training file is
split by the same rule, on the question's text: what GRPO trains on ("grpo") and what choices are made on ("dev") is not
pretrained on; the split "heldout" is GSM8K's test file.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pronghorn.config.errors import ConfigError
from pronghorn.data.chains import draw_chain
from pronghorn.data.gsm8k import extract_hash_answer, load_gsm8k
from pronghorn.data.synthetic import Problem, draw, split_of

if TYPE_CHECKING:
    from datasets import Dataset

SHARES = {"words": 0.15, "chains": 0.60, "gsm8k": 0.25}
"""Of the problems that GRPO trains on and that are held out."""


@dataclass(frozen=True)
class Solved:
    """A problem with its solution: steps on one line, as the asked format wants them, and the answer as a string."""

    kind: str
    question: str
    reasoning: str
    answer: str

    @classmethod
    def synthetic(cls, kind: str, problem: Problem) -> Solved:
        return cls(kind, problem.question, problem.reasoning, str(problem.result))

    @classmethod
    def gsm8k(cls, row: dict[str, str]) -> Solved:
        """Without the calculator's notes (``<<48/2=24>>``), which say a number that stands beside them again."""
        steps = re.sub(r"<<[^>]*>>", "", row["answer"].split("####")[0])
        return cls("gsm8k", row["question"].strip(), " ".join(steps.split()), extract_hash_answer(row["answer"]) or "")


SYNTHETIC = {"words": draw, "chains": draw_chain}
"""kind: one problem of a split."""


def gsm8k_rows(source: str, split: str) -> list[Solved]:
    """GSM8K's problems of the split, in the file's order. ``source``: see :func:`pronghorn.data.gsm8k.load_gsm8k`."""
    if split == "heldout":
        return [Solved.gsm8k(row) for row in load_gsm8k(source, "test")]
    parts = {"sft": ("sft", "heldout")}.get(split, (split,))  # the file's own test set is what is held out
    return [Solved.gsm8k(row) for row in load_gsm8k(source, "train") if split_of(row["question"]) in parts]


def mixed_dataset(split: str, count: int, source: str, seed: int = 0) -> Dataset:
    """``count`` problems, no two with the same numbers in the same words: ``question``, ``answer`` and ``kind``.

    Raises:
        ConfigError: more problems than GSM8K has in that split.
    """
    from datasets import Dataset

    rng = random.Random(f"mixed-{split}-{seed}")
    counts = {kind: round(share * count) for kind, share in SHARES.items()}
    counts["chains"] += count - sum(counts.values())
    rows = gsm8k_rows(source, split)
    if counts["gsm8k"] > len(rows):
        raise ConfigError(
            f"count={count} asks for {counts['gsm8k']} of GSM8K's problems and split={split!r} has {len(rows)}; "
            f"ask for {int(len(rows) / SHARES['gsm8k'])} or fewer"
        )
    found = rng.sample(rows, counts["gsm8k"])
    for kind in ("words", "chains"):
        drawn: dict[str, Problem] = {}
        while len(drawn) < counts[kind]:
            problem = SYNTHETIC[kind](split, rng)
            drawn.setdefault(problem.key, problem)
        found += [Solved.synthetic(kind, problem) for problem in drawn.values()]
    rng.shuffle(found)
    columns: dict[str, list[Any]] = {
        "question": [p.question for p in found],
        "answer": [f"{p.reasoning}\n#### {p.answer}" for p in found],
        "kind": [p.kind for p in found],
    }
    return Dataset.from_dict(columns)
