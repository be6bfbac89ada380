"""Metrics between logs, and the history file through crashes and resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from pronghorn.grpo import metrics as module
from pronghorn.grpo.metrics import History, Metrics
from pronghorn.grpo.rollouts import Sample
from pronghorn.grpo.samples import print_samples


def test_means_are_weighted_and_nan_is_left_out() -> None:
    metrics = Metrics()
    metrics.mean("a", 1.0, 3)
    metrics.mean("a", 5.0, 1)
    metrics.mean("a", math.nan, 9)
    metrics.mean("a", math.inf, 0)  # a sum of nothing
    metrics.mean("gone", math.nan)
    for value in (2.0, -1.0, math.nan):
        metrics.low("low", value)
        metrics.high("high", value)
    metrics.last("n", 3)
    metrics.last("n", 4)
    saved = metrics.state()
    expected = {"a": 2.0, "gone": None, "low": -1.0, "high": 2.0, "n": 4.0}
    assert metrics.flush() == expected and metrics.flush() == {}
    metrics.load(json.loads(json.dumps(saved)))
    assert metrics.flush() == expected


def test_what_a_gpu_computes_is_read_once_and_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in the order in which values came, whatever their kinds."""

    def gather() -> Metrics:
        generator = torch.Generator().manual_seed(0)
        metrics, x = Metrics(), torch.randn(40, generator=generator)
        metrics.mean("a", 0.1, 3)
        for i, dtype in enumerate((torch.float32, torch.float64, torch.float32, torch.int64)):
            value = (x[i] * 10).to(dtype)
            metrics.mean("a", value, 7)
            metrics.mean("a", 0.3)
            metrics.add("sum", value, 0.0)
            metrics.low("low", value)
            metrics.high("high", value)
            metrics.last("last", i)
        metrics.mean("a", torch.tensor(torch.nan), 5)
        metrics.high("gone", torch.tensor(torch.nan))
        metrics.add("sum", torch.tensor(1.0, requires_grad=True), 2.0)
        return metrics

    expected = gather().state()
    reads: list[int] = []
    numbers = module._numbers
    monkeypatch.setattr(module, "_computing", lambda tensor: True)
    monkeypatch.setattr(module, "_numbers", lambda values: reads.append(len(values)) or numbers(values))
    metrics = gather()
    assert not reads and metrics._values.keys() == {"a"}, "only what came before the first tensor is there"
    assert metrics.state() == expected and list(metrics.state()) == list(expected)
    assert metrics.flush().keys() == expected.keys() and metrics.flush() == {}
    assert reads[0] == 27 and not any(reads[1:])
    metrics.mean("a", torch.tensor(2.0))
    metrics.load({})
    assert metrics.flush() == {}


def test_history_keeps_what_a_resumed_run_has_behind_it(tmp_path: Path) -> None:
    history = History(tmp_path / "run" / "metrics.jsonl")
    history.start()
    history.append({"step": 1, "x": 1}, {"step": 2, "x": 2})
    history.append({"step": 3, "x": 3})
    with history.path.open("a") as file:
        file.write('{"step": 4, "x"')  # a crash in the middle of a line
    history.start(2)
    history.append({"step": 3, "x": 30})
    assert [json.loads(line) for line in history.path.read_text().splitlines()] == [
        {"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "x": 30}
    ]  # fmt: skip
    history.start()
    assert history.path.read_text() == ""


def test_the_table_shows_prompt_completion_rewards_and_advantage(capsys) -> None:  # type: ignore[no-untyped-def]
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two plus two?"}]
    answer = [{"role": "assistant", "content": "it is [four]"}]
    sample = Sample(3, "train", chat, answer, {"right_reward_func": 2.0, "format": None}, 0.5, {"note": "ok"})
    other = Sample(3, "train", "left out", "unseen", {"right_reward_func": 0.0, "format": 0.0}, -0.5, {})
    print_samples([sample, other], step=3, count=1)
    shown = capsys.readouterr().out
    for text in ("step 3", "two plus", "[four]", "right", "none", "+0.50", "ok"):
        assert text in shown, text
    assert "unseen" not in shown
