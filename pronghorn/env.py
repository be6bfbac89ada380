"""What this machine is (the one GPU in use, its memory and dtypes), and every PRONGHORN_* variable, typed."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from .config.errors import ConfigError, reject_unknown

if TYPE_CHECKING:
    import torch

_PREFIX = "PRONGHORN_"
_GIB = 1024**3


@dataclass(frozen=True)
class Settings:
    """The PRONGHORN_* variables; the field ``device`` is read from ``PRONGHORN_DEVICE``.

    Attributes:
        device: index, among the visible GPUs, of the one to use when no argument says which.
    """

    device: int | None = None

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read the variables of ``environ`` (default: the process's).

        Raises:
            ConfigError: an unknown PRONGHORN_* variable (with the nearest name), or a value of the wrong type.
        """
        environ = os.environ if environ is None else environ
        given = {name: value for name, value in environ.items() if name.startswith(_PREFIX)}
        reject_unknown("environment variables", given, [_PREFIX + field.name.upper() for field in fields(cls)])
        text = given.get(_PREFIX + "DEVICE", "").strip()
        if not text:
            return cls()
        if not text.isdecimal():
            raise ConfigError(f"PRONGHORN_DEVICE={text!r} is no GPU index; give 0, 1, ... or unset it")
        return cls(device=int(text))


@dataclass(frozen=True)
class Machine:
    """The device that work runs on, as it is at this moment.

    Attributes:
        device: ``cuda:<index>``, or ``cpu``.
        name: the GPU's or the processor's name.
        capability: CUDA compute capability, (9, 0) for Hopper; None on the CPU.
        total_bytes: memory of the GPU, or of the computer.
        free_bytes: what of it is free now (on a GPU: for every process; on the CPU: what can be had without swapping,
            or the total where the system does not tell).
        bf16: whether the GPU computes in bfloat16 natively (capability 8.0 on); False on the CPU, where training runs
            in float32.
    """

    device: torch.device
    name: str
    capability: tuple[int, int] | None
    total_bytes: int
    free_bytes: int
    bf16: bool

    def describe(self) -> str:
        """One line: ``NVIDIA H200 (cuda:0, sm_90, 139.1 of 139.8 GiB free, bf16)``."""
        memory = f"{self.free_bytes / _GIB:.1f} of {self.total_bytes / _GIB:.1f} GiB free"
        if self.capability is None:
            return f"{self.name} ({self.device}, {memory}, float32)"
        sm = f"sm_{self.capability[0]}{self.capability[1]}"
        return f"{self.name} ({self.device}, {sm}, {memory}, {'bf16' if self.bf16 else 'fp16, no bf16'})"


def machine(device: int | None = None) -> Machine:
    """The machine with the GPU of index ``device`` among the visible ones, or the CPU where no GPU is visible.

    Without ``device``, PRONGHORN_DEVICE chooses, and without that the process's current GPU (``torch.cuda.set_device``,
    index 0 unless set).

    Raises:
        ConfigError: there is no GPU of that index.
    """
    import torch

    chosen = Settings.from_environ().device if device is None else device
    if not torch.cuda.is_available():
        if chosen is not None:
            raise ConfigError(
                f"device={chosen}: no GPU is visible to torch {torch.__version__}; run `pronghorn doctor`"
            )
        return cpu()
    count = torch.cuda.device_count()
    if chosen is not None and not 0 <= chosen < count:
        raise ConfigError(f"device={chosen}: {count} GPU(s) visible; give an index from 0 to {count - 1}")
    index = torch.cuda.current_device() if chosen is None else chosen
    free, total = torch.cuda.mem_get_info(index)
    capability = torch.cuda.get_device_capability(index)
    return Machine(
        torch.device("cuda", index),
        torch.cuda.get_device_name(index),
        capability,
        total,
        free,
        bf16=capability >= (8, 0),
    )


def cpu() -> Machine:
    """The computer itself, whether or not it has a GPU."""
    import torch

    total, free = _host_memory()
    return Machine(torch.device("cpu"), _processor_name(), None, total, free, bf16=False)


def visible_device(index: int) -> str:
    """The value of CUDA_VISIBLE_DEVICES that leaves only the GPU ``index`` of those it lets through now.

    Raises:
        ConfigError: the variable is set and its list has no such index.
    """
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if before is None and index >= 0:
        return str(index)
    visible = [part.strip() for part in (before or "").split(",") if part.strip()]
    if not 0 <= index < len(visible):
        raise ConfigError(f"device={index} is not among CUDA_VISIBLE_DEVICES={before!r}; give an index into that list")
    return visible[index]


def select_device(index: int) -> None:
    """Leave only the GPU ``index`` (among those CUDA_VISIBLE_DEVICES lets through) visible to this process.

    For commands, before any work: transformers' Trainer would spread over every GPU that it sees.

    Raises:
        ConfigError: no such GPU, or CUDA already runs in this process, when the choice would come too late.
    """
    import torch

    if torch.cuda.is_initialized():
        raise ConfigError(
            f"device={index}: CUDA is already running in this process; choose before any tensor is on a GPU"
        )
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(index)
    if torch.cuda.device_count() != 1:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        raise ConfigError(f"device={index}: torch {torch.__version__} sees no such GPU; run `pronghorn doctor`")


def is_bfloat16_supported() -> bool:
    """Whether the GPU in use computes in bfloat16; False without a GPU."""
    return machine().bf16


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def _host_memory() -> tuple[int, int]:
    """(total, available) bytes of main memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return total, int(line.split()[1]) * 1024
    return total, total
