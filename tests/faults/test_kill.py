"""kill -9 anywhere in training and saving: the run goes on from a whole checkpoint and ends as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pronghorn.grpo.checkpoint import is_whole, step_of
from tests.faults.victim import OPERATIONS, READY, STEPS, start
from tests.invariant.test_resume import TIMES

Result = tuple[bytes, list[dict[str, Any]], str]


def result(folder: Path) -> Result:
    """Final adapter, metrics without times, and samples, byte by byte."""
    final = folder / "run" / f"checkpoint-{STEPS}"
    assert is_whole(final)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in record.items() if k not in TIMES} for record in records]
    return (final / "adapter_model.safetensors").read_bytes(), metrics, (folder / "run/completions.jsonl").read_text()


def newest(folder: Path) -> int:
    """Step of the newest checkpoint, -1 for none; whatever has a checkpoint's name must be whole."""
    run = folder / "run"
    named = [path for path in run.iterdir() if path.name.startswith("checkpoint-")] if run.is_dir() else []
    assert all(is_whole(path) for path in named), [path.name for path in named]
    return max((step_of(path) for path in named), default=-1)


def finish(folder: Path, **options: Any) -> float:
    """Run to the end; returns seconds from the beginning of training."""
    child = start(folder, **options)
    while not (folder / READY).exists():
        assert child.exitcode is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.001)
    began = time.monotonic()
    child.join(120)
    assert child.exitcode == 0, (folder / "log.txt").read_text()[-3000:]
    return time.monotonic() - began


def kill_after(folder: Path, seconds: float) -> bool:
    """Start, kill so long after training began; False where it had ended before."""
    child = start(folder)
    while not (folder / READY).exists():
        assert child.exitcode is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.001)
    time.sleep(seconds)
    child.kill()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL), (folder / "log.txt").read_text()[-3000:]
    return child.exitcode != 0


def kill_at(folder: Path, operation: int) -> bool:
    """Start, killed before that change to the file system; False where it ended before."""
    child = start(folder, kill_at=operation)
    child.join(120)
    assert child.exitcode in (0, -signal.SIGKILL), (folder / "log.txt").read_text()[-3000:]
    return child.exitcode != 0


def survive(tmp_path: Path, random_kills: int, targeted: int) -> int:
    """Kill again and again; returns how many kills struck, all of which lost nothing."""
    rng = random.Random(0)
    seconds = finish(tmp_path / "whole")
    operations = int((tmp_path / "whole" / OPERATIONS).read_text())
    expected = result(tmp_path / "whole")
    struck = 0
    kills: list[tuple[str, float]] = [("after", rng.uniform(0, seconds)) for _ in range(random_kills)]
    kills += [("at", 1 + i * operations // targeted) for i in range(targeted)]
    rng.shuffle(kills)
    folder, before = tmp_path / "run-0", -1
    for number, (kind, where) in enumerate(kills):
        hit = kill_after(folder, where) if kind == "after" else kill_at(folder, int(where))
        struck += hit
        now = newest(folder)
        assert now >= before, f"kill {number} ({kind} {where}) lost checkpoint-{before}; checkpoint-{now} is the newest"
        before = now
        if now == STEPS:  # nothing is left to train: it must be the uninterrupted run's end; begin another
            assert_same(result(folder), expected)
            folder, before = tmp_path / f"run-{number + 1}", -1
    if before < STEPS:
        finish(folder)
        assert_same(result(folder), expected)
    return struck


def assert_same(found: Result, expected: Result) -> None:
    assert found[0] == expected[0], "the adapter differs from the uninterrupted run's"
    closing = len(expected[1]) - 1  # the record of the whole run, which comes behind the last checkpoint
    assert found[1][:closing] == expected[1][:closing]
    assert found[2] == expected[2]


def test_killed_a_few_times(tmp_path: Path) -> None:
    assert survive(tmp_path, random_kills=4, targeted=4) >= 4


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_fifty_times_at_random_and_before_every_change_to_a_file(tmp_path: Path) -> None:
    finish(tmp_path / "count")
    operations = int((tmp_path / "count" / OPERATIONS).read_text())
    assert survive(tmp_path, random_kills=60, targeted=operations) >= 50 + operations // 2
