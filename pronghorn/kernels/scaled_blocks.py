"""Many small matrices copied into parts of larger ones, each times a factor, by one launch.

A layer's adapters go beside its weights before every step, eleven matrices of a few hundred kilobytes: a GPU copies
them in some ten microseconds, and a host takes forty to sixty for each launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

import torch

from pronghorn.kernels.reference import scaled_blocks as reference
from pronghorn.kernels.reference.scaled_blocks import Block

__all__ = ["Block", "scaled_blocks"]


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return reference
    from pronghorn.kernels import scaled_blocks_triton

    return scaled_blocks_triton


def scaled_blocks(blocks: Sequence[Block]) -> Callable[[], None]:
    """A function that writes ``to = factor * from`` for every ``(from, to, factor)``, now and whenever it is called.

    It holds the tensors; the product is made in float32 and rounded once, as ``torch.mul`` does.

    Args:
        blocks: at least one; matrices of one dtype on one device, ``from`` and ``to`` of one shape, rows contiguous,
            any distance apart. No two ``to`` overlap.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    if not blocks:
        raise ValueError("no blocks; give at least one (from, to, factor)")
    dtype = blocks[0][0].dtype
    for source, target, _ in blocks:
        if source.shape != target.shape or source.dim() != 2 or {source.dtype, target.dtype} != {dtype}:
            raise ValueError(
                f"from is {tuple(source.shape)}, {source.dtype}, to {tuple(target.shape)}, {target.dtype}; give "
                f"matrices of one shape in {dtype}"
            )
        for name, tensor in (("from", source), ("to", target)):
            if tensor.shape[1] > 1 and tensor.stride(1) != 1:
                raise ValueError(f"{name} has strides {tensor.stride()}; make its rows contiguous")
    write: Callable[[], None] = _path(blocks[0][0]).ScaledBlocks(blocks)
    return write
