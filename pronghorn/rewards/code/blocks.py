"""The program in a completion."""

from __future__ import annotations

import re

_BLOCK = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3")


def code_block(text: str) -> str | None:
    """The last block that is fenced as Python, else the last that names no language; None without one.

    A block that is not closed, say in a completion cut off at its limit, does not count.
    """
    found = _BLOCK.findall(text)
    for languages in (_PYTHON, ("",)):
        for language, code in reversed(found):
            if language.lower() in languages:
                return str(code)
    return None
