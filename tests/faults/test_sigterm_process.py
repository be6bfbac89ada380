"""SIGTERM to a real process, at random instants: exit code 0, a whole checkpoint, and the uninterrupted run's end."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.test_kill import assert_same, finish, newest, result
from tests.faults.victim import READY, STEPS, start


def terminate_again_and_again(tmp_path: Path, count: int) -> None:
    rng = random.Random(1)
    seconds = finish(tmp_path / "whole")
    folder = tmp_path / "cut"
    before = -1
    for signals in [1, 3] * count:
        child = start(folder)
        while not (folder / READY).exists():
            assert child.exitcode is None, (folder / "log.txt").read_text()[-3000:]
            time.sleep(0.001)
        time.sleep(0.03 + rng.uniform(0, seconds / 3))  # the handler is set as train() begins
        for _ in range(signals):
            assert child.pid is not None
            with suppress(ProcessLookupError):  # ended already
                os.kill(child.pid, signal.SIGTERM)
            time.sleep(0.005)
        child.join(60)
        # a further signal may meet a process that has saved and is ending, with the handler of before
        assert child.exitcode == 0 or (signals > 1 and child.exitcode == -signal.SIGTERM), (
            folder / "log.txt"
        ).read_text()[-3000:]
        now = newest(folder)
        assert now >= max(before, 0)  # also before the first step there is one: checkpoint-0
        before = now
        if now == STEPS:
            break
    if before < STEPS:
        finish(folder)
    assert_same(result(folder), result(tmp_path / "whole"))


def test_terminated_a_few_times(tmp_path: Path) -> None:
    terminate_again_and_again(tmp_path, 2)


@pytest.mark.slow
def test_terminated_often(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / str(number)).mkdir()
        terminate_again_and_again(tmp_path / str(number), 3)


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_interrupted_it_leaves_whole_checkpoints_and_nothing_else(tmp_path: Path, share: float) -> None:
    """Ctrl-C saves nothing: what was whole stays, no folder is left half written, and the run goes on from there."""
    seconds = finish(tmp_path / "whole")
    folder = tmp_path / "cut"
    child = start(folder)
    while not (folder / READY).exists():
        assert child.exitcode is None, (folder / "log.txt").read_text()[-3000:]
        time.sleep(0.001)
    time.sleep(share * seconds)
    assert child.pid is not None
    with suppress(ProcessLookupError):  # ended already, on a machine that is fast at last
        os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode in (0, 1)
    assert child.exitcode == 0 or "KeyboardInterrupt" in (folder / "log.txt").read_text()
    newest(folder)
    assert not list((folder / "run").glob(".unfinished*"))
    if newest(folder) < STEPS:
        finish(folder)
    assert_same(result(folder), result(tmp_path / "whole"))
