"""kill -9 anywhere in training and saving: the run goes on from a whole checkpoint and ends as if nothing had been."""

from __future__ import annotations

import json
import random
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from pronghorn.grpo.checkpoint import is_whole, step_of
from pronghorn.rewards.kill import descendants
from tests.faults.victim import CONFIGURATIONS, OPERATIONS, READY, STEPS, start
from tests.grpo.test_overlap import WAITS
from tests.invariant.test_resume import TIMES

Result = tuple[bytes, list[dict[str, Any]], str]


def result(folder: Path) -> Result:
    """Final adapter, metrics without times, and samples, byte by byte."""
    final = folder / "run" / f"checkpoint-{STEPS}"
    assert is_whole(final)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in record.items() if k not in (*TIMES, *WAITS)} for record in records]
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
    wait_until_ready(folder, child)
    began = time.monotonic()
    child.join(120)
    assert child.exitcode == 0, (folder / "log.txt").read_text()[-3000:]
    return time.monotonic() - began


def wait_until_ready(folder: Path, child: BaseProcess) -> None:
    while not (folder / READY).exists():
        assert child.exitcode is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.001)


def assert_gone(pids: list[int], seconds: float = 20.0) -> None:
    """The processes end within that time."""
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline, f"{left} outlived the process that had started them"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def kill_after(folder: Path, seconds: float, **options: Any) -> bool:
    """Start, kill so long after training began; False where it had ended before."""
    child = start(folder, **options)
    wait_until_ready(folder, child)
    time.sleep(seconds)
    assert child.pid is not None
    started = descendants(child.pid)
    child.kill()
    child.join(60)
    assert child.exitcode in (0, -signal.SIGKILL), (folder / "log.txt").read_text()[-3000:]
    assert_gone(started)
    return child.exitcode != 0


def kill_itself(folder: Path, **options: Any) -> bool:
    """Start what kills itself where the options say; False where it ended before."""
    child = start(folder, **options)
    child.join(120)
    assert child.exitcode in (0, -signal.SIGKILL), (folder / "log.txt").read_text()[-3000:]
    return child.exitcode != 0


@dataclass
class Struck:
    """How many kills hit a run before its end."""

    at_random: int = 0
    before_a_change: int = 0
    in_evaluation: int = 0


def survive(
    tmp_path: Path, at_random: int, targeted: int, in_evaluation: int = 0, configuration: str = "plain"
) -> Struck:
    """Kill again and again; returns how many kills struck, all of which lost nothing.

    Args:
        at_random: kills at random instants that have to strike; those that come behind a run's end are tried again.
        targeted: kills before a change to the file system, spread over those of a whole run.
        in_evaluation: kills in the middle of an evaluation.
    """
    rng = random.Random(0)
    seconds = finish(tmp_path / "whole", configuration=configuration)
    operations = int((tmp_path / "whole" / OPERATIONS).read_text())
    expected = result(tmp_path / "whole")
    struck = Struck()
    kills: list[dict[str, int]] = [{"kill_at": 1 + i * operations // targeted} for i in range(targeted)]
    kills += [{"kill_in_evaluation": 1}] * in_evaluation + [{}] * at_random  # without a place: at random
    rng.shuffle(kills)
    folder, before, number = tmp_path / "run-0", -1, 0
    while kills:
        kill, number = kills.pop(), number + 1
        assert number <= 5 * (at_random + in_evaluation) + targeted, f"too many kills came too late: {struck}"
        if kill:
            hit = kill_itself(folder, configuration=configuration, **kill)
        else:
            hit = kill_after(folder, rng.uniform(0, seconds), configuration=configuration)
        struck.before_a_change += hit and "kill_at" in kill
        struck.in_evaluation += hit and "kill_in_evaluation" in kill
        struck.at_random += hit and not kill
        if not hit and "kill_at" not in kill:
            kills.insert(0, kill)
        now = newest(folder)
        assert now >= before, f"kill {number} {kill} lost checkpoint-{before}; checkpoint-{now} is the newest"
        before = now
        if now == STEPS:  # nothing is left to train: it must be the uninterrupted run's end; begin another
            assert_same(result(folder), expected)
            folder, before = tmp_path / f"run-{number}", -1
    if before < STEPS:
        finish(folder, configuration=configuration)
        assert_same(result(folder), expected)
    return struck


def assert_same(found: Result, expected: Result) -> None:
    assert found[0] == expected[0], "the adapter differs from the uninterrupted run's"
    closing = len(expected[1]) - 1  # the record of the whole run, which comes behind the last checkpoint
    assert found[1][:closing] == expected[1][:closing]
    assert found[2] == expected[2]


def test_killed_a_few_times(tmp_path: Path) -> None:
    struck = survive(tmp_path, at_random=3, targeted=3)
    assert struck.at_random == 3 and struck.before_a_change >= 1


def test_killed_within_an_evaluation_with_everything_on(tmp_path: Path) -> None:
    """Generations drawn and scored ahead, rewards in workers, a curriculum and a replay buffer."""
    struck = survive(tmp_path, at_random=1, targeted=0, in_evaluation=1, configuration="everything")
    assert struck.at_random == struck.in_evaluation == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("configuration", list(CONFIGURATIONS))
def test_killed_fifty_times_at_random_and_before_changes_to_files(tmp_path: Path, configuration: str) -> None:
    """Before every change of the plain run, and before each third of the one that has everything on."""
    finish(tmp_path / "count", configuration=configuration)
    targeted = int((tmp_path / "count" / OPERATIONS).read_text())
    everything = configuration == "everything"
    if everything:
        targeted //= 3
    struck = survive(tmp_path, 50, targeted, in_evaluation=5 if everything else 0, configuration=configuration)
    assert struck.at_random == 50
    assert struck.before_a_change >= targeted // 2
    assert struck.in_evaluation == (5 if everything else 0)
