"""Whether a response ends in the right number, in whatever format: the `number_*` metrics.

One rule finds the one answer that a response commits to, and only that is compared, so that a response cannot score by
listing candidates. The rule never falls through: tags that hold a wrong or no number are a wrong answer, whatever
stands elsewhere.
"""

from __future__ import annotations

import re
from decimal import Decimal

# A run of digits with points and commas in it, whatever stands around it: a candidate is never overlooked. A minus is a
# sign only where nothing that could be its left operand stands before it.
_RUN = re.compile(r"(?P<sign>(?<![\w)\]])[-\u2212])?\$?(?P<run>(?<![\w.)])\.[0-9]+|[0-9]+(?:[.,][0-9]+)*)")
_WHOLE = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]*)(?:\.[0-9]+)?")


def _numbers(text: str) -> list[Decimal]:
    """All numbers of the text. A run that is no number, such as "42,43" or "1.2.3", counts as each of its pieces."""
    found = []
    for match in _RUN.finditer(text):
        run = match["run"]
        pieces = [run.replace(",", "")] if _WHOLE.fullmatch(run) else re.findall("[0-9]+", run)
        found += [Decimal(f"-{piece}" if match["sign"] else piece) for piece in pieces]
    return found


def final_number(text: str) -> Decimal | None:
    """The number that a response commits to, or None.

    1. With `<answer>`: what the last `<answer>` holds, up to `</answer>` if it is closed.
    2. Otherwise with `####`: the rest of the line after the last `####`.
    3. Otherwise the last number of the text.
    In 1 and 2 there must be one number only (repeating it is no second one); "$", thousands separators, a unit and a
    full stop are let pass.
    """
    if "<answer>" in text:
        held = _numbers(text.split("<answer>")[-1].split("</answer>")[0])
    elif "####" in text:
        held = _numbers(text.split("####")[-1].strip().split("\n")[0])
    else:
        held = _numbers(text)[-1:]
    return held[0] if len(set(held)) == 1 else None


def number_matches(text: str, answer: str | int) -> bool:
    """Whether the response's final number equals `answer` (an integer or its string, "1,000" included).

    Raises `ValueError` where `answer` itself holds no number, or more than one.
    """
    wanted = set(_numbers(str(answer)))
    if len(wanted) != 1:
        raise ValueError(f"answer={answer!r} is not one number; give the number that follows '####'")
    return final_number(text) in wanted
