"""``code_execution_reward``: the share of its tests that the program in a completion passes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ...config.errors import ConfigError
from ..gsm8k import completion_text
from .blocks import code_block
from .cases import run_case
from .limits import Limits
from .probe import require_sandbox


class CodeReward:
    """The reward function that `code_execution_reward` makes. It pickles, so it can be `isolated`."""

    def __init__(self, tests: str, limits: Limits, parallel: int, extract: Callable[[str], str | None]) -> None:
        self.tests, self.limits, self.parallel, self.extract = tests, limits, parallel, extract
        self.__name__ = "code_execution_reward"

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """The share of tests passed, 0.0 without a code block, None (abstains) for a row without tests."""
        if self.tests not in columns:
            raise ConfigError(
                f"code_execution_reward: the data set has no column {self.tests!r}; name the one that holds the tests: "
                "code_execution_reward(tests=...)"
            )
        programs = [self.extract(completion_text(completion)) for completion in completions]
        cases = [_as_cases(given) for given in columns[self.tests]]
        log_extra = columns.get("log_extra")
        if log_extra is not None:
            log_extra("code", [program or "[no code block]" for program in programs])
        todo = [
            (program, case) for program, row in zip(programs, cases, strict=True) if program is not None for case in row
        ]
        with ThreadPoolExecutor(self.parallel, thread_name_prefix="pronghorn-code") as threads:
            # threads only wait for sandboxes; one that cannot be had raises here
            passed = iter([ran.passed for ran in threads.map(lambda one: run_case(one[0], one[1], self.limits), todo)])
        rewards: list[float | None] = []
        for program, row in zip(programs, cases, strict=True):
            good = sum(next(passed) for _ in row) if program is not None else 0
            rewards.append(good / len(row) if row else None)
        return rewards


def code_execution_reward(
    tests: str = "tests",
    limits: Limits | None = None,
    parallel: int | None = None,
    extract: Callable[[str], str | None] = code_block,
) -> CodeReward:
    """A reward function that runs each completion's Python program against the tests of its row.

    Args:
        tests: the data set's column; each row holds a list of cases (`cases.run_case`: Python text with `assert`s, or
            `{"input": ..., "output": ...}`).
        limits: of each case's run.
        parallel: how many cases run at once; by default the number of processors, at most 8.
        extract: from a completion's text to its program, or None.

    Raises:
        SandboxError: untrusted code cannot be isolated on this machine.
        ConfigError: `parallel` is below 1.
    """
    require_sandbox()
    if parallel is not None and parallel < 1:
        raise ConfigError(f"code_execution_reward: parallel={parallel} is out of range; give 1 or more")
    return CodeReward(tests, limits or Limits(), parallel or min(os.cpu_count() or 1, 8), extract)


def _as_cases(given: Any) -> list[str | Mapping[str, Any]]:
    if given is None:
        return []
    if isinstance(given, (str, Mapping)):
        return [given]
    return list(given)
