"""The runner against TRL's contract, and against every way in which others let a faulty reward through."""

from __future__ import annotations

import asyncio
import functools
import logging
import pickle
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from pronghorn.config.errors import ConfigError
from pronghorn.rewards.errors import RewardError
from pronghorn.rewards.runner import RewardRunner, is_async, name_of

PROMPTS = ["a", "b", "c"]
COMPLETIONS = ["one", "three", "fifth"]
IDS = [[1], [2, 3], [4, 5, 6]]


def score(*funcs: Any, columns: dict[str, Any] | None = None, **kwargs: Any) -> torch.Tensor:
    return RewardRunner(list(funcs)).score(PROMPTS, COMPLETIONS, IDS, columns or {}, **kwargs)


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(c)) for c in completions]


async def later(completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0.01)
    return [0.5] * len(completions)


def test_every_function_gets_what_trl_passes() -> None:
    seen: dict[str, Any] = {}

    def spy(**kwargs: Any) -> list[float]:
        seen.update(kwargs)
        kwargs["log_extra"]("extracted", ["x", "y", "z"])
        kwargs["log_metric"]("hits", 0.5)
        return [1, 2, 3]

    state = SimpleNamespace(global_step=7)
    extra: dict[str, list[Any]] = {}
    metrics: dict[str, float] = {}
    columns = {"answer": ["1", "2", "3"], "prompt": PROMPTS, "completion": COMPLETIONS}
    rewards_BF = score(spy, columns=columns, state=state, log_extra=extra.__setitem__, log_metric=metrics.__setitem__)
    assert set(seen) == {
        "prompts", "completions", "completion_ids", "answer", "trainer_state", "log_extra", "log_metric"
    }  # fmt: skip
    assert seen["prompts"] == PROMPTS and seen["completions"] == COMPLETIONS and seen["completion_ids"] == IDS
    assert seen["answer"] == ["1", "2", "3"] and seen["trainer_state"] is state
    assert extra == {"extracted": ["x", "y", "z"]} and metrics == {"hits": 0.5}
    assert rewards_BF.dtype == torch.float32 and rewards_BF.tolist() == [[1.0], [2.0], [3.0]]


