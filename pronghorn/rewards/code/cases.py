"""Test cases: what a program must do, and whether it did."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .limits import Limits
from .run import run_code
from .sandbox import CodeResult

# Runs the program, then the test in the same namespace; only after both does it print the word, which it got by its
# input. A program that ends early (sys.exit, os._exit) so passes nothing.
_WITH_TEST = """
import json, sys
def run():
    code, test, word = json.load(sys.stdin)
    names = {"__name__": "program"}
    exec(compile(code, "program", "exec"), names)
    exec(compile(test, "test", "exec"), names)
    sys.stdout.flush()
    print("\\n" + word)
run()
"""


@dataclass(frozen=True)
class CaseResult:
    """Whether a program passed a case, and how it ran."""

    passed: bool
    run: CodeResult


def run_case(code: str, case: str | Mapping[str, Any], limits: Limits) -> CaseResult:
    """Runs `code` against one case, in a sandbox of its own.

    Args:
        case: Python text run after the program, which passes where nothing is raised (`assert f(2) == 4`); or
            `{"input": ..., "output": ...}`: what the program reads, and what it must print. Outputs are compared line
            by line without white space at the ends of lines and of the text.

    Raises:
        ValueError: another kind of case.
        SandboxError: it cannot be isolated here, and was not run.
    """
    if isinstance(case, str):
        word = secrets.token_hex(16)
        ran = run_code(_WITH_TEST, json.dumps([code, case, word]), limits)
        return CaseResult(ran.status == "ok" and ran.stdout.endswith(f"\n{word}\n"), ran)
    if not isinstance(case, Mapping) or not {"input", "output"} <= set(case):
        raise ValueError(f"a test case is Python text or has 'input' and 'output', not {case!r}")
    ran = run_code(code, str(case["input"]), limits)
    return CaseResult(ran.status == "ok" and _lines(ran.stdout) == _lines(str(case["output"])), ran)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
