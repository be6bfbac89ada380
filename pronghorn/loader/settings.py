"""What the user's ``device_map`` and ``dtype`` mean on this machine."""

from __future__ import annotations

from typing import Any

import torch

from ..config.errors import ConfigError, nearest
from ..env import Machine, machine

_DTYPES = {
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16,
    "half": torch.float16, "float32": torch.float32, "fp32": torch.float32, "float": torch.float32,
    "float64": torch.float64, "double": torch.float64,
}  # fmt: skip
_CHOSEN = ("auto", "sequential", "balanced", None)


def resolve_device(device_map: Any) -> tuple[torch.device, Machine | None]:
    """The one device that a ``device_map`` names, and what it is (None: the CPU of a machine that has a GPU).

    Args:
        device_map: "auto" (also None, "sequential", "balanced": the chosen GPU, or the CPU where there is none),
            "cpu", "cuda", "cuda:1", an index, a torch.device, or ``{"": one of these}``.

    Raises:
        ConfigError: a map over several devices, an unknown one, or a GPU where there is none.
    """
    if isinstance(device_map, dict):
        if set(device_map) != {""}:
            raise ConfigError(
                f"device_map={device_map!r} spreads the model; Pronghorn keeps it on one device: give 'auto'"
            )
        device_map = device_map[""]
    if device_map is None or (isinstance(device_map, str) and device_map in _CHOSEN):
        here = machine()
        return here.device, here
    try:
        device = torch.device("cuda", device_map) if type(device_map) is int else torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device_map={device_map!r} names no device; give 'auto', 'cpu' or 'cuda:0'") from error
    if device.type == "cpu":
        here = machine()
        return device, here if here.device.type == "cpu" else None
    if device.type != "cuda":
        raise ConfigError(f"device_map={device_map!r} is not offered; give 'auto', 'cpu' or 'cuda:0'")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device_map={device_map!r} needs a GPU, and torch {torch.__version__} sees none; run `pronghorn doctor`, "
            "or give device_map='cpu'"
        )
    here = machine(device.index)
    return here.device, here


def resolve_dtype(dtype: Any, device: torch.device, bf16: bool) -> tuple[torch.dtype, str | None]:
    """The compute dtype, and a line to print where it is not the one that was asked for.

    None (or "auto") is bfloat16 on a GPU that has it, float16 on an older one, float32 on the CPU, where 16-bit
    training is slow and inexact: there bfloat16 and float16 become float32. float64 has to be asked for.

    Raises:
        ConfigError: an unknown dtype, or bfloat16 on a GPU without it.
    """
    if isinstance(dtype, str) and dtype != "auto":
        name = dtype.removeprefix("torch.")
        if name not in _DTYPES:
            close = nearest(name, _DTYPES)
            raise ConfigError(f"dtype={dtype!r} is unknown; {f'did you mean {close!r}? ' if close else ''}"
                              f"known: {', '.join(_DTYPES)}, or None")  # fmt: skip
        dtype = _DTYPES[name]
    if dtype in (None, "auto"):
        if device.type == "cpu":
            return torch.float32, None
        return (torch.bfloat16 if bf16 else torch.float16), None
    if dtype not in _DTYPES.values():
        raise ConfigError(f"dtype={dtype!r} cannot compute; give torch.bfloat16, torch.float16, torch.float32 or None")
    if device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
        short = str(dtype).removeprefix("torch.")
        return torch.float32, f"Pronghorn: dtype={short} becomes float32: there is no GPU in use"
    if device.type == "cuda" and dtype == torch.bfloat16 and not bf16:
        raise ConfigError("dtype=bfloat16 is not native on this GPU; give dtype=None or torch.float16")
    return dtype, None


def dtype_that_trains(asked: Any, dtype: torch.dtype) -> tuple[torch.dtype, str | None]:
    """The dtype of base weights that train themselves, and a line where it is not ``dtype``.

    A loss scaler refuses the gradients of float16 weights, so on a GPU without bfloat16 full fine-tuning is float32.

    Raises:
        ConfigError: float16 was asked for by name.
    """
    if dtype != torch.float16:
        return dtype, None
    if asked not in (None, "auto"):
        raise ConfigError(
            f"dtype={asked!r} with full_finetuning=True: a loss scaler refuses the gradients of float16 weights; give "
            "dtype=torch.float32, or train an adapter"
        )
    return torch.float32, "Pronghorn: full_finetuning=True trains in float32: this GPU has no bfloat16"
