"""Programs in completions against tests: what counts as a program, as passing, and what a cheat earns."""

from __future__ import annotations

import math
import os
import pickle
from typing import Any

import pytest

from pronghorn.config.errors import ConfigError
from pronghorn.rewards import isolated
from pronghorn.rewards.code import Limits, code_execution_reward
from pronghorn.rewards.code.blocks import code_block
from pronghorn.rewards.code.cases import run_case
from pronghorn.rewards.errors import RewardError
from pronghorn.rewards.runner import RewardRunner

from .test_code_sandbox import isolating


def fenced(code: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{code}\n```\nDone."


@pytest.mark.parametrize(
    "text, code",
    [
        (fenced("x = 1"), "x = 1\n"),
        (fenced("x = 1", "Python"), "x = 1\n"),
        (fenced("x = 1", ""), "x = 1\n"),
        (fenced("x = 1", "py title=a.py"), "x = 1\n"),
        (fenced("x = 1") + fenced("y = 2"), "y = 2\n"),
        (fenced("x = 1") + fenced("output", "") + fenced("ls", "sh"), "x = 1\n"),
        (fenced("s = '''\n  ``` inside\n'''"), "s = '''\n  ``` inside\n'''\n"),
        ("- step\n  ```python\n  x = 1\n  ```\n", "  x = 1\n"),
        (fenced("ls", "sh"), None),
        ("```python\nx = 1", None),
        ("x = 1", None),
        ("", None),
    ],
)
def test_the_last_closed_python_block_counts(text: str, code: str | None) -> None:
    assert code_block(text) == code


@isolating
def test_the_share_of_tests_that_pass() -> None:
    reward = code_execution_reward(limits=Limits(seconds=20))
    double = "def double(x):\n    return 2 * x"
    logged: dict[str, list[Any]] = {}
    rewards = reward(
        completions=[fenced(double), [{"role": "assistant", "content": fenced(double)}], "no code", fenced(double)],
        tests=[
            ["assert double(2) == 4", "assert double(0) == 1", "double('a') + 1"],
            "assert double(2) == 4",
            ["x"],
            [],
        ],
        log_extra=logged.__setitem__,
    )
    assert rewards == [pytest.approx(1 / 3), 1.0, 0.0, None]
    assert logged["code"] == [double + "\n", double + "\n", "[no code block]", double + "\n"]


@isolating
def test_programs_that_read_and_print() -> None:
    limits = Limits(seconds=20)
    code = "for line in open(0): print(sum(map(int, line.split())), '')"
    assert run_case(code, {"input": "1 2\n3 4\n", "output": "3\n7"}, limits).passed
    assert not run_case(code, {"input": "1 2\n", "output": "4\n"}, limits).passed
    assert not run_case(code, {"input": "1 2\n", "output": "3\n\n7"}, limits).passed
    assert not run_case("print(3)\nraise SystemExit(1)", {"input": "", "output": "3"}, limits).passed
    for odd in (3, {"input": "1"}, ["assert 1"]):
        with pytest.raises(ValueError, match="a test case is Python text or has 'input' and 'output'"):
            run_case("", odd, limits)  # type: ignore[arg-type]


@isolating
@pytest.mark.parametrize(
    "cheat",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "import os, sys; sys.stdout.flush(); print('passed'); os._exit(0)",
        "raise SystemExit",
        "import sys; sys.stdin = None; del sys.modules['sys']",
        "import os; os.kill(os.getpid(), 15)",
        "def f(: pass",
        "import os; os.execv('/bin/true', ['/bin/true'])",
    ],
)
def test_a_program_that_ends_early_passes_nothing(cheat: str) -> None:
    assert not run_case(cheat, "assert f(1) == 2", Limits(seconds=20)).passed


@isolating
def test_a_hanging_and_a_hungry_program_earn_nothing_and_harm_no_other() -> None:
    reward = code_execution_reward(limits=Limits(seconds=1, memory_mb=64))
    programs = ["while True: pass", "x = bytearray(2 ** 30)", "import os\nwhile True: os.fork()", "x = 1"]
    assert reward(completions=[fenced(p) for p in programs], tests=[["assert True"]] * 4) == [0.0, 0.0, 0.0, 1.0]


@isolating
def test_it_runs_in_the_process_and_in_workers() -> None:
    reward = code_execution_reward("checks", Limits(seconds=20), parallel=2)
    completions = [fenced("y = 1"), fenced("y = 2"), "none"]
    columns = {"checks": [["assert y == 1"]] * 3}
    assert pickle.loads(pickle.dumps(reward)).tests == "checks"
    for func in (reward, isolated(reward)):
        runner = RewardRunner(func)
        rewards_BF = runner.score(["p"] * 3, completions, [[1]] * 3, columns)
        assert runner.names == ["code_execution_reward"] and rewards_BF.flatten().tolist() == [1.0, 0.0, 0.0]
        runner.close()


@isolating
def test_columns_and_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"no column 'cases'.*tests=\.\.\."):
        code_execution_reward("cases")(completions=["x"])
    with pytest.raises(ConfigError, match="parallel=0"):
        code_execution_reward(parallel=0)
    with pytest.raises(RewardError, match="row 1: raised ValueError: a test case"):
        RewardRunner(code_execution_reward()).score(
            ["p"] * 2, [fenced("x = 1")] * 2, [[1]] * 2, {"tests": [["assert x"], [7]]}
        )


@isolating
def test_a_row_without_tests_abstains_in_the_runner() -> None:
    rewards_BF = RewardRunner(code_execution_reward()).score(
        ["p"] * 2, [fenced("x = 1")] * 2, [[1]] * 2, {"tests": [["assert x"], None]}
    )
    assert rewards_BF[0].item() == 1.0 and math.isnan(rewards_BF[1].item())
    assert not os.path.exists("program.py")
