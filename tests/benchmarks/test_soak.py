"""The soak's watch sees what grows, and a short soak of the shipped model is flat in all that does not warm up."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.soak import Usage, growth, soak
from pronghorn.recipes.quickstart import shipped_model


def test_growth_is_named() -> None:
    first = Usage(step=20, seconds=1.0, rss=1000, gpu=500, files=9, threads=6, children=0)
    assert growth([first, dataclasses.replace(first, step=40, rss=1020, gpu=510)], 0.02) == []
    grown = dataclasses.replace(first, step=40, rss=1021, gpu=400, files=10, threads=7, children=1)
    assert growth([first, grown], 0.02) == [
        "rss grew by 2.10% from step 20", "files: 9 at step 20, 10 later", "threads: 6 at step 20, 7 later",
        "children: 0 at step 20, 1 later",
    ]  # fmt: skip


def test_growth_that_the_end_of_the_run_gives_back_is_seen() -> None:
    first = Usage(step=20, seconds=1.0, rss=1000, gpu=500, files=9, threads=6, children=2, children_rss=100)
    within = dataclasses.replace(first, step=40, threads=7, children_rss=103)
    behind = dataclasses.replace(first, step=60, threads=4, children=0, children_rss=0)
    assert growth([first, within, behind], 0.02) == [
        "children_rss grew by 3.00% from step 20", "threads: 6 at step 20, 7 later"
    ]  # fmt: skip


def test_usage_counts() -> None:
    before = Usage.now(1, 0.0)
    held, kept, go = bytearray(os.urandom(1 << 20)) * 256, open(os.devnull), threading.Event()  # noqa: SIM115
    thread = threading.Thread(target=go.wait)
    thread.start()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        after = Usage.now(2, 0.0)
    finally:
        go.set()
        thread.join()
        child.communicate(b"\n")
        kept.close()
    assert after.rss - before.rss > len(held) * 0.9
    assert (
        after.files - before.files == 2
        and after.threads - before.threads == 1
        and after.children == before.children + 1
        and after.children_rss > before.children_rss + (1 << 20)
    )


@pytest.mark.timeout(280)
def test_forty_steps_leave_nothing_behind(tmp_path: Path) -> None:
    """Files, threads and processes exactly; memory within what forty steps of warming up may take (1,000 steps in
    ``make soak`` are held to 2%)."""
    first, *_, last = soak(str(shipped_model()), 40, str(tmp_path), length=8)
    assert (first.step, last.step) == (20, 40)
    assert growth([first, last], 0.05) == []


@pytest.mark.timeout(280)
def test_sixty_steps_with_threads_and_workers_leave_nothing_behind(tmp_path: Path) -> None:
    """Generations drawn ahead, and six reward functions with a worker each, counted within the run and behind it."""
    before = Usage.now(0, 0.0)
    first, within, behind = soak(str(shipped_model()), 60, str(tmp_path), length=4, everything=True)
    assert (first.step, within.step, behind.step) == (20, 40, 60)
    assert first.children == within.children == before.children + 6
    assert behind.children == before.children and behind.threads <= first.threads and behind.files <= first.files
    assert growth([first, within, behind], 0.05) == []
