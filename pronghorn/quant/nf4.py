"""A weight held in 4 bits: what the linear layer, the decode kernels and the exporters pass around."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from pronghorn.kernels.nf4 import dequantize_nf4, quantize_nf4, quantize_scales
from pronghorn.kernels.nf4_code import NESTED_BLOCKSIZE, NF4_BLOCKSIZE
from pronghorn.kernels.nf4_layout import takes_tiles, to_rows, to_tiles
from pronghorn.kernels.nf4_table import table_writer


@dataclasses.dataclass(frozen=True)
class NF4Tensor:
    """An NF4 weight (QLoRA, arXiv:2305.14314), codes and scales as bitsandbytes makes them.

    Blocks of ``blocksize`` run flat over the flattened weight and take no notice of rows.

    Attributes:
        codes: uint8 [ceil(numel / 2)], two codes a byte, the earlier element in the high nibble; bytes in the weight's
            order unless ``tiled``.
        scales: uint8 [blocks], 8-bit codes of the block scales; float32 [blocks] where the scales themselves were
            never quantized (single quantization, bitsandbytes' ``compress_statistics=False``).
        nested_absmax: float32 [ceil(blocks / nested_blocksize)], or None with single quantization.
        offset: float32 scalar, the mean of the block scales, or None with single quantization.
        shape: shape of the weight, (out features, in features).
        nested_code: float32 [256], the levels of ``scales`` where they are not the standard dynamic map.
        dtype: what :meth:`dequantize` returns unless told otherwise.
        tiled: whether the codes lie in tiles (``kernels/nf4_layout.py``) and not row by row.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    nested_absmax: torch.Tensor | None
    offset: torch.Tensor | None
    shape: tuple[int, ...]
    blocksize: int = NF4_BLOCKSIZE
    nested_blocksize: int = NESTED_BLOCKSIZE
    dtype: torch.dtype = torch.bfloat16
    nested_code: torch.Tensor | None = None
    tiled: bool = False

    @classmethod
    def quantize(cls, weight: torch.Tensor, compute_dtype: torch.dtype | None = None) -> NF4Tensor:
        """Quantize ``weight`` (float32, float16 or bfloat16, any shape) on the device where it lies.

        ``compute_dtype`` is the dtype to dequantize to; the weight's own where None.
        """
        codes, absmax = quantize_nf4(weight)
        scales, nested_absmax, offset = quantize_scales(absmax)
        dtype = weight.dtype if compute_dtype is None else compute_dtype
        return cls(codes, scales, nested_absmax, offset, tuple(weight.shape), dtype=dtype)

    def dequantize(self, dtype: torch.dtype | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weight, of ``shape``, in ``dtype`` (``self.dtype`` where None), written to ``out`` where given."""
        return dequantize_nf4(
            self.codes,
            self.scales,
            self.nested_absmax,
            self.offset,
            self.shape,
            self.dtype if dtype is None else dtype,
            out,
            nested_code=self.nested_code,
            blocksize=self.blocksize,
            nested_blocksize=self.nested_blocksize,
            tiled=self.tiled,
        )

    def writer(self, dtype: torch.dtype, width: int, start: int = 0, scaling: float = 1.0) -> Callable[..., None]:
        """``writer(table_OK, b_Or)`` for this weight: see :func:`pronghorn.kernels.nf4_table.table_writer`."""
        return table_writer(
            self.codes,
            self.scales,
            self.nested_absmax,
            self.offset,
            self.shape,
            dtype,
            width,
            start,
            scaling,
            nested_code=self.nested_code,
            blocksize=self.blocksize,
            nested_blocksize=self.nested_blocksize,
            tiled=self.tiled,
        )

    def to(self, device: torch.device | str | int) -> NF4Tensor:
        """The same weight on ``device``; tensors that already lie there are shared, not copied."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return dataclasses.replace(self, **moved)

    def in_tiles(self) -> NF4Tensor:
        """The same weight with its codes in tiles, where it consists of whole ones; else itself."""
        if self.tiled or not takes_tiles(self.shape, self.blocksize):
            return self
        return dataclasses.replace(self, codes=to_tiles(self.codes, self.shape), tiled=True)

    def in_rows(self) -> NF4Tensor:
        """The same weight with its codes row by row, as bitsandbytes has them."""
        return dataclasses.replace(self, codes=to_rows(self.codes, self.shape), tiled=False) if self.tiled else self

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors it consists of, by field name."""
        fields = ("codes", "scales", "nested_absmax", "offset", "nested_code")
        return {name: getattr(self, name) for name in fields if getattr(self, name) is not None}

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def numel(self) -> int:
        """Elements of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes held, codes and every scale."""
        return sum(t.nbytes for t in self.tensors().values())
