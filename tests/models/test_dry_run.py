"""The dry run foresees every kernel that real steps ask for, under Triton's own keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pronghorn.rollout.native.decoder import BUCKETS
from pronghorn.rollout.native.prefill import SIZES
from tests.helpers import tiny_llama

ROOT = Path(__file__).parents[2]


ATTENTION = ["step_attention.cu", "step_attention_many.cu"]
KERNELS = {
    "nf4": ["nf4_matmul.cu", "nf4_wide.cu", "low_rank.cu", *ATTENTION, "_dequantize_tiles_kernel", "_ordered_matmul"],
    "bf16": ["_ordered_matmul", "low_rank.cu", *ATTENTION],
}
"""What the products of each kind of base launch, and attention."""


@pytest.mark.parametrize("kind", KERNELS)
def test_every_kernel_of_real_steps_was_foreseen(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("triton")
    folder = tiny_llama(tmp_path, hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=16384)
    environment = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.models.recorded_walk", str(folder), kind]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found["asked"]) > 20 and found["decoded"] == list(BUCKETS)
    assert found["prompts by graphs"] == [SIZES[0]]
    for kernel in KERNELS[kind]:
        assert any(key.startswith(f"{kernel} ") for key in found["asked"]), kernel
    assert any(key.startswith("_few_rows ") for key in found["asked"])
    assert any(key.startswith("_ordered_matmul ") and "tensordesc" in key for key in found["asked"]), "copy engine"
    assert sorted(set(found["asked"]) - set(found["foreseen"])) == []
