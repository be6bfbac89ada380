"""A 4-bit weight and the B beside it, written by one launch on a GPU: the bits of its parts."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels.nf4_table_triton import TableWriter
from pronghorn.quant.nf4 import NF4Tensor

# The 8B's; rows of one run; rows that are no whole runs; rows that are no multiple of a program's.
SHAPES = [(1024, 4096), (4096, 14336), (64, 64), (33, 104), (70, 192)]
BESIDE = [(0, 0, 0), (32, 0, 32), (96, 32, 32), (40, 16, 8), (5, 1, 3), (64, 0, 0)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_launch_writes_the_bits_of_the_parts(
    shape: tuple[int, int], tiled: bool, beside: tuple[int, int, int], dtype: torch.dtype
) -> None:
    columns, start, rank = beside
    weight = NF4Tensor.quantize(torch.randn(shape, device="cuda", dtype=dtype))
    weight = weight.in_tiles() if tiled else weight
    b_Or = torch.randn(shape[0], rank, device="cuda").to(dtype) if rank else None
    expected = torch.zeros(shape[0], shape[1] + columns, device="cuda", dtype=dtype)
    expected[:, : shape[1]] = weight.dequantize(dtype)
    for scaling in (1.0, 0.3):
        if b_Or is not None:
            expected[:, shape[1] + start : shape[1] + start + rank] = torch.mul(b_Or, scaling)
        write = weight.writer(dtype, shape[1] + columns, start, scaling)
        for apart in (0, 0, 0, 8, 24):  # compiled; bound; bound again; rows that lie apart
            wide = torch.full((shape[0], shape[1] + columns + apart), 7.0, device="cuda", dtype=dtype)
            table = wide[:, : shape[1] + columns]
            write(table, b_Or)
            assert torch.equal(table, expected)
            assert bool((wide[:, shape[1] + columns :] == 7).all())
    assert isinstance(write, TableWriter)
    if dtype != torch.float32 and shape[1] % 64 == 0 and columns % 8 == 0:
        assert all(bound is not None for bound in write._bound.values()), "the fast kernel did not run"


def test_a_table_that_is_not_aligned_is_written_as_well() -> None:
    weight = NF4Tensor.quantize(torch.randn(64, 128, device="cuda", dtype=torch.bfloat16))
    write = weight.writer(torch.bfloat16, 136, 0)
    b_Or = torch.randn(64, 8, device="cuda").bfloat16()
    table = torch.empty(64 * 136 + 1, device="cuda", dtype=torch.bfloat16)[1:].view(64, 136)
    write(table, b_Or)
    assert torch.equal(table[:, :128], weight.dequantize()) and torch.equal(table[:, 128:], b_Or)
