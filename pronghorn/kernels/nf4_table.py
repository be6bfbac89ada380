"""A 4-bit weight dequantized with its adapter's B beside it, ready for one product with ``[x | x A^T]``.

A training step does this some five hundred times, and where its batch is small the GPU waits for the host: so what does
not change from one time to the next is decided once, and one launch writes all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from pronghorn.kernels.reference import nf4_table as reference


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda:
        return reference
    from pronghorn.kernels import nf4_table_triton

    return nf4_table_triton


def table_writer(codes: torch.Tensor, *args: Any, **options: Any) -> Callable[..., None]:
    """``writer(table_OK, b_Or)`` for one weight; its arguments, and what it writes, are those of the reference."""
    writer: Callable[..., None] = _path(codes).TableWriter(codes, *args, **options)
    return writer
