"""NF4 quantize and dequantize: Triton on CUDA, plain PyTorch elsewhere.

Signatures, shapes and errors are those of ``reference/nf4.py``. The two paths differ where bitsandbytes' CUDA and CPU
code differ: in rare codes on a boundary, and in the codes of all-zero blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from pronghorn.kernels.nf4_code import NESTED_BLOCKSIZE, NF4_BLOCKSIZE
from pronghorn.kernels.reference import nf4 as reference


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda:
        return reference
    from pronghorn.kernels import nf4_triton

    return nf4_triton


def quantize_nf4(weight: torch.Tensor, blocksize: int = NF4_BLOCKSIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (uint8 [ceil(numel / 2)]) and block scales (float32 [blocks]) of a float32, float16 or bfloat16 weight."""
    return _path(weight).quantize_nf4(weight, blocksize)


def quantize_scales(
    absmax: torch.Tensor, blocksize: int = NESTED_BLOCKSIZE
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Double quantization of float32 [blocks]: 8-bit codes [blocks], nested scales, and the offset (a scalar)."""
    return _path(absmax).quantize_scales(absmax, blocksize)


def dequantize_nf4(
    codes: torch.Tensor,
    scales: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    *,
    nested_code: torch.Tensor | None = None,
    blocksize: int = NF4_BLOCKSIZE,
    nested_blocksize: int = NESTED_BLOCKSIZE,
    tiled: bool = False,
) -> torch.Tensor:
    """The weight, of ``shape`` in ``dtype``, from codes and double-quantized scales; written to ``out`` where given."""
    return _path(codes).dequantize_nf4(
        codes,
        scales,
        nested_absmax,
        offset,
        shape,
        dtype,
        out,
        nested_code=nested_code,
        blocksize=blocksize,
        nested_blocksize=nested_blocksize,
        tiled=tiled,
    )
