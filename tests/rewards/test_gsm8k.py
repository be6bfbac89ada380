"""The five rewards on a table of cases, each value worked out by hand from the demo's rules."""

from __future__ import annotations

import pytest

from pronghorn.rewards import gsm8k

GOOD = "<reasoning>\n7 * 6 = 42\n</reasoning>\n<answer>\n42\n</answer>\n"
MULTILINE = "<reasoning>\n7 * 6\n= 42\n</reasoning>\n<answer>\n42\n</answer>\n"
ONE_LINE = "<reasoning>7 * 6 = 42</reasoning><answer>42</answer>"
NO_NEWLINE = GOOD[:-1]
TRAILING = GOOD + "Done."
PREFIXED = "Sure: " + GOOD
TWICE = GOOD + GOOD
PLAIN = "7 * 6 = 42\n#### 42"

# text, extracted answer, correctness, int, strict, soft, xmlcount
TABLE = {
    "good": (GOOD, "42", 2.0, 0.5, 0.5, 0.0, 0.5),
    # Without DOTALL: neither format reward, though all tags count.
    "multiline": (MULTILINE, "42", 2.0, 0.5, 0.0, 0.0, 0.5),
    "one line": (ONE_LINE, "42", 2.0, 0.5, 0.0, 0.5, 0.0),
    # No "\n</answer>\n": the whole text counts as trailing for the third tag; the fourth gives 0.001 back.
    "no newline": (NO_NEWLINE, "42", 2.0, 0.5, 0.0, 0.0, 0.5 - 0.001 * len(NO_NEWLINE) + 0.001),
    # "Done." is 5 characters, counted with both answer tags.
    "trailing": (TRAILING, "42", 2.0, 0.5, 0.0, 0.0, 0.5 - 0.005 - 0.005),
    "prefixed": (PREFIXED, "42", 2.0, 0.5, 0.0, 0.0, 0.5),
    "twice": (TWICE, "42", 2.0, 0.5, 0.0, 0.0, 0.0),
    "plain": (PLAIN, PLAIN, 0.0, 0.0, 0.0, 0.0, 0.0),
    "bare": ("42", "42", 2.0, 0.5, 0.0, 0.0, 0.0),
    "empty": ("", "", 0.0, 0.0, 0.0, 0.0, 0.0),
    "negative": ("<answer>\n-42\n</answer>\n", "-42", 0.0, 0.0, 0.0, 0.0, 0.0 + 0.125),
    "separator": ("<answer>1,042</answer>", "1,042", 0.0, 0.0, 0.0, 0.0, 0.0),
    "decimal": ("<answer>42.0</answer>", "42.0", 0.0, 0.0, 0.0, 0.0, 0.0),
    "unclosed": ("<reasoning>\nx\n</reasoning>\n<answer>\n42", "42", 2.0, 0.5, 0.0, 0.0, None),
    "empty answer": ("<reasoning>\nx\n</reasoning>\n<answer>\n\n</answer>\n", "", 0.0, 0.0, 0.5, 0.0, 0.5),
    "open only": ("<reasoning>\n", "<reasoning>", 0.0, 0.0, 0.0, 0.0, 0.125),
    "reasoning only": ("<reasoning>\nx\n</reasoning>\n", "<reasoning>\nx\n</reasoning>", 0.0, 0.0, 0.0, 0.0, 0.25),
    "last answer counts": ("<answer>41</answer> no, <answer>42</answer>", "42", 2.0, 0.5, 0.0, 0.0, 0.0),
    "soft, spaced": ("<reasoning>x</reasoning> \n\t<answer>42</answer> tail", "42", 2.0, 0.5, 0.0, 0.5, 0.0),
}


@pytest.mark.parametrize("case", TABLE)
def test_table(case: str) -> None:
    text, extracted, correct, integer, strict, soft, count = TABLE[case]
    if case == "unclosed":  # three tags, less the whole text
        count = 0.375 - 0.001 * len(text)
    chat = [[{"role": "assistant", "content": text}]]
    for completions in (chat, [text]):
        prompts = [[{"role": "user", "content": "7 * 6?"}]]
        asked = {"prompts": prompts, "completions": completions, "answer": ["42"]}
        assert gsm8k.extract_xml_answer(text) == extracted
        assert gsm8k.correctness_reward_func(**asked) == [correct]
        assert gsm8k.int_reward_func(**asked) == [integer]
        assert gsm8k.strict_format_reward_func(**asked) == [strict]
        assert gsm8k.soft_format_reward_func(**asked) == [soft]
        assert gsm8k.xmlcount_reward_func(**asked) == pytest.approx([count], abs=1e-12)
    assert gsm8k.count_xml(text) == pytest.approx(count, abs=1e-12)


def test_the_answer_is_compared_as_a_string() -> None:
    right = gsm8k.correctness_reward_func(None, ["<answer>\n1,000\n</answer>", "<answer>1000</answer>"], ["1,000"] * 2)
    assert right == [2.0, 0.0]


def test_answers_of_another_number_raise_and_are_not_cut_off() -> None:
    with pytest.raises(ValueError):
        gsm8k.correctness_reward_func(None, ["42", "42"], ["42"])


def test_a_perfect_response_has_a_known_sum() -> None:
    """A response in the asked format cannot earn the soft reward too: its tags hold line breaks."""
    total = sum(f(prompts=[None], completions=[GOOD], answer=["42"])[0] for f in gsm8k.FIVE_REWARDS)
    assert total == pytest.approx(3.5)
    assert [f.__name__ for f in gsm8k.FIVE_REWARDS] == [
        "xmlcount_reward_func",
        "soft_format_reward_func",
        "strict_format_reward_func",
        "int_reward_func",
        "correctness_reward_func",
    ]
