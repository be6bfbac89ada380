"""Warnings on made-up histories: each comes where it is due, once, and none on a healthy run."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from pronghorn.config.errors import ConfigError
from pronghorn.config.watch import WatchConfig
from pronghorn.grpo.watch import Watch
from pronghorn.report import build
from pronghorn.stats import wilson_interval
from tests.grpo.support import config, trainer

HISTORY = Path(__file__).parent / "healthy_history.jsonl"


def healthy(steps: int = 60, seed: int = 0) -> list[dict[str, Any]]:
    """A run that learns, as logs: reward and accuracy rise, entropy halves, some groups have no spread."""
    draw = random.Random(seed)
    logs: list[dict[str, Any]] = []
    for step in range(steps + 1):
        done = step / steps
        if step % 10 == 0:
            logs.append(accuracy(0.4 + 0.4 * done + draw.gauss(0, 0.022)))
        if step:
            logs.append(
                {
                    "reward": 1 + done + draw.gauss(0, 0.2),
                    "frac_reward_zero_std": min(1.0, 0.2 + 0.4 * done + draw.random() * 0.3),
                    "entropy": 0.6 - 0.35 * done + draw.gauss(0, 0.05),
                    "completions/clipped_ratio": draw.random() * 0.2,
                    "sampling/sampling_logp_difference/mean": 0.02 + 0.02 * draw.random(),
                }
            )
    return logs


def accuracy(share: float, problems: int = 500) -> dict[str, Any]:
    low, high = wilson_interval(round(share * problems), problems)
    return {"eval_accuracy": share, "eval_accuracy_low": low, "eval_accuracy_high": high}


def warnings(logs: list[dict[str, Any]], **thresholds: Any) -> list[str]:
    watch = Watch(WatchConfig(**thresholds))
    return [line for log in logs for line in watch.see(log)]


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_is_left_alone(seed: int) -> None:
    assert warnings(healthy(seed=seed)) == []


def test_the_study_s_own_runs_are_left_alone() -> None:
    """What GRPO on the shipped model logged with the quickstart's settings, three seeds (docs/learning.md)."""
    runs: dict[int, list[dict[str, Any]]] = {}
    for line in HISTORY.read_text().splitlines():
        record = json.loads(line)
        runs.setdefault(record.pop("seed"), []).append(record)
    assert len(runs) >= 3 and all(sum("reward" in r for r in run) >= 40 for run in runs.values())
    assert {seed: warnings(run) for seed, run in runs.items()} == {seed: [] for seed in runs}


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "frac_reward_zero_std": ({"value": 0.9}, "8\\d% of the groups have no spread.*num_generations"),
    "entropy": ({"value": 0.004}, "entropy collapsed from 0.5\\d+ to 0.0\\d+ nats.*learning rate"),
    "completions/clipped_ratio": (
        {"value": 0.75},
        "[56]\\d% of the completions hit max_completion_length.*mask_truncated",
    ),
    "sampling/sampling_logp_difference/mean": (
        {"value": 0.3},
        "differ by 0.1\\d+ nats a token.*importance_sampling_correction",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_each_sign_is_said_once_and_alone(name: str) -> None:
    given, message = CASES[name]
    logs = healthy()
    for log in logs[len(logs) // 2 :]:
        if name in log:
            log[name] = given["value"]
    said = warnings(logs)
    assert len(said) == 1
    assert re.search(message, said[0]), said


@pytest.mark.parametrize("name", CASES)
def test_a_single_bad_log_is_no_sign(name: str) -> None:
    logs = healthy()
    place = [i for i, log in enumerate(logs) if name in log][40]
    logs[place][name] = CASES[name][0]["value"]
    assert warnings(logs) == []


def fooled(fall: float, rise: float, problems: int = 500) -> list[dict[str, Any]]:
    """Accuracy goes from 0.8 by ``-fall`` and reward from 1 by ``rise`` over 40 steps."""
    draw = random.Random(3)
    logs: list[dict[str, Any]] = [accuracy(0.8, problems)]
    for step in range(1, 41):
        logs.append({"reward": 1 + rise * step / 40 + draw.gauss(0, 0.1)})
        if step % 10 == 0:
            logs.append(accuracy(0.8 - fall * step / 40, problems))
    return logs


def test_reward_up_and_accuracy_down_is_said_once_with_the_numbers() -> None:
    said = warnings(fooled(fall=0.2, rise=1.0))
    assert len(said) == 1 and "fell from 80.0% to 70.0%" in said[0] and "reward_weights" in said[0]


@pytest.mark.parametrize(
    "fall, rise, problems",
    [
        (0.2, 0.0, 500),  # both could be noise or harm, but the reward does not hide it
        (0.2, -1.0, 500),
        (0.03, 1.0, 500),  # within what 500 problems show
        (0.2, 1.0, 20),  # and 20 show little
        (-0.1, 1.0, 500),
    ],
)
def test_accuracy_is_not_cried_over(fall: float, rise: float, problems: int) -> None:
    assert warnings(fooled(fall, rise, problems)) == []


def test_chance_alone_seldom_warns() -> None:
    """Ten evaluations of the same 500 problems, of which the model solves some nearly always, some nearly never and a
    fifth by chance, while the reward rises: under 1% of 300 runs are warned about."""
    alarms = 0
    for seed in range(300):
        draw = random.Random(seed)
        chances = [draw.choice((0.02, 0.98, 0.98, 0.98, 0.5)) for _ in range(500)]
        logs: list[dict[str, Any]] = []
        for step in range(1, 101):
            logs.append({"reward": 1 + step / 100 + draw.gauss(0, 0.1)})
            if step % 10 == 0:
                logs.append(accuracy(sum(draw.random() < chance for chance in chances) / 500))
        alarms += bool(warnings(logs))
    assert alarms <= 2


def test_missing_and_unusable_values_are_passed_over() -> None:
    assert warnings([{"entropy": None, "reward": math.nan, "frac_reward_zero_std": "all"}] * 30) == []


@pytest.mark.parametrize(
    "given, message",
    [({"clip": 0.5}, "clip.*did you mean"), ({"clipped": 1.5}, "clipped=1.5"), ({"window": 1}, "window=1"),
     ({"drift": 0.0}, "drift=0.0")],
)  # fmt: skip
def test_bad_thresholds_are_refused_by_the_config(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, watch=given)


def test_a_run_prints_keeps_and_reports_its_warning_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def flat(completions: list[Any], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4, "watch": {"window": 2}}
    trainer(tmp_path, rewards=flat, **settings).train()
    out = capsys.readouterr().out
    assert out.count("Pronghorn warning at step 2: 100% of the groups have no spread") == 1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "no spread" in line.get("warning", "")] == [2]
    page = build(tmp_path).read_text()
    assert "Warnings of this run" in page and "Step 2: 100% of the groups have no spread" in page
    # a resumed run knows what was said
    trainer(tmp_path, rewards=flat, **settings).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "no spread" not in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "no spread" in line.get("warning", "")] == [2]


def test_it_can_be_turned_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(
        tmp_path, rewards=lambda completions, **kw: [1.0] * len(completions), max_steps=3,
        watch={"window": 2, "enabled": False},
    )  # fmt: skip
    made.train()
    assert "warning" not in capsys.readouterr().out
