"""The number that a response commits to; and the ways in which it might be fooled."""

from __future__ import annotations

from decimal import Decimal

import pytest

from pronghorn.data.answers import final_number, number_matches

RIGHT = [
    "<reasoning>\n7 * 6 = 42\n</reasoning>\n<answer>\n42\n</answer>\n",
    "<answer>42</answer>",
    "<answer>\n42",  # not closed
    "<answer>$42.00</answer>",
    "<answer>42 dollars.</answer>",
    "<answer>41</answer> No: <answer>42</answer>",  # the last one is the commitment
    "<answer>**42**</answer> and 17 others",
    "7 * 6 = 42\n#### 42",
    "#### 42 apples\nThat is 3 more than 39.",
    "#### 41\n#### 42",
    "7 * 6 = 42",
    "It is 100 - 58 = 42 dollars.",
    "So the answer is 42.",
    "42",
    "She has $42",
    r"\boxed{42}",
    "x=42",
    "(42)",
]
WRONG = [
    "",
    "no number at all",
    "<answer></answer>42",  # empty tags are an empty answer
    "<answer>41</answer> 42",  # what stands outside of the tags does not count
    "42 <answer>41</answer> #### 42",
    "<answer>42 or 43</answer>",  # listing candidates
    "<answer>41 42</answer>",
    "#### 41 42",
    "#### 41\n42",
    "<answer>42</answer><answer>41</answer>",
    "<answer>142</answer>",
    "<answer>420</answer>",
    "<answer>4 2</answer>",
    "<answer>42.5</answer>",
    "<answer>0.42</answer>",
    "<answer>-42</answer>",
    "<answer>$-42</answer>",
    "<answer>-$42</answer>",
    "<answer>42,000</answer>",
    "<answer>42%3</answer>",
    "<answer>forty-two</answer>",
    "<answer>\u0664\u0662</answer>",  # Arabic-Indic digits
    "<answer>4e2</answer>",
    "42 + 1 = 43",
    "the answer is 42, or 41",
    "42 is not it: 7",
    "<answer>42,43</answer>",
    "<answer>42or43</answer>",
    "<answer>42..43</answer>",
    "<answer>42.43.44</answer>",
    "<answer>.42</answer>",
    "<answer>\u221242</answer>",
]


@pytest.mark.parametrize("text", RIGHT)
def test_right(text: str) -> None:
    assert number_matches(text, "42") and number_matches(text, 42)
    assert not number_matches(text, 41)


@pytest.mark.parametrize("text", WRONG)
def test_wrong(text: str) -> None:
    assert not number_matches(text, "42")


def test_separators_and_signs() -> None:
    assert number_matches("#### 1,234,567", "1234567") and number_matches("<answer>1234567</answer>", "1,234,567")
    assert final_number("#### 1,23") is None  # no thousands separator: two numbers
    assert number_matches("5 - 7 = -2", -2) and not number_matches("5 - 7 = -2", 2)
    assert final_number("from 10-12") == Decimal(12)  # a range, no minus twelve
    assert final_number("<answer>7, that is 7</answer>") == Decimal(7)
    assert final_number("<answer>") is None


def test_listing_every_number_never_wins_more_than_one() -> None:
    listing = " ".join(map(str, range(200)))
    for text in (listing, f"<answer>{listing}</answer>", f"#### {listing}"):
        assert sum(number_matches(text, n) for n in range(200)) <= 1


def test_an_answer_that_is_no_number_is_an_error_of_the_caller() -> None:
    for answer in ("", "many", "1 or 2"):
        with pytest.raises(ValueError, match="is not one number"):
            number_matches("42", answer)
