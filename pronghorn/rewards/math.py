"""Answers in mathematics, checked by value and not by spelling: `\\frac{1}{2}`, `0.5` and `1/2` are one answer.

The checking is the package `math-verify`'s (`pip install 'pronghorn[math]'`), used as TRL's `accuracy_reward` uses it.
Its time limits are alarm signals, which only the main thread of a process can have. In a worker (`isolated`) functions
run in the main thread; in the process they run in the thread that trains. Anywhere else these functions raise: without
its limits one answer could hold the run up for hours.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from ..config.errors import ConfigError
from .gsm8k import completion_text

PARSE_SECONDS, VERIFY_SECONDS = 10, 5
"""TRL's limits for parsing one text and for comparing one pair."""


def accuracy_reward(
    completions: Sequence[Any],
    solution: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """1.0 where the completion's answer equals the column `solution`, else 0.0; None where no answer is in `solution`.

    The answer is the LaTeX in `\\boxed{}`, or in math signs after words such as "the answer is". Values and logs
    (`solution`, `gold_parsed`, `answer_parsed`) are those of TRL's function of this name; completions may be plain
    strings too. A text that takes longer than its limit counts as one without an answer. The limits do not reach into
    one long operation on huge numbers: `isolated(accuracy_reward)` stops that as well.

    Raises:
        ConfigError: math-verify is not installed, or this is not the main thread.
    """
    return _check([completion_text(c) for c in completions], solution, "solution", log_extra)


def math_reward_func(
    completions: Sequence[Any],
    answer: Sequence[str],
    log_extra: Callable[[str, list[Any]], None] | None = None,
    **kwargs: Any,
) -> list[float | None]:
    """`accuracy_reward` for data sets that call the column `answer`."""
    return _check([completion_text(c) for c in completions], answer, "answer", log_extra)


def _check(
    texts: Sequence[str], golds: Sequence[str], column: str, log_extra: Callable[[str, list[Any]], None] | None
) -> list[float | None]:
    try:
        from latex2sympy2_extended import NormalizationConfig
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        raise ConfigError("math rewards need the package math-verify: pip install 'pronghorn[math]'") from error
    if threading.current_thread() is not threading.main_thread():
        raise ConfigError(
            f"math rewards were called in thread {threading.current_thread().name!r}: math-verify's time limits are "
            "signals, which only a main thread can have. Wrap the function, isolated(accuracy_reward), so that it "
            "runs in the main thread of a worker"
        )
    # LaTeX without malformed operators, the boxed answer first
    extraction = LatexExtractionConfig(
        normalization_config=NormalizationConfig(units=True), boxed_match_priority=0, try_extract_without_anchor=False
    )
    rewards: list[float | None] = []
    shown_gold, shown_answer = [], []
    for text, gold in zip(texts, golds, strict=True):
        expected = parse(gold, parsing_timeout=PARSE_SECONDS)
        if not expected:
            rewards.append(None)
            shown_gold.append("[unparseable]")
            shown_answer.append("[skipped]")
            continue
        answer = parse(
            text, extraction_config=[extraction], extraction_mode="first_match", parsing_timeout=PARSE_SECONDS
        )
        rewards.append(float(verify(expected, answer, timeout_seconds=VERIFY_SECONDS)))
        shown_gold.append(str(expected))
        shown_answer.append(str(answer) if answer else "[unparseable]")
    if log_extra is not None:
        log_extra(column, list(golds))
        log_extra("gold_parsed", shown_gold)
        log_extra("answer_parsed", shown_answer)
    return rewards
