"""Kernels compiled ahead are found by the launches that come, whatever their number of tokens; one that cannot be
compiled is said and raised."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_nothing_recorded_begins_nothing() -> None:
    assert warm(Recorded(), torch.device("cpu"), "nothing") is None
    assert 1 <= threads() <= 16
