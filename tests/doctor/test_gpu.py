"""What is said of drivers and GPUs, from made-up probe answers: this needs no GPU."""

from __future__ import annotations

from typing import Any

import pytest

from pronghorn.doctor import compute, gpu
from pronghorn.doctor.base import ProbeError

GIB = 1024**3


def answer(**changes: Any) -> dict[str, Any]:
    card = {
        "index": 0,
        "name": "NVIDIA H200",
        "capability": [9, 0],
        "free": 139 * GIB,
        "total": 140 * GIB,
        "uuid": "aaaa-bbbb",
        "bf16_error": 1.5e-3,
    }
    card |= changes.pop("card", {})
    found = {"torch": "2.11.0+cu130", "cuda_build": "13.0", "hip_build": None, "available": True, "error": None}
    return {**found, "architectures": ["sm_80", "sm_90", "sm_100"], "gpus": [card], **changes}


def diagnose(
    monkeypatch: pytest.MonkeyPatch,
    found: dict[str, Any] | Exception,
    driver: tuple[int, int] | None = (13, 0),
    listing: str | Exception | None = "",
    device: int | None = None,
) -> list[tuple[str, str, str, str | None]]:
    def tell(what: Any) -> Any:
        if isinstance(what, Exception):
            raise what
        return what

    monkeypatch.setattr(gpu, "probe", lambda name: tell(found))
    monkeypatch.setattr(gpu, "driver_cuda_version", lambda: driver)
    monkeypatch.setattr(gpu, "command_output", lambda command: tell(listing))
    monkeypatch.setattr(gpu, "_PROC_GPUS", gpu._PROC_GPUS / "absent")
    return [(check.name, check.status, check.detail, check.remedy) for check in gpu.gpus(device)]


def test_a_healthy_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = diagnose(monkeypatch, answer())
    assert [line[:2] for line in lines] == [("driver", "ok"), ("GPU 0", "ok"), ("bf16 on GPU 0", "ok")]
    assert "NVIDIA H200, sm_90, 139.0 GiB of 140.0 GiB free" in lines[1][2]


@pytest.mark.parametrize(
    ("driver", "build", "status"),
    [((13, 0), "13.0", "ok"), ((13, 2), "13.0", "ok"), ((12, 4), "12.6", "warn"), ((12, 8), "13.0", "fail")],
)
def test_driver_against_build(
    monkeypatch: pytest.MonkeyPatch, driver: tuple[int, int], build: str, status: str
) -> None:
    line = diagnose(monkeypatch, answer(cuda_build=build), driver)[0]
    assert line[1] == status
    if status == "fail":
        assert line[3] is not None and "pip install" in line[3] and "cu126" in line[3]


def test_who_holds_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "GPU-aaaa-bbbb, 4242, 71680, /usr/bin/python3\nGPU-other, 7, 100, x\nGPU-aaaa-bbbb, 9, [N/A], [N/A]\n"
    line = diagnose(monkeypatch, answer(card={"free": 69 * GIB}), listing=listing)[1]
    assert line[1] == "warn" and "python3 (pid 4242, 70.0 GiB)" in line[2] and "pid 7" not in line[2]
    assert "pid 9, unknown memory" in line[2] and "71.0 GiB is taken" in line[2] and "--device" in (line[3] or "")
    hung = diagnose(monkeypatch, answer(), listing=ProbeError("`nvidia-smi` gave no answer within 15 s"))
    assert ("nvidia-smi", "warn") in [entry[:2] for entry in hung], "a hang is said, and the rest still stands"


@pytest.mark.parametrize(
    ("capability", "architectures", "covered"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((12, 0), ["sm_90", "compute_90"], True),
        ((12, 0), ["sm_90a", "sm_100"], False),
        ((12, 1), ["sm_120"], True),
    ],
)
def test_architectures(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: list[str], covered: bool
) -> None:
    found = answer(card={"capability": list(capability)}, architectures=architectures)
    assert diagnose(monkeypatch, found)[1][1] == ("ok" if covered else "fail")


def test_bf16_absent_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert diagnose(monkeypatch, answer(card={"bf16_error": None}))[2][1] == "warn"
    assert diagnose(monkeypatch, answer(card={"bf16_error": 0.3}))[2][1] == "fail"
    assert diagnose(monkeypatch, answer(card={"bf16_error": float("nan")}))[2][1] == "fail"


CPU_BUILD: dict[str, Any] = {"torch": "2.13.0+cpu", "cuda_build": None, "available": False, "gpus": []}


