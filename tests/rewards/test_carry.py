"""Functions that no module has reach another process: lambdas, closures, a script's and a notebook's own."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.rewards import isolated
from pronghorn.rewards.carry import pack

ROOT = Path(__file__).parents[2]


def call(func: Any, **kwargs: Any) -> Any:
    reward = isolated(func, timeout=20)
    try:
        return reward(**kwargs)
    finally:
        reward.close()


def test_lambdas_closures_and_partials() -> None:
    scale, table = 3, {"a": 1.0}

    def inner(text: str) -> float:
        return table.get(text, 0.0) * scale

    def outer(completions: list[str], bonus: float = 0.5, *, factor: float = 2.0, **kwargs: Any) -> list[float]:
        return [inner(c) * factor + bonus + math.floor(0.9) for c in completions]

    assert call(outer, completions=["a", "b"]) == [6.5, 0.5]
    assert call(functools.partial(outer, factor=1.0), completions=["a"]) == [3.5]
    assert call(lambda completions, **kwargs: [float(len(c)) for c in completions], completions=["abc"]) == [3.0]


def test_recursion_and_functions_that_know_each_other() -> None:
    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n > 0 and even(n - 1)

    def reward(completions: list[str], **kwargs: Any) -> list[bool]:
        return [even(len(c)) for c in completions]

    assert call(reward, completions=["ab", "c"]) == [1.0, 0.0]


def test_classes_made_on_the_spot() -> None:
    class Base:
        weight = 2.0

        def of(self, text: str) -> float:
            return len(text) * self.weight

    class Judge(Base):
        def __init__(self, bonus: float) -> None:
            self.bonus = bonus

        def of(self, text: str) -> float:
            return super().of(text) + self.bonus + self.one

        @property
        def one(self) -> float:
            return self.same(1.0)

        @staticmethod
        def same(value: float) -> float:
            return value

        def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
            return [self.of(c) for c in completions]

    assert call(Judge(0.25), completions=["abc"]) == [7.25]


def test_async_and_generators_by_value() -> None:
    import asyncio

    async def later(completions: list[str], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    def one_by_one(completions: list[str], **kwargs: Any) -> Any:
        yield from (2.0 for _ in completions)

    assert call(later, completions=["a"]) == [1.0] and call(one_by_one, completions=["a"]) == [2.0]


def test_a_script_and_its_globals_without_running_it_again(tmp_path: Path) -> None:
    """No `if __name__ == "__main__"` guard: a second run of the script would print twice, or start workers for ever."""
    script = tmp_path / "train.py"
    script.write_text(
        "import re\nfrom collections import Counter\nfrom pronghorn.rewards import isolated\n"
        "PATTERN = re.compile(r'\\d+')\nseen = 0\nprint('once')\n"
        "def number(text):\n    return float(PATTERN.search(text).group())\n"
        "def reward(completions, **kwargs):\n    global seen\n    seen += 1\n"
        "    return [number(c) + seen + Counter(c)['x'] for c in completions]\n"
        "reward_in_worker = isolated(reward)\n"
        "print(reward_in_worker(completions=['a 4', 'xx 5']), reward_in_worker(completions=['1']))\n"
        "reward_in_worker.close()\n"
    )
    ran = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, timeout=60
    )
    assert ran.stderr == "" and ran.stdout.splitlines() == ["once", "[5.0, 8.0] [3.0]"]


def test_an_attribute_named_like_a_global_does_not_carry_it() -> None:
    namespace: dict[str, Any] = {"lock": threading.Lock(), "__name__": "__main__"}
    code = compile("def reward(completions, **kwargs):\n    return [c.lock for c in completions]\n", "cell", "exec")
    exec(code, namespace)  # noqa: S102 - how a notebook defines a function
    assert call(namespace["reward"], completions=[SimpleNamespace(lock=1.0)]) == [1.0]


def test_what_cannot_travel_is_said_with_the_remedy() -> None:
    lock = threading.Lock()

    def locked(completions: list[str], **kwargs: Any) -> list[float]:
        with lock:
            return [1.0]

    class Slotted:
        __slots__ = ("x",)

        def __call__(self, **kwargs: Any) -> list[float]:
            return [1.0]

    with pytest.raises(ConfigError, match=r"'locked' cannot be sent.*lock.*Move it.*module.*reward_workers=0"):
        isolated(locked)
    with pytest.raises(ConfigError, match="__slots__"):
        isolated(Slotted())
    with pytest.raises(ConfigError, match="cannot be sent"):
        isolated(functools.partial(print, file=sys.stdout), name="prints")


def test_a_cuda_tensor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGPU(torch.Tensor):
        is_cuda = True  # type: ignore[assignment]

    weights = torch.ones(2).as_subclass(OnGPU)
    with pytest.raises(ConfigError, match="CUDA tensor"):
        pack(lambda completions, **kwargs: [float(weights[0])], "judge")
