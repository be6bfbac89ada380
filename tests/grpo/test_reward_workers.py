"""A trainer whose reward functions run in workers: the same run, beside other work, and nothing left when it ends."""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest

from pronghorn.config.errors import ConfigError
from pronghorn.rewards import RewardError, isolated
from pronghorn.rewards.kill import descendants

from .support import adapter_weights, config, letters, trainer


def vowels(completions: list[Any], **kwargs: Any) -> list[float]:
    """`letters`, by value: a worker that imported `support` would import torch."""
    return [sum(ch in "aeiou" for ch in text) / max(len(text), 1) for text in completions]


vowels.__module__ = "__main__"


def held() -> tuple[int, int]:
    return len(descendants(os.getpid())), len(os.listdir("/proc/self/fd"))


def test_a_run_with_workers_is_the_run_without(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", rewards=letters, beta=0.1)
    plain.train()
    before = held()
    workers = trainer(tmp_path / "b", rewards=[isolated(vowels, name="letters")], beta=0.1)
    workers.train()
    assert held() == before, "train() left a worker or a file behind"
    theirs, ours = plain.state.log_history, workers.state.log_history
    for name in ("reward", "reward_std", "loss", "kl", "rewards/letters/mean"):
        assert [log.get(name) for log in ours] == [log.get(name) for log in theirs]
    for name, weight in adapter_weights(workers.model).items():
        assert weight.equal(adapter_weights(plain.model)[name])


@pytest.mark.parametrize("on_error", ["nan", "zero"])
def test_a_failing_completion_leaves_the_others_their_advantages(tmp_path: Path, on_error: str) -> None:
    """The worker dies of the first completion of the group: under `nan` the other three are a group of their own."""
    bad: list[str] = []

    def lengths(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        import os

        return [float(len(c)) if c != trainer_state.bad else os._exit(1) for c in completions]  # type: ignore[func-returns-value]

    made = trainer(
        tmp_path, rewards=lengths, reward_workers=1, reward_timeout=20, reward_on_error=on_error, max_steps=1
    )
    decode = made.processing_class.batch_decode

    def watched(*args: Any, **kwargs: Any) -> list[str]:
        texts: list[str] = decode(*args, **kwargs)
        bad[:] = bad or texts[:1]
        made.state.bad = bad[0]
        return texts

    made.processing_class.batch_decode = watched
    made.train()
    samples, log = made.sampling.samples, made.state.log_history[0]
    assert [s.completion == bad[0] for s in samples] == [True, False, False, False]
    assert log["rewards/lengths/failed"] == 0.25
    rewards = [float(len(s.completion)) for s in samples]
    kept = rewards[1:] if on_error == "nan" else [0.0, *rewards[1:]]
    spread = statistics.stdev(kept) + 1e-4
    expected = [(r - statistics.mean(kept)) / spread for r in kept]
    assert spread > 1.0 and log["reward"] == pytest.approx(statistics.mean(kept))
    assert [s.advantage for s in samples] == pytest.approx(
        [0.0, *expected] if on_error == "nan" else expected, abs=1e-6
    )
    assert samples[0].rewards == {"lengths": None if on_error == "nan" else 0.0}


def test_a_function_that_raises_ends_the_run_without_leftovers(tmp_path: Path) -> None:
    def wrong(completions: list[Any], **kwargs: Any) -> list[float]:
        raise KeyError("answer")

    before = held()
    made = trainer(tmp_path, rewards=wrong, reward_workers=2)
    with pytest.raises(RewardError, match="'wrong', row 0: raised KeyError"):
        made.train()
    assert made.state.global_step == 0 and held() == before


def test_scoring_runs_beside_the_reference_policy(tmp_path: Path) -> None:
    """The worker has its rows before the log-probabilities of the reference are taken, and is asked after."""

    zero = time.time()

    def slow(completions: list[Any], **kwargs: Any) -> list[float]:
        import time

        return [time.time() - zero] * len(completions)

    made = trainer(tmp_path, rewards=slow, reward_workers=1, beta=0.1, max_steps=1)
    annotate = made.loss_step.annotate
    began: list[float] = []

    def watched(*args: Any) -> None:
        began.append(time.time() - zero)
        time.sleep(1.0)
        annotate(*args)

    made.loss_step.annotate = watched  # type: ignore[method-assign]
    made.train()
    assert made.state.log_history[0]["rewards/slow/mean"] < began[0] + 1.0


def test_settings(tmp_path: Path) -> None:
    for bad, message in (
        ({"reward_workers": -1}, "reward_workers=-1 is out of range"),
        ({"reward_workers": 1, "reward_timeout": 0}, "reward_timeout=0"),
        ({"reward_on_error": "skip"}, "reward_on_error='skip' is not supported"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(tmp_path, **bad)
    with pytest.raises(ConfigError, match="reward_timeout=5 has no effect"):
        trainer(tmp_path, reward_timeout=5)