def test_a_gpu_with_a_cpu_build_of_torch_fails_with_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = diagnose(monkeypatch, answer(**CPU_BUILD), listing="NVIDIA L4\n")
    assert line[1] == "fail" and "NVIDIA L4" in line[2] and "CPU build" in line[2]
    assert line[3] == "pip install --force-reinstall torch"
    (old,) = diagnose(monkeypatch, answer(**CPU_BUILD), driver=(12, 4), listing="NVIDIA L4\n")
    assert "cu126" in (old[3] or "")


def test_no_gpu_says_what_runs_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for listing in (None, "", ProbeError("NVIDIA-SMI has failed")):
        lines = diagnose(monkeypatch, answer(**CPU_BUILD), driver=None, listing=listing)
        assert [line[:2] for line in lines] == [("GPU", "ok"), ("CPU", "ok")]
        assert "quickstart" in lines[1][2]
    (asked,) = diagnose(monkeypatch, answer(**CPU_BUILD), driver=None, listing=None, device=0)
    assert asked[1] == "fail" and "--device 0" in asked[2]


@pytest.mark.parametrize(("value", "status"), [("", "warn"), ("-1", "warn"), ("7", "fail")])
def test_hidden_gpus(monkeypatch: pytest.MonkeyPatch, value: str, status: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    (line,) = diagnose(monkeypatch, answer(available=False, gpus=[]), listing="NVIDIA L4\n")
    assert line[1] == status and line[3] == "unset CUDA_VISIBLE_DEVICES"


def test_a_gpu_that_torch_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = answer(available=False, gpus=[], error="driver on your system is too old")
    (line,) = diagnose(monkeypatch, found, driver=(12, 2), listing="NVIDIA L4\n")
    assert line[1] == "fail" and "too old" in line[2] and "cu126" in (line[3] or "")
    (line,) = diagnose(monkeypatch, ProbeError("ImportError: libcudart.so.13: cannot open shared object file"))
    assert line[1] == "fail" and "libcudart.so.13" in line[2] and "pip install" in (line[3] or "")


def attention_lines(monkeypatch: pytest.MonkeyPatch, device: str, dtype: str, **paths: Any) -> list[tuple[str, str]]:
    found = {"device": device, "dtype": dtype, "paths": paths, "libraries": {}}
    monkeypatch.setattr(compute, "probe", lambda name: found)
    return [(check.status, check.detail) for check in compute.attention()]


def test_attention_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    right, absent = {"runs": True, "error": 4e-3}, {"runs": False, "reason": "no kernel"}
    lines = attention_lines(monkeypatch, "cuda", "bfloat16", flash=right, cudnn=absent, math=right)
    assert [status for status, _ in lines] == ["ok", "warn"] and "cudnn does not run: no kernel" in lines[1][1]
    lines = attention_lines(monkeypatch, "cuda", "bfloat16", flash=right, varlen={"runs": True, "error": 0.4})
    assert [status for status, _ in lines] == ["ok", "fail"] and "varlen" in lines[1][1]
    lines = attention_lines(monkeypatch, "cuda", "bfloat16", flash={"runs": True, "error": float("nan")})
    assert [status for status, _ in lines] == ["fail"]
    lines = attention_lines(monkeypatch, "cuda", "bfloat16", flash=absent, math=absent)
    assert {status for status, _ in lines} == {"fail"}
    lines = attention_lines(monkeypatch, "cpu", "float32", flash=right)
    assert [status for status, _ in lines] == ["fail"], "4e-3 is right in bf16 and wrong in float32"


def test_triton_names_the_compiler_that_it_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, environment: Any) -> Any:
        raise ProbeError("RuntimeError: Failed to find C compiler. Please specify via CC environment variable")

    monkeypatch.setattr(compute, "probe", missing)
    (check,) = compute.triton_kernel()
    assert check.status == "fail" and "apt-get install gcc" in (check.remedy or "") and "conda" in (check.remedy or "")


def test_triton_wrong_and_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"triton": "3.6.0", "device": "cuda", "seconds": 1.2, "error": 1e-7}
    monkeypatch.setattr(compute, "probe", lambda name, environment: found)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (check,) = compute.triton_kernel()
    assert check.status == "fail" and check.remedy == "unset TRITON_INTERPRET"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert compute.triton_kernel()[0].status == "ok"
    found["error"] = float("nan")
    assert compute.triton_kernel()[0].status == "fail"


def test_an_optimizer_that_steps_wrongly_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"bitsandbytes": "0.50.2", "device": "cuda", "optimizer": "PagedAdamW8bit", "error": 8e-3}
    monkeypatch.setattr(compute, "probe", lambda name: found)
    assert compute.optimizer()[0].status == "ok"
    found["error"] = 0.7
    assert compute.optimizer()[0].status == "fail"
