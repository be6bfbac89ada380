"""Held-out accuracy that does not depend on the rewards: accuracy with its interval, pass@k and maj@k."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.adapters import LIVE, AdapterChoice
from ..config.errors import ConfigError
from ..config.sampling import SamplingParams
from ..models.state import state_of
from ..rewards.gsm8k import extract_xml_answer
from ..rollout import base as rollout
from ..stats import majority_at_k, pass_at_k, wilson_interval
from .data import as_dataset
from .seeds import request_seed

Progress = Callable[[int, int], None]
"""``progress(done, total)`` in problems."""


def answer_in_tags(text: str) -> str | None:
    """What stands in the ``<answer>`` tags, or None: an answer outside of tags is none."""
    return extract_xml_answer(text) if "<answer>" in text else None


def same_text(given: Any, answer: Any) -> bool:
    """Whether the extracted answer is, as text, the data set's."""
    return str(given) == str(answer)


@dataclass(frozen=True)
class AccuracyResult:
    """What ``n`` completions of each of P problems were worth.

    Attributes:
        right: for each problem, for each completion, whether its answer is right; ``[P][n]``.
        answers: the extracted answers, None where there is none; ``[P][n]``.
        responses: the texts; ``[P][n]``.
    """

    right: list[list[bool]]
    answers: list[list[Any]]
    responses: list[list[str]]

    @property
    def accuracy(self) -> float:
        """The share of right completions (pass@1)."""
        return sum(sum(row) / len(row) for row in self.right) / len(self.right)

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the accuracy. Completions of one problem are no independent trials: P counts."""
        return wilson_interval(self.accuracy * len(self.right), len(self.right))

    def pass_at(self, k: int) -> float:
        """Chance that one of k completions is right (Chen et al. 2021, arXiv:2107.03374)."""
        return sum(pass_at_k(len(row), sum(row), k) for row in self.right) / len(self.right)

    def majority_at(self, k: int) -> float:
        """Chance that the most frequent answer of k completions is right (Wang et al. 2023, arXiv:2203.11171)."""
        total = 0.0
        for right, answers in zip(self.right, self.answers):
            votes: dict[bool, list[int]] = {True: [], False: []}
            correct = dict(zip(answers, right))
            for answer, count in Counter(a for a in answers if a is not None).items():
                votes[correct[answer]].append(count)
            total += majority_at_k(votes, answers.count(None), k)
        return total / len(self.right)

    def metrics(self, pass_at: Sequence[int] = (), majority_at: Sequence[int] = ()) -> dict[str, float]:
        """``accuracy``, ``accuracy_low``, ``accuracy_high``, ``answered``, ``pass@k`` and ``maj@k``, all shares."""
        low, high = self.interval
        said = [answer is not None for row in self.answers for answer in row]
        found = {"accuracy": self.accuracy, "accuracy_low": low, "accuracy_high": high}
        found["answered"] = sum(said) / len(said)
        found |= {f"pass@{k}": self.pass_at(k) for k in pass_at}
        return found | {f"maj@{k}": self.majority_at(k) for k in majority_at}


@dataclass
class AccuracyEval:
    """Problems with answers, how to find the answer in a response, and how to draw responses.

    It generates with the native engine of the model that is trained (also where ``rollout_engine`` is another), on its
    weights as they stand, without dropout, whatever mode the model is in; modules' training flags and all generators
    are afterwards as they were, so a run with it ends with the weights of a run without. Every evaluation draws the
    same seeds, so that evaluations compare.

    Attributes:
        dataset: rows with ``prompt`` (a string or a chat) and ``answer_column``; never rows that are trained on.
        params: how responses are drawn; greedy, one each, by default. ``pass_at`` and ``majority_at`` need ``n`` of at
            least their k, and a temperature.
        extract: text of a response -> its answer (hashable), or None where it has none.
        is_right: (answer, the row's answer) -> whether it is right. Not asked where there is no answer.
        answer_column: of ``dataset``.
        pass_at, majority_at: the k of pass@k and maj@k.
        every: optimizer steps between evaluations; None takes the trainer's ``eval_steps``, and without one evaluates
            before and after training only.
        prefix: before the names of the metrics.
        batch: problems generated at once.

    Raises:
        ConfigError: no rows, a missing column, or a k that the completions do not allow.
    """

    dataset: Any
    params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0, max_tokens=256))
    extract: Callable[[str], Any] = answer_in_tags
    is_right: Callable[[Any, Any], bool] = same_text
    answer_column: str = "answer"
    pass_at: tuple[int, ...] = ()
    majority_at: tuple[int, ...] = ()
    every: int | None = None
    prefix: str = "eval_"
    batch: int = 128

    def __post_init__(self) -> None:
        self.dataset = as_dataset(self.dataset, "AccuracyEval: dataset")
        self.params = SamplingParams.from_any(self.params)
        missing = {"prompt", self.answer_column} - set(self.dataset.column_names)
        if missing or not len(self.dataset):
            raise ConfigError(
                f"AccuracyEval: dataset lacks {', '.join(sorted(missing)) or 'rows'} (columns: "
                f"{', '.join(self.dataset.column_names)}); give rows with prompt and {self.answer_column}"
            )
        for name in ("pass_at", "majority_at"):
            for k in getattr(self, name):
                if not 1 <= k <= self.params.n:
                    raise ConfigError(
                        f"AccuracyEval: {name} holds k={k}, but params.n={self.params.n} completions are drawn; give "
                        f"SamplingParams(n={max(k, 1)}, ...) or a k of 1 to n"
                    )
        if self.params.n > 1 and self.params.greedy:
            raise ConfigError(
                f"AccuracyEval: params draws n={self.params.n} completions at temperature=0, which are all the same; "
                "give a temperature above 0, or n=1"
            )
        for name, least in (("every", 1), ("batch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"AccuracyEval: {name}={value} is out of range; give {least} or more")

    def __call__(self, model: Any, progress: Progress | None = None) -> AccuracyResult:
        """Answer every problem with ``model`` (a Pronghorn model) and grade.

        Raises:
            ConfigError: a prompt that does not leave room for a completion.
            RuntimeError: ``extract`` or ``is_right`` raised, naming the problem and the response.
        """
        prompts = list(self.dataset["prompt"])
        return self.grade(complete(model, prompts, self.params, batch=self.batch, progress=progress))

    def check(self, model: Any) -> None:
        """Refuse, before training, problems that the model has no room for.

        Raises:
            ConfigError: naming the longest prompt and the limit.
        """
        state = state_of(model)
        longest = max(len(ids) for ids in rollout.encode_prompts(state.tokenizer, list(self.dataset["prompt"])))
        most = self.params.max_tokens or 1
        if longest + most > state.max_seq_length:
            raise ConfigError(
                f"AccuracyEval: a prompt of {longest} tokens and params.max_tokens={most} pass "
                f"max_seq_length={state.max_seq_length}; lower max_tokens, leave long problems out, or load with a "
                "larger max_seq_length"
            )

    def grade(self, responses: Sequence[Sequence[str]]) -> AccuracyResult:
        """Grade ``responses`` ``[P][n]`` to the problems in order, wherever they come from."""
        wanted = list(self.dataset[self.answer_column])
        if len(responses) != len(wanted):
            raise ValueError(f"responses={len(responses)} and problems={len(wanted)} differ in number")
        answers = [[self._ask("extract", row, text, text) for text in texts] for row, texts in enumerate(responses)]
        right = [
            [a is not None and bool(self._ask("is_right", row, str(a), a, wanted[row])) for a in given]
            for row, given in enumerate(answers)
        ]
        return AccuracyResult(right, answers, [list(texts) for texts in responses])

    def metrics(self, result: AccuracyResult) -> dict[str, float]:
        """The numbers of ``result`` under the names that are logged: ``eval_accuracy`` and so on."""
        return {f"{self.prefix}{n}": v for n, v in result.metrics(self.pass_at, self.majority_at).items()}

    def _ask(self, name: str, row: int, shown: str, *arguments: Any) -> Any:
        try:
            return getattr(self, name)(*arguments)
        except Exception as error:
            raise RuntimeError(
                f"AccuracyEval: {name} raised {type(error).__name__} on problem {row} ({error}): {shown[-200:]!r}"
            ) from error


def complete(
    model: Any,
    prompts: Sequence[Any],
    params: SamplingParams,
    *,
    batch: int = 128,
    progress: Progress | None = None,
    adapter: AdapterChoice = LIVE,
) -> list[list[str]]:
    """``params.n`` texts for each prompt, by the model's own engine; a prompt's draws depend on its place alone.

    Args:
        prompts: strings, chats or lists of token ids, P of them.
        progress: called with (done, P) after each batch.
        adapter: what answers; the live adapter, None for the base model, or what ``load_lora`` gave.
    """
    tokenizer = state_of(model).tokenizer
    engine = rollout.engine_of(model, tokenizer)
    engine.policy_changed()
    ids = rollout.encode_prompts(tokenizer, list(prompts))
    seed = params.seed or 0
    texts: list[list[str]] = []
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        each = [dataclasses.replace(params, seed=request_seed(seed, start + i)) for i in range(len(part))]
        texts += [[o.text for o in request.outputs] for request in engine.generate(part, each, adapter=adapter)]
        if progress is not None:
            progress(len(texts), len(ids))
    return texts
