"""A 4-bit weight with its adapter's B beside it, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pronghorn.kernels.nf4_code import NESTED_BLOCKSIZE, NF4_BLOCKSIZE
from pronghorn.kernels.reference.nf4 import dequantize_nf4


class TableWriter:
    """``writer(table_OK, b_Or)`` writes ``[W | .. s B ..]``: W dequantized, beside it the adapter between zeros.

    Made once for a weight and a layout, called for each product.

    Args:
        codes, scales, nested_absmax, offset, shape, nested_code, blocksize, nested_blocksize, tiled: the weight, as
            for ``dequantize_nf4``; ``shape`` is ``(O, I)``.
        dtype: of the tables.
        width: K, columns of the tables, I at least; columns from I on stand beside W.
        start: column of B, counted from I.
        scaling: s.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        nested_absmax: torch.Tensor | None,
        offset: torch.Tensor | None,
        shape: Sequence[int],
        dtype: torch.dtype,
        width: int,
        start: int = 0,
        scaling: float = 1.0,
        *,
        nested_code: torch.Tensor | None = None,
        blocksize: int = NF4_BLOCKSIZE,
        nested_blocksize: int = NESTED_BLOCKSIZE,
        tiled: bool = False,
    ) -> None:
        self.parts = codes, scales, nested_absmax, offset
        self.nested_code, self.blocksize, self.nested_blocksize = nested_code, blocksize, nested_blocksize
        self.tiled = tiled
        self.shape, self.dtype, self.width, self.start, self.scaling = tuple(shape), dtype, width, start, scaling

    def check(self, table_OK: torch.Tensor, b_Or: torch.Tensor | None) -> None:
        """Refuse what the weight does not fit.

        Raises:
            ValueError: a table of another shape, dtype or with gaps in its rows; a B of other rows, of a rank that does
                not fit beside W, of another dtype, or not contiguous.
        """
        rows, inputs = self.shape
        if table_OK.shape != (rows, self.width) or table_OK.dtype != self.dtype or table_OK.stride(1) != 1:
            raise ValueError(
                f"table: {tuple(table_OK.shape)}, {table_OK.dtype}, strides {table_OK.stride()} given; pass a "
                f"{self.dtype} one of {(rows, self.width)}, rows contiguous"
            )
        if b_Or is None:
            return
        fits = b_Or.shape[0] == rows and self.start + b_Or.shape[1] <= self.width - inputs
        if not fits or b_Or.dtype != self.dtype or not b_Or.is_contiguous():
            raise ValueError(
                f"b: {tuple(b_Or.shape)}, {b_Or.dtype}, strides {b_Or.stride()} given; pass a contiguous {self.dtype} "
                f"one of {rows} rows and at most {self.width - inputs - self.start} columns"
            )

    def dequantize(self, way: Callable[..., torch.Tensor], out_OI: torch.Tensor) -> None:
        """W alone, by one of the two ``dequantize_nf4``."""
        way(
            *self.parts,
            self.shape,
            self.dtype,
            out_OI,
            nested_code=self.nested_code,
            blocksize=self.blocksize,
            nested_blocksize=self.nested_blocksize,
            tiled=self.tiled,
        )

    @torch.no_grad()
    def __call__(self, table_OK: torch.Tensor, b_Or: torch.Tensor | None = None) -> None:
        """Write the table ``[O, K]`` (rows contiguous, any distance apart); ``b_Or`` is contiguous, zeros where None.

        Raises:
            ValueError: see :meth:`check`.
        """
        self.check(table_OK, b_Or)
        inputs = self.shape[1]
        self.dequantize(dequantize_nf4, table_OK[:, :inputs])
        if self.width == inputs:
            return
        tail_OR = table_OK[:, inputs:]
        tail_OR.zero_()
        if b_Or is not None:
            torch.mul(b_Or, self.scaling, out=tail_OR[:, self.start : self.start + b_Or.shape[1]])
