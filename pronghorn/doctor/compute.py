"""What computes: a Triton kernel, the attention paths, the 8-bit optimizer, and which CUDA libraries were loaded."""

from __future__ import annotations

import functools
import os
import site
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from .base import Check, ProbeError, Status, probe

_FLOAT32_TOLERANCE = 1e-5  # Triton's kernel asks for ieee products; a few ulp of float32
_HALF_TOLERANCE = 2e-2  # forward and backward attention in bf16 or fp16, relative in the 2-norm
_OPTIMIZER_TOLERANCE = 0.1  # 8-bit states against 32-bit ones, relative to the step
_WITH_ROOT = "apt-get install gcc python3-dev"
_WITHOUT_ROOT = "conda install -c conda-forge gcc, then export CC=$CONDA_PREFIX/bin/gcc"


def triton_kernel() -> list[Check]:
    """Compile and run a kernel from an empty cache on the GPU; interpret it on the CPU."""
    with tempfile.TemporaryDirectory() as cache:
        try:
            found = probe("triton_kernel", environment={"TRITON_CACHE_DIR": cache})
        except ProbeError as error:
            return [_triton_failure(str(error))]
    version, wrong = found["triton"], found["error"]
    if not wrong <= _FLOAT32_TOLERANCE:
        return [Check("triton", "fail", f"{version}: a kernel's result is wrong by {wrong:.1e}", _reinstall("triton"))]
    if found["device"] == "cpu":
        detail = f"{version}: a kernel is right to {wrong:.0e} in the interpreter, for tests; training uses plain torch"
        return [Check("triton", "ok", detail)]
    detail = f"{version}: a kernel compiled and ran in {found['seconds']:.1f} s, right to {wrong:.0e}"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        slow = f"{detail}; but TRITON_INTERPRET is set, so Pronghorn's kernels would be interpreted on the CPU"
        return [Check("triton", "fail", slow, "unset TRITON_INTERPRET")]
    return [Check("triton", "ok", detail)]


def _triton_failure(message: str) -> Check:
    if "No module named 'triton'" in message:
        return Check("triton", "fail", message, "pip install triton")
    if "C compiler" in message or "Python.h" in message or "gcc" in message or os.environ.get("CC", "\0") in message:
        detail = f"{message} (Triton builds its launcher with a C compiler and Python's headers)"
        return Check("triton", "fail", detail, f"{_WITH_ROOT}; without root: {_WITHOUT_ROOT}")
    return Check("triton", "fail", message, _reinstall("triton"))


def attention() -> list[Check]:
    """Every attention path, run forward and backward and compared with the exact result in float64."""
    try:
        found = probe("attention")
    except ProbeError as error:
        return [Check("attention", "fail", str(error), _reinstall("torch"))]
    paths: dict[str, dict[str, Any]] = found["paths"]
    tolerance = _FLOAT32_TOLERANCE if found["dtype"] == "float32" else _HALF_TOLERANCE
    wrong = [name for name, path in paths.items() if path["runs"] and not path["error"] <= tolerance]
    right = [name for name, path in paths.items() if path["runs"] and name not in wrong]
    checks = [
        Check("attention", "fail", f"{name} runs but is wrong by {paths[name]['error']:.1e}", _reinstall("torch"))
        for name in wrong
    ]
    missing = [name for name, path in paths.items() if not path["runs"]]
    if right:
        worst = max(paths[name]["error"] for name in right)
        detail = f"{', '.join(right)}: right to {worst:.0e} forward and backward in {found['dtype']}"
        if missing and found["device"] == "cpu":
            detail += f"; {', '.join(missing)} need a GPU"
        checks.insert(0, Check("attention", "ok", detail))
    if found["device"] == "cuda":
        status: Status = "warn" if right else "fail"
        checks += [
            Check(
                "attention",
                status,
                f"{name} does not run: {paths[name]['reason']}",
                _reinstall("torch"),
            )
            for name in missing
        ]
        checks += loaded_libraries(found["libraries"])
    return checks


def optimizer() -> list[Check]:
    """bitsandbytes loads, and its 8-bit AdamW makes the steps that torch's AdamW makes."""
    try:
        found = probe("optimizer")
    except ProbeError as error:
        return [Check("bitsandbytes", "fail", str(error), _reinstall("bitsandbytes"))]
    detail = f"{found['bitsandbytes']}: {found['optimizer']} steps as AdamW does to {found['error']:.0e}"
    if not found["error"] <= _OPTIMIZER_TOLERANCE:
        wrong = f"{found['bitsandbytes']}: {found['optimizer']} is off AdamW by {found['error']:.1e} of the step"
        return [Check("bitsandbytes", "fail", wrong, _reinstall("bitsandbytes"))]
    if found["device"] == "cpu":
        detail += "; on the CPU optim='paged_adamw_8bit' becomes adamw_torch"
    return [Check("bitsandbytes", "ok", detail)]


def loaded_libraries(libraries: dict[str, str], roots: list[Path] | None = None) -> list[Check]:
    """Whether the CUDA libraries (name -> folder) that a process really loaded are those of the wheels.

    A library that no wheel brings (torch built against a system toolkit) shadows nothing and is left alone.
    """
    roots = _package_roots() if roots is None else roots
    bundled = _bundled(tuple(roots))
    stray = []
    for name, folder in libraries.items():
        outside = not any(Path(folder).is_relative_to(root) for root in roots)
        if outside and name.split(".so")[0] in bundled:
            stray.append(f"{name} from {folder}")
    if stray:
        detail = f"loaded {'; '.join(stray)} and not the wheels' own"
        return [Check("CUDA libraries", "warn", detail, "unset LD_LIBRARY_PATH LD_PRELOAD")]
    if not libraries:
        return []
    return [Check("CUDA libraries", "ok", f"{', '.join(libraries)}: those that torch came with")]


def _package_roots() -> list[Path]:
    paths = [
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        site.getusersitepackages(),
        *site.getsitepackages(),
    ]
    conda = [sys.prefix] if (Path(sys.prefix) / "conda-meta").is_dir() else []
    return [Path(path).resolve() for path in dict.fromkeys([*paths, *conda])]


@functools.cache
def _bundled(roots: tuple[Path, ...]) -> frozenset[str]:
    """Library names without version (``libcudart``) that the wheels under ``roots`` bring."""
    patterns = ("nvidia/*/lib/lib*.so*", "torch/lib/lib*.so*")
    return frozenset(file.name.split(".so")[0] for root in roots for pattern in patterns for file in root.glob(pattern))


def _reinstall(package: str) -> str:
    return f"pip install --force-reinstall {package}"
