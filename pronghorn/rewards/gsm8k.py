"""The five rewards of the well-known GRPO demo on GSM8K, with exactly its rules.

Each takes what TRL passes (`prompts`, `completions` and data set columns) and gives one float a completion. A
completion is a chat (its first message counts) or a plain string. The largest sum is 2.0 + 0.5 + 0.5 + 0.5 + 0.5 = 4.0.

Two quirks are kept, since scores are only comparable with them:
- The two patterns are matched without DOTALL, so `.` stops at a line break: reasoning or an answer of more than one
  line never earns the strict or the soft format reward.
- Without an `<answer>` tag the whole text counts as the answer, so a bare "42" is correct.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_STRICT = re.compile(r"^<reasoning>\n.*?\n</reasoning>\n<answer>\n.*?\n</answer>\n$")
_SOFT = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>")


def completion_text(completion: Any) -> str:
    """The text of a completion: itself if a string, otherwise its first message's content."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def extract_xml_answer(text: str) -> str:
    """What stands between the last `<answer>` and the `</answer>` after it, stripped; without tags, the whole text."""
    return text.split("<answer>")[-1].split("</answer>")[0].strip()


def correctness_reward_func(
    prompts: Any, completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any
) -> list[float]:
    """2.0 where the extracted answer equals the column `answer` as a string, otherwise 0.0."""
    return [
        2.0 if extract_xml_answer(completion_text(c)) == a else 0.0 for c, a in zip(completions, answer, strict=True)
    ]


def int_reward_func(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """0.5 where the extracted answer is digits only (`str.isdigit`: no sign, no separator), otherwise 0.0."""
    return [0.5 if extract_xml_answer(completion_text(c)).isdigit() else 0.0 for c in completions]


def strict_format_reward_func(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """0.5 where the text is exactly the asked format, line breaks included, with one line in each pair of tags."""
    return [0.5 if _STRICT.match(completion_text(c)) else 0.0 for c in completions]


def soft_format_reward_func(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """0.5 where the text begins with the two pairs of tags, each pair on one line, whatever white space is between."""
    return [0.5 if _SOFT.match(completion_text(c)) else 0.0 for c in completions]


def count_xml(text: str) -> float:
    """0.125 for each of the four tags that stands exactly once with its line break, less 0.001 a trailing character.

    What trails the answer is counted twice: with the opening `<answer>` tag all that follows `\\n</answer>\\n`, and
    with the closing tag all that follows `\\n</answer>`, of which one character, the line break, is free. Where
    `\\n</answer>\\n` is missing, all of the text counts as trailing for the first (the demo's rule, kept), and where
    the text ends right at `</answer>` the second gives 0.001 back.
    """
    score = 0.0
    if text.count("<reasoning>\n") == 1:
        score += 0.125
    if text.count("\n</reasoning>\n") == 1:
        score += 0.125
    if text.count("\n<answer>\n") == 1:
        score += 0.125
        score -= len(text.split("\n</answer>\n")[-1]) * 0.001
    if text.count("\n</answer>") == 1:
        score += 0.125
        score -= (len(text.split("\n</answer>")[-1]) - 1) * 0.001
    return score


def xmlcount_reward_func(completions: Sequence[Any], **kwargs: Any) -> list[float]:
    """`count_xml` of each completion: at most 0.5, and negative for long trailing text."""
    return [count_xml(completion_text(c)) for c in completions]


FIVE_REWARDS = (
    xmlcount_reward_func,
    soft_format_reward_func,
    strict_format_reward_func,
    int_reward_func,
    correctness_reward_func,
)
"""All five, in the demo's order."""
