"""The driver against torch's CUDA build, and each GPU: capability, memory, who holds it, bf16."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

from ..env import cpu
from .base import Check, ProbeError, command_output, gib, probe

_HELD_SHARE = 0.1  # more than this share of a GPU in other hands is worth a warning
_BF16_TOLERANCE = 1e-2  # bf16 keeps 8 bits: one rounding of the output is at most 2^-8 relative
_CUDA_12_WHEELS = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
_CUDA_13_WHEELS = "pip install --force-reinstall torch"
_PROC_GPUS = Path("/proc/driver/nvidia/gpus")
_LOOK = "nvidia-smi; then `pronghorn doctor` again"


def gpus(device: int | None = None) -> list[Check]:
    """Driver, torch's build and every visible GPU; ``device`` is the index that the user asked for, if any."""
    try:
        found = probe("gpu")
    except ProbeError as error:
        return [Check("torch", "fail", f"torch does not load or CUDA does not start: {error}", _CUDA_13_WHEELS)]
    driver = driver_cuda_version()
    if found["available"]:
        checks = [_driver(found, driver)]
        held: dict[str, list[str]] = {}
        try:
            held = _holders()
        except ProbeError as error:
            checks.append(Check("nvidia-smi", "warn", f"who holds the GPUs is not known: {error}", "nvidia-smi"))
        for gpu in found["gpus"]:
            checks += [_gpu(gpu, found["architectures"], held), _bf16(gpu)]
        return checks
    return _without_gpu(found, driver, device)


def driver_cuda_version() -> tuple[int, int] | None:
    """The newest CUDA version that the installed NVIDIA driver runs; None without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if library.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def present() -> list[str]:
    """Names of the NVIDIA GPUs in the machine, whether or not torch can use them."""
    try:
        listing = command_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"])
    except ProbeError:
        listing = None  # a driver that does not answer: the kernel's own list follows
    if listing is not None:
        return [line.strip() for line in listing.splitlines() if line.strip()]
    return [f"GPU {entry.name}" for entry in sorted(_PROC_GPUS.iterdir())] if _PROC_GPUS.is_dir() else []


def _driver(found: dict[str, Any], driver: tuple[int, int] | None) -> Check:
    text = f"torch {found['torch']}"
    if found["hip_build"]:
        detail = f"{text} is built for ROCm {found['hip_build']}, which is untested"
        return Check("driver", "warn", detail, _CUDA_13_WHEELS)
    build = tuple(int(part) for part in found["cuda_build"].split(".")[:2])
    text += f" is built for CUDA {found['cuda_build']}"
    if driver is None:
        return Check("driver", "warn", f"{text}; the driver's version could not be read", "nvidia-smi")
    text += f", the driver runs up to {driver[0]}.{driver[1]}"
    if driver[0] < build[0]:
        return Check("driver", "fail", text, _wheels_for(driver))
    if driver < build:
        # Within one major version CUDA's minor-version compatibility holds, for binaries but not for PTX.
        return Check("driver", "warn", f"{text}: it works by minor-version compatibility", "update the NVIDIA driver")
    return Check("driver", "ok", text)


def _gpu(gpu: dict[str, Any], architectures: list[str], held: dict[str, list[str]]) -> Check:
    name = f"GPU {gpu['index']}"
    major, minor = gpu["capability"]
    free, total = gpu["free"], gpu["total"]
    detail = f"{gpu['name']}, sm_{major}{minor}, {gib(free)} of {gib(total)} free"
    if not _covered(major, minor, architectures):
        return Check(
            name, "fail", f"{detail}: torch has no code for it, only {' '.join(architectures)}", _CUDA_12_WHEELS
        )
    holders = held.get(gpu["uuid"].removeprefix("GPU-"), [])
    if holders:
        detail += f"; held by {', '.join(holders)}"
    if total - free > _HELD_SHARE * total:
        remedy = "end those processes, or choose another GPU with --device"
        return Check(name, "warn", f"{detail}: {gib(total - free)} is taken", remedy)
    return Check(name, "ok", detail)


def _covered(major: int, minor: int, architectures: list[str]) -> bool:
    """Whether binaries for the GPU's major version at its minor or below are there, or PTX of any version below."""
    for entry in architectures:
        kind, _, digits = entry.partition("_")
        digits = digits.rstrip("af")
        if not digits.isdecimal():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if (kind == "sm" and built[0] == major and built[1] <= minor) or (
            kind == "compute" and built <= (major, minor)
        ):
            return True
    return not architectures


def _bf16(gpu: dict[str, Any]) -> Check:
    name, error = f"bf16 on GPU {gpu['index']}", gpu["bf16_error"]
    if error is None:
        return Check(
            name, "warn", f"{gpu['name']} has none (it came with sm_80)", "pass dtype=torch.float16 to from_pretrained"
        )
    if not error <= _BF16_TOLERANCE:
        return Check(name, "fail", f"a bf16 product is wrong by {error:.1e}", _LOOK)
    return Check(name, "ok", f"a bf16 product is right to {error:.1e}")


def _without_gpu(found: dict[str, Any], driver: tuple[int, int] | None, device: int | None) -> list[Check]:
    names = present()
    version = f"torch {found['torch']}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if device is not None:
        listed = f"{len(names)} in the machine" if names else "none in the machine"
        return [Check("GPU", "fail", f"--device {device}: torch sees no such GPU ({listed})", "leave --device out")]
    if names and not found["cuda_build"]:
        detail = f"{names[0]} is here, but {version} is a CPU build"
        return [Check("GPU", "fail", detail, _wheels_for(driver))]
    if names and hidden is not None:
        status = "warn" if hidden.strip() in ("", "-1", "NoDevFiles") else "fail"
        detail = f"CUDA_VISIBLE_DEVICES={hidden!r} hides {', '.join(names)}"
        return [Check("GPU", status, detail, "unset CUDA_VISIBLE_DEVICES")]  # type: ignore[arg-type]
    if names:
        detail = f"{names[0]} is here, but {version} cannot use it: {found['error'] or 'no reason given'}"
        too_old = driver is not None and found["cuda_build"] and driver[0] < int(found["cuda_build"].split(".")[0])
        return [Check("GPU", "fail", detail, _wheels_for(driver) if too_old else _LOOK)]
    return [
        Check("GPU", "ok", f"none: {version} runs on the CPU"),
        Check("CPU", "ok", f"{cpu().describe()}: the quickstart, the tests and small models run"),
    ]


def _wheels_for(driver: tuple[int, int] | None) -> str:
    if driver is not None and driver[0] < 13:
        return f"{_CUDA_12_WHEELS} (or update the driver to 580 or later)"
    return _CUDA_13_WHEELS


def _holders() -> dict[str, list[str]]:
    """``process (pid, memory)`` of every compute process, by the GPU's UUID; empty where nvidia-smi is absent.

    Raises:
        ProbeError: nvidia-smi failed or hung.
    """
    query = [
        "nvidia-smi",
        "--query-compute-apps=gpu_uuid,pid,used_memory,process_name",
        "--format=csv,noheader,nounits",
    ]
    listing = command_output(query)
    holders: dict[str, list[str]] = {}
    for line in (listing or "").splitlines():
        parts = [part.strip() for part in line.split(",", 3)]
        if len(parts) == 4:
            uuid, pid, memory, process = parts
            used = gib(int(memory) * 1024**2) if memory.isdecimal() else "unknown memory"
            holders.setdefault(uuid.removeprefix("GPU-"), []).append(f"{Path(process).name} (pid {pid}, {used})")
    return holders
