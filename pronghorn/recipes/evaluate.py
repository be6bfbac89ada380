"""The quickstart's held-out accuracy: greedy answers, graded in the tags and in any format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.adapters import LIVE, AdapterChoice
from ..config.sampling import SamplingParams
from ..data.answers import number_matches
from ..grpo.evaluation import answer_in_tags, complete


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
    in_tags = [answer_in_tags(r) == a for r, a in zip(responses, answers)]
    number = [number_matches(r, a) for r, a in zip(responses, answers)]
    return Evaluation(in_tags, number, list(responses))


def evaluate(
    model: Any,
    prompts: Sequence[Any],
    answers: Sequence[str],
    max_tokens: int,
    progress: Callable[[int, int], None] | None = None,
    batch: int = 128,
    lora_request: AdapterChoice = LIVE,
) -> Evaluation:
    """Answer every prompt greedily and grade.

    Args:
        prompts: chats or strings, P of them; ``answers``: the right answers as strings.
        max_tokens: longest answer.
        progress: called with (done, P) after each batch.
        lora_request: what answers; None grades the base model.
    """
    greedy = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    texts = complete(model, prompts, greedy, batch=batch, progress=progress, adapter=lora_request)
    return grade([text for (text,) in texts], answers)
