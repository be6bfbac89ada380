"""Math answers against TRL's `accuracy_reward`, and where math-verify's signals cannot work."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest
from trl.rewards import accuracy_reward as trl_accuracy_reward

from pronghorn.config.errors import ConfigError
from pronghorn.rewards import isolated
from pronghorn.rewards.errors import RewardError
from pronghorn.rewards.math import accuracy_reward, math_reward_func
from pronghorn.rewards.runner import RewardRunner

# completion, solution, whether it is right (None: there is no answer to compare with)
TABLE = [
    (r"So it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}", 1.0),
    (r"So it is \boxed{0.5}.", r"$\frac{1}{2}$", 1.0),
    (r"The answer is $\frac{2}{4}$.", "1/2", 1.0),
    (r"\boxed{2} no, wait: \boxed{3}", "3", 0.0),  # two boxes are two answers
    (r"\boxed{x^2 + 2x + 1}", r"$(x+1)^2$", 1.0),
    (r"\boxed{\{1, 2\}}", r"$\{2, 1\}$", 1.0),
    (r"\boxed{12\text{ cm}}", "$12$", 1.0),
    (r"\boxed{1{,}000}", "1000", 1.0),
    (r"\boxed{(1, 3)}", "$(1, 2)$", 0.0),
    (r"\boxed{7}", "8", 0.0),
    ("no answer in sight", "8", 0.0),
    (r"\boxed{", "8", 0.0),
    ("", "8", 0.0),
    (r"\boxed{1}", "", None),
    (r"\boxed{1}", "no number here", None),
]  # fmt: skip


def test_equals_trl_and_the_truth() -> None:
    texts, solutions, right = (list(column) for column in zip(*TABLE))
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    theirs_logged: dict[str, Any] = {}
    logged: dict[str, Any] = {}
    theirs = trl_accuracy_reward(chats, solutions, log_extra=theirs_logged.__setitem__)
    ours = accuracy_reward(chats, solutions, log_extra=logged.__setitem__)
    assert ours == theirs and logged == theirs_logged
    assert accuracy_reward(texts, solutions) == ours == math_reward_func(texts, answer=solutions)
    assert ours == right


def test_a_solution_too_many_raises() -> None:
    with pytest.raises(ValueError):
        accuracy_reward(["1"], ["1", "2"])


def test_another_thread_raises_and_a_worker_is_the_remedy() -> None:
    raised: list[Exception] = []

    def elsewhere() -> None:
        try:
            accuracy_reward([r"\boxed{1}"], ["1"])
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=elsewhere, name="mine")
    thread.start()
    thread.join()
    assert "thread 'mine'" in str(raised[0]) and "isolated(accuracy_reward)" in str(raised[0])
    runner = RewardRunner(isolated(accuracy_reward))
    got: list[Any] = []

    def in_a_thread() -> None:
        got.append(runner.score(["p"] * 2, [r"\boxed{1}", r"\boxed{2}"], [[1]] * 2, {"solution": ["1", "1"]}).tolist())

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    runner.close()
    assert got == [[[1.0], [0.0]]] and runner.names == ["accuracy_reward"]


def test_without_math_verify_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 'pronghorn\[math\]'"):
        accuracy_reward(["1"], ["1"])


@pytest.mark.slow
def test_an_answer_that_no_signal_interrupts_is_killed_and_named() -> None:
    """One power of huge integers is one long operation in C."""
    monster = r"\boxed{7^{7^{7^{7}}} + 1}"
    reward = isolated(accuracy_reward, timeout=6)
    began = time.monotonic()
    try:
        with pytest.raises(RewardError, match="'accuracy_reward', row 1: ran over its timeout"):
            RewardRunner(reward).score(["p"] * 2, [r"\boxed{1}", monster], [[1]] * 2, {"solution": ["1", "$8^8$"]})
    finally:
        reward.close()
    assert time.monotonic() - began < 40
