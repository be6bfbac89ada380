"""Environment variables that put other CUDA libraries in front of those that torch's wheels bring."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ..config.errors import ConfigError
from ..env import Settings
from .base import Check

# Libraries that torch's wheels (or its nvidia-* dependencies) bring; the driver's libcuda is not among them.
_SHADOWING = re.compile(
    r"lib(cudart|cudnn|cublas|nccl|nvrtc|cusparse|cusolver|cufft|curand|cupti|nvJitLink|torch|c10)\w*\.so"
)
_SEARCHED = ("", "lib64", "lib")


def cuda_variables(environ: Mapping[str, str] | None = None) -> list[Check]:
    """CUDA_HOME, CUDA_PATH, LD_LIBRARY_PATH, LD_PRELOAD and TRITON_PTXAS_PATH: what each puts before the wheels."""
    environ = os.environ if environ is None else environ
    checks = [_toolkit(name, environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    if environ.get("LD_LIBRARY_PATH"):
        checks.append(_library_path(environ["LD_LIBRARY_PATH"]))
    if environ.get("LD_PRELOAD"):
        checks.append(_preload(environ["LD_PRELOAD"]))
    if environ.get("TRITON_PTXAS_PATH"):
        value = environ["TRITON_PTXAS_PATH"]
        detail = f"{value} replaces the ptxas of Triton's wheel"
        checks.append(Check("TRITON_PTXAS_PATH", "warn", detail, "unset TRITON_PTXAS_PATH"))
    if not checks:
        names = "CUDA_HOME, CUDA_PATH, LD_LIBRARY_PATH and LD_PRELOAD are unset"
        checks.append(Check("CUDA variables", "ok", f"{names}; the wheels need none of them"))
    return checks


def settings() -> list[Check]:
    """The PRONGHORN_* variables: known names, values of the right type."""
    try:
        found = Settings.from_environ()
    except ConfigError as error:
        return [Check("PRONGHORN_*", "fail", str(error), "unset the variable, or spell it as the message says")]
    if found == Settings():
        return []
    return [Check("PRONGHORN_*", "ok", str(found))]


def shadowing(folder: Path) -> list[str]:
    """The file names in ``folder`` that stand for libraries of the wheels, sorted; none for an unreadable folder."""
    try:
        return sorted(name for name in os.listdir(folder) if _SHADOWING.match(name))
    except OSError:  # absent or unreadable: the loader finds nothing there either
        return []


def _toolkit(name: str, value: str) -> Check:
    root = Path(value)
    if not root.is_dir():
        return Check(name, "warn", f"{value} is no folder; builds that look there fail", f"unset {name}")
    found = [library for sub in _SEARCHED for library in shadowing(root / sub)]
    if not found:
        return Check(name, "ok", f"{value} holds no CUDA library; Pronghorn needs no toolkit")
    detail = f"{value} holds {_some(found)}; tools that look there take these and not the wheels' own"
    return Check(name, "warn", detail, f"unset {name}")


def _library_path(value: str) -> Check:
    entries = value.split(":")
    stray = {entry: found for entry in entries if (found := shadowing(Path(entry or ".")))}
    if not stray:
        return Check("LD_LIBRARY_PATH", "ok", f"{value} shadows no library of the wheels")
    held = "; ".join(f"{entry or '.'} holds {_some(found)}" for entry, found in stray.items())
    rest = ":".join(entry for entry in entries if entry and entry not in stray)
    remedy = f"export LD_LIBRARY_PATH={rest}" if rest else "unset LD_LIBRARY_PATH"
    return Check("LD_LIBRARY_PATH", "warn", f"{held}: loaded before the wheels' own", remedy)


def _preload(value: str) -> Check:
    stray = [entry for entry in re.split(r"[:\s]+", value) if _SHADOWING.match(Path(entry).name)]
    if not stray:
        return Check("LD_PRELOAD", "ok", f"{value} shadows no library of the wheels")
    return Check("LD_PRELOAD", "warn", f"{', '.join(stray)}: loaded before the wheels' own", "unset LD_PRELOAD")


def _some(names: list[str], most: int = 4) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
