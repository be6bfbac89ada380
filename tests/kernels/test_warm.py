"""Kernels compiled ahead are found by the launches that come, whatever their number of tokens; one that cannot be
compiled is said and raised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.kernels import cuda_source
from pronghorn.kernels import warm as warm_module
from pronghorn.kernels.launch import Recorded
from pronghorn.kernels.warm import threads, warm

ROOT = Path(__file__).parents[2]


def test_what_was_compiled_is_found(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.warm_kernels"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["before"] == 3 and found["after"] == [] and found["real"] == []
    assert len(list(tmp_path.glob("*/*.cubin"))) == 3
    assert found["raised"] == "CompilationError"
    assert "a broken kernel ahead stopped" in found["said"] and "first launch" in found["said"]


class AtOnce(ThreadPoolExecutor):
    """What is submitted runs where it is."""

    def submit(self, run: Any, /, *given: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(run(*given, **named))
        return done


def test_compiling_goes_in_the_order_of_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    order: list[Any] = []

    class Kernel:
        def warmup(self, *args: Any, grid: tuple[int], **options: Any) -> None:
            order.append(args)

    monkeypatch.setattr(warm_module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(cuda_source, "cached_cubin", lambda text, defines, capability: order.append(text))
    recorded, kernel = Recorded(), Kernel()
    recorded.source("a", {}, (9, 0))
    recorded.source("b", {}, (9, 0))
    recorded.launch(kernel, (1,), (1,), {})
    recorded.source("a", {}, (9, 0))  # the same again: noted where it first was
    recorded.launch(kernel, (2,), (2,), {})
    recorded.source("c", {}, (9, 0))
    begun = warm(recorded, torch.device("cpu"), "a walk")
    assert begun is not None
    begun.wait()
    assert order == ["a", "b", (1,), (2,), "c"]


def test_nothing_recorded_begins_nothing() -> None:
    assert warm(Recorded(), torch.device("cpu"), "nothing") is None
    assert 1 <= threads() <= 16