def test_equals_trl_for_sync_async_and_none() -> None:
    """`trl.GRPOTrainer._calculate_rewards` on a bare instance is the oracle."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    class Judge:
        async def __call__(self, completions: list[str], **kwargs: Any) -> list[float | None]:
            return [None, 0.25, 1.5]

    def some(completions: list[str], answer: list[str], **kwargs: Any) -> list[float | None]:
        return [None if a == "skip" else len(c) / 7 for c, a in zip(completions, answer)]

    funcs = [length, later, some, Judge()]
    columns = {"answer": ["x", "skip", "y"]}
    accelerator = SimpleNamespace(device=torch.device("cpu"), is_main_process=True)
    trainer = object.__new__(GRPOTrainer)
    loop = asyncio.new_event_loop()
    trainer.__dict__.update(
        accelerator=accelerator, reward_funcs=funcs, environments=None,
        reward_processing_classes=[None] * 4, reward_func_names=[name_of(f) for f in funcs],
        state=SimpleNamespace(global_step=0), args=SimpleNamespace(report_to=[]), async_loop=loop,
        _pending_extra_logs=defaultdict(list), _pending_metrics=defaultdict(list),
    )  # fmt: skip
    import threading

    threading.Thread(target=loop.run_forever, daemon=True).start()
    inputs = [{"prompt": p, "answer": a} for p, a in zip(PROMPTS, columns["answer"])]
    try:
        theirs = trainer._calculate_rewards(inputs, PROMPTS, COMPLETIONS, IDS)
    finally:
        loop.call_soon_threadsafe(loop.stop)
    assert_close(score(*funcs, columns=columns), theirs, rtol=0, atol=0, equal_nan=True)


def test_async_functions_run_together() -> None:
    async def first(completions: list[str], meet: asyncio.Event, **kwargs: Any) -> list[float]:
        await asyncio.wait_for(meet.wait(), 5)
        return [1.0] * 3

    async def second(completions: list[str], meet: asyncio.Event, **kwargs: Any) -> list[float]:
        meet.set()
        return [2.0] * 3

    meet = asyncio.Event()
    runner = RewardRunner([functools.partial(first, meet=meet), functools.partial(second, meet=meet)])
    assert runner.names == ["first", "second"] and all(is_async(f) for f in runner.funcs)
    assert runner.score(PROMPTS, COMPLETIONS, IDS, {}).tolist() == [[1.0, 2.0]] * 3
    runner.close()
    assert runner.score(PROMPTS, COMPLETIONS, IDS, {}).shape == (3, 2)  # close is not the end


def test_async_works_inside_a_running_loop_as_in_a_notebook() -> None:
    async def notebook() -> torch.Tensor:
        return score(later)

    assert asyncio.run(notebook()).tolist() == [[0.5]] * 3


@pytest.mark.parametrize(
    "returned",
    [[1, 2.5, True], (1.0, 2.5, 1.0), np.array([1, 2.5, 1]), torch.tensor([1, 2.5, 1]), [np.float32(1), 2.5, np.True_],
     [torch.tensor(1.0), torch.tensor(2.5, requires_grad=True), 1]],
)  # fmt: skip
def test_what_counts_as_rewards(returned: Any) -> None:
    rewards_BF = score(lambda **_: returned)
    assert rewards_BF.flatten().tolist() == [1.0, 2.5, 1.0] and not rewards_BF.requires_grad


FAULTS: dict[str, tuple[Any, int | None, str]] = {
    "short": ([1.0, 2.0], 2, "returned 2 rewards for 3"),
    "one would broadcast": ([1.0], 1, "returned 1 rewards for 3"),
    "long": ([1.0] * 4, None, "returned 4 rewards for 3"),
    "empty": ([], 0, "returned 0 rewards for 3"),
    "scalar": (1.0, None, "float 1.0"),
    "nothing": (None, None, "NoneType None"),
    "string": ("123", None, "str '123'"),
    "mapping": ({0: 1.0, 1: 2.0, 2: 3.0}, None, "dict"),
    "scalar tensor": (torch.tensor(1.0), None, r"shape \[\]"),
    "column": (torch.ones(3, 1), None, r"shape \[3, 1\]"),
    "digits": ([1.0, "2", 3.0], 1, "str '2', which is not a number"),
    "nested": ([1.0, [2.0], 3.0], 1, r"list \[2.0\]"),
    "complex": ([1.0, 2.0, 3j], 2, "complex"),
    "nan": ([1.0, float("nan"), 3.0], 1, "NaN; give None"),
    "nan array": (np.array([1.0, 2.0, np.nan]), 2, "NaN"),
    "inf": ([float("-inf"), 2.0, 3.0], 0, "-inf, which is not finite"),
    "too large for float32": ([1.0, 1e39, 3.0], 1, "not finite in float32"),
}


@pytest.mark.parametrize("case", FAULTS)
@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_fault_names_function_row_and_completion(case: str, kind: str) -> None:
    returned, row, message = FAULTS[case]

    def faulty(**kwargs: Any) -> Any:
        return returned

    async def faulty_async(**kwargs: Any) -> Any:
        return returned

    faulty_async.__name__ = "faulty"
    with pytest.raises(RewardError, match=message) as caught:
        score(length, faulty if kind == "sync" else faulty_async)
    assert caught.value.function == "faulty" and "'faulty'" in str(caught.value)
    assert caught.value.row == row
    if row is not None:
        assert caught.value.completion == COMPLETIONS[row]
        assert f"row {row}" in str(caught.value) and COMPLETIONS[row] in str(caught.value)


@pytest.mark.parametrize("kind", ["sync", "async", "generator"])
def test_a_raise_is_traced_to_its_row_without_logging_twice(kind: str) -> None:
    logged: list[Any] = []

    def raises(completions: list[str], answer: list[str], log_metric: Any, **kwargs: Any) -> list[float]:
        log_metric("called", 1.0)
        return [float(a) for a in answer]

    async def raises_async(**kwargs: Any) -> list[float]:
        return raises(**kwargs)

    def raises_late(**kwargs: Any) -> Any:
        yield from raises(**kwargs)

    func = {"sync": raises, "async": raises_async, "generator": raises_late}[kind]
    with pytest.raises(RewardError, match=r"raised ValueError: could not convert") as caught:
        score(func, columns={"answer": ["1", "two", "3"]}, log_metric=lambda *a: logged.append(a))
    assert caught.value.row == 1 and caught.value.completion == "three"
    assert isinstance(caught.value.__cause__, ValueError)
    assert len(logged) == 1


def test_a_raise_of_the_whole_batch_names_no_row() -> None:
    def pairs(completions: list[str], **kwargs: Any) -> list[float]:
        if len(completions) > 1:
            raise KeyError("only alone")
        return [0.0]

    with pytest.raises(RewardError, match="on no row alone") as caught:
        score(pairs)
    assert caught.value.row is None


def test_an_interrupt_is_no_fault_of_the_function() -> None:
    def interrupted(**kwargs: Any) -> list[float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(interrupted)


def test_missing_column_and_missing_kwargs_are_said_before_the_call() -> None:
    called = []

    def needs(completions: list[str], solution: list[str], **kwargs: Any) -> list[float]:
        called.append(1)
        return [0.0] * 3

    def narrow(prompts: list[str], completions: list[str]) -> list[float]:
        called.append(1)
        return [0.0] * 3

    with pytest.raises(RewardError, match=r"'needs'.*solution.*columns"):
        score(needs, columns={"answer": ["1", "2", "3"]})
    with pytest.raises(RewardError, match=r"'narrow'.*\*\*kwargs"):
        score(narrow)
    assert not called


def test_all_none_warns_once_with_the_row(caplog: pytest.LogCaptureFixture) -> None:
    def shy(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [1.0, None, None]

    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        rewards_BF = score(shy, columns={"answer": ["1", "2", "3"]})
    assert rewards_BF.isnan().tolist() == [[False], [True], [True]]
    assert len(caplog.records) == 1 and "2 of 3" in caplog.text and "'answer': '2'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        score(shy, length)
    assert not caplog.records


def test_construction_checks() -> None:
    for wrong, message in (([], "empty"), (["org/model"], "str"), ([torch.nn.Linear(2, 1)], "Linear"), ([3], "int")):
        with pytest.raises(ConfigError, match=message):
            RewardRunner(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reward_weights has 1 entries for 2"):
        RewardRunner([length, later], weights=[1.0])
    with pytest.raises(ConfigError, match="names has 1"):
        RewardRunner([length, later], names=["a"])
    assert RewardRunner(length).names == ["length"]
    assert RewardRunner([length, length, lambda **_: []]).names == ["length", "length_2", "<lambda>"]
    assert RewardRunner([length, later], weights=[1, 0.5]).weights_F.tolist() == [1.0, 0.5]


def test_columns_are_checked() -> None:
    with pytest.raises(ConfigError, match="answer has 2 rows"):
        score(length, columns={"answer": ["1", "2"]})
    with pytest.raises(ConfigError, match="'trainer_state' collides"):
        score(length, columns={"trainer_state": [1, 2, 3]})


def test_the_error_pickles_for_workers() -> None:
    error = pickle.loads(pickle.dumps(RewardError("f", "raised", 2, "text")))
    assert (error.function, error.row, error.completion) == ("f", 2, "text") and "row 2" in str(error)
