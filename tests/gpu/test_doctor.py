"""The real doctor on a real GPU: it sees the card, and what it runs there is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import torch


def test_doctor_on_this_gpu() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "pronghorn.cli.main", "doctor", "--json", "--device", "0"],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.stdout, done.stderr
    checks = json.loads(done.stdout)["checks"]
    first = {check["name"]: check for check in reversed(checks)}  # of lines with one name, the first
    assert torch.cuda.get_device_name(0) in first["GPU 0"]["detail"]
    assert "compiled and ran" in first["triton"]["detail"] and first["triton"]["status"] == "ok", first["triton"]
    assert "PagedAdamW8bit" in first["bitsandbytes"]["detail"] and first["bitsandbytes"]["status"] == "ok"
    assert first["bf16 on GPU 0"]["status"] == ("ok" if torch.cuda.get_device_capability(0) >= (8, 0) else "warn")
    wrong = [check for check in checks if check["name"] == "attention" and check["status"] == "fail"]
    assert first["attention"]["status"] == "ok" and not wrong, wrong
    assert "math" in first["attention"]["detail"] and "flash" in first["attention"]["detail"]
