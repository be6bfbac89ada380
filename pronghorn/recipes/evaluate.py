"""Held-out accuracy that does not depend on the rewards: greedy answers, graded in the tags and in any format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.sampling import SamplingParams
from ..data.answers import number_matches
from ..rewards.gsm8k import extract_xml_answer


@dataclass(frozen=True)
class Evaluation:
    """Greedy answers to P held-out problems.

    Attributes:
        in_tags: for each problem, whether the answer tags hold exactly the right answer (the blog's correctness).
        number: whether the response commits to the right number in whatever format.
        responses: the texts.
    """

    in_tags: list[bool]
    number: list[bool]
    responses: list[str]

    @property
    def accuracy(self) -> float:
        return sum(self.in_tags) / len(self.in_tags)

    @property
    def number_accuracy(self) -> float:
        return sum(self.number) / len(self.number)


def grade(responses: Sequence[str], answers: Sequence[str]) -> Evaluation:
    """Grade ``responses`` against the ``answers`` of the same length."""
    if len(responses) != len(answers):
        raise ValueError(f"responses={len(responses)} and answers={len(answers)} differ in number")
    # extract_xml_answer gives the whole text where there are no tags: an answer outside of tags does not count here.
    in_tags = ["<answer>" in r and extract_xml_answer(r) == a for r, a in zip(responses, answers)]
    number = [number_matches(r, a) for r, a in zip(responses, answers)]
    return Evaluation(in_tags, number, list(responses))


def evaluate(
    model: Any,
    prompts: Sequence[Any],
    answers: Sequence[str],
    max_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    batch: int = 128,
    **options: Any,
) -> Evaluation:
    """Answer every prompt greedily with ``model.fast_generate`` and grade.

    Args:
        prompts: chats or strings, P of them; ``answers``: the right answers as strings.
        max_tokens: longest answer.
        progress: called with (done, P) after each batch.
        options: passed to ``fast_generate`` (``lora_request=None`` grades the base model).
    """
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    responses: list[str] = []
    for start in range(0, len(prompts), batch):
        outputs = model.fast_generate(list(prompts[start : start + batch]), greedy, **options)
        responses += [o.outputs[0].text for o in outputs]
        if progress is not None:
            progress(len(responses), len(prompts))
    return grade(responses, answers)
