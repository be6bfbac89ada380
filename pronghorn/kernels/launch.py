"""Calling a Triton kernel again without binding its arguments anew.

Triton's own call takes 40 to 50 microseconds of Python to bind arguments and look the compiled kernel up; a training
step launches a thousand kernels, and where those 50 ms are not hidden, the GPU waits for them. A compiled kernel can be
called by itself, for what its launch alone costs, if it is the one that Triton would pick: the key below holds what
Triton specializes on (https://triton-lang.org: dtype, divisibility by 16, the value 1, constants).
"""

from __future__ import annotations

from typing import Any

import torch


class Launcher:
    """``launcher(grid, *args, num_warps=...)`` launches ``kernel[grid](*args, num_warps=...)``.

    Args:
        kernel: a ``@triton.jit`` function; in Triton's interpreter every call goes Triton's way.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.constants = [p.is_constexpr for p in getattr(kernel, "params", [])]
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launch; ``args`` are all of the kernel's parameters in order, its constants included."""
        key = self._key(args, options)
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[grid](*args, **options)
            if compiled is not None and hasattr(compiled, "packed_metadata"):
                self.compiled[key] = compiled
            return
        compiled[(*grid, 1, 1)[:3]](*args)

    def _key(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        key: list[Any] = [next(a.get_device() for a in args if isinstance(a, torch.Tensor)), *options.items()]
        for value, constant in zip(args, self.constants):
            if isinstance(value, torch.Tensor):
                key.append((value.dtype, value.data_ptr() % 16 == 0))
            elif constant or not isinstance(value, int) or isinstance(value, bool):
                key.append(value if constant else type(value))
            else:
                key.append((value % 16 == 0, value == 1, -(1 << 31) <= value < 1 << 31))
        return tuple(key)
