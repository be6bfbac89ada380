"""The Triton side of ``nf4_table.py``."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pronghorn.kernels import nf4_triton
from pronghorn.kernels.launch import Bound, Launcher
from pronghorn.kernels.reference import nf4_table as reference

_ROWS = 64


@triton.jit
def _beside_kernel(
    tail_ptr, b_ptr, rows, row_stride, start, rank, width, scaling, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """What stands beside a weight, alone."""
    nf4_triton.write_beside(
        tail_ptr, b_ptr, tl.program_id(0) * ROWS, rows, row_stride, start, rank, width, scaling, ROWS, COLUMNS
    )


_beside = Launcher(_beside_kernel)


class TableWriter(reference.TableWriter):
    """As the reference: one launch where the 16-bit dequantizer takes the weight, else two."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.beside = self.width - self.shape[1]
        self.columns = int(triton.next_power_of_2(self.beside)) if self.beside else 0
        self._bound: dict[tuple[int, int], Bound | None] = {}

    @torch.no_grad()
    def __call__(self, table_OK: torch.Tensor, b_Or: torch.Tensor | None = None) -> None:
        """Write the table ``[O, K]``."""
        self.check(table_OK, b_Or)
        stride, inputs = table_OK.stride(0), self.shape[1]
        rank = 0 if b_Or is None else b_Or.shape[1]
        b = table_OK if b_Or is None else b_Or
        with torch.cuda.device_of(table_OK):
            if (rank, stride) not in self._bound:
                self._bound[rank, stride] = self._bind(rank, stride)
            bound = self._bound[rank, stride]
            if bound is not None and table_OK.data_ptr() % 16 == 0:
                bound(table_OK.view(torch.int32), table_OK[:, inputs:] if self.beside else table_OK, b)
                return
            self.dequantize(nf4_triton.dequantize_nf4, table_OK[:, :inputs])
            if self.beside:
                _beside(
                    (triton.cdiv(self.shape[0], _ROWS),), table_OK[:, inputs:], b, self.shape[0], stride, self.start,
                    rank, self.beside, self.scaling, _ROWS, self.columns, num_warps=4, enable_fp_fusion=False,
                )  # fmt: skip

    def _bind(self, rank: int, stride: int) -> Bound | None:
        """The launch, all but the table, what lies beside the weight in it, and B; None where it takes two."""
        rows, inputs = self.shape
        pad = stride - inputs
        if self.width % 2 or not nf4_triton.takes_half_kernel(
            self.parts[0], self.dtype, rows * inputs, self.blocksize, inputs, pad
        ):
            return None
        groups = nf4_triton.TILE_GROUPS if self.tiled else nf4_triton.HALF_GROUPS
        words = rows * inputs // 8
        blocks = triton.cdiv(words, groups * 8)
        codes, scales, nested_absmax, offset = self.parts
        nested = self.nested_blocksize if nested_absmax is not None and offset is not None else 0
        args = [
            codes.reshape(-1).view(torch.int32),
            *nf4_triton.scales_of(scales, nested_absmax, offset, self.nested_code),
            None, words, inputs // 64 if pad or self.tiled else words, pad // 2, None, None, blocks, rows, stride,
            self.start, rank, self.beside, self.scaling, groups, self.blocksize, nested, self.dtype == torch.bfloat16,
            self.columns,
        ]  # fmt: skip
        tails = triton.cdiv(rows, groups) if self.beside else 0
        return nf4_triton.half_kernel(self.tiled).bind(
            (blocks + tails,), args, (5, 9, 10), num_warps=8, enable_fp_fusion=False
        )
