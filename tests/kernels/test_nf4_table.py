"""A 4-bit weight with its adapter beside it: the reference against its parts, Triton (interpreted) against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.kernels import nf4, nf4_table
from pronghorn.kernels.reference import nf4_table as reference
from pronghorn.quant.nf4 import NF4Tensor

SHAPES = [(64, 64), (7, 11), (33, 130), (70, 128)]
BESIDE = [(0, 0, 0), (8, 0, 8), (24, 8, 8), (5, 1, 3), (12, 0, 0)]
"""Columns beside the weight, where B begins among them, and its rank; 0 for no B."""


def weight_of(shape: tuple[int, int], nested: bool = True) -> tuple[Any, ...]:
    codes, absmax = nf4.quantize_nf4(torch.randn(shape))
    return (codes, *(nf4.quantize_scales(absmax) if nested else (absmax, None, None)))


def written(kind: type[reference.TableWriter], weight: tuple[Any, ...], shape: tuple[int, int], *how: Any) -> Any:
    """The table that ``kind`` writes, and the B that went into it."""
    dtype, (beside, start, rank), scaling = how
    generator = torch.Generator().manual_seed(0)
    b_Or = torch.randn(shape[0], rank, generator=generator).to(dtype) if rank else None
    wide = torch.full((shape[0], shape[1] + beside + 4), 7.0, dtype=dtype)  # what lies beside must stay
    table = wide[:, : shape[1] + beside]
    kind(*weight, shape, dtype, shape[1] + beside, start, scaling)(table, b_Or)
    assert bool((wide[:, shape[1] + beside :] == 7).all())
    return table, b_Or


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_table_is_the_weight_and_b(
    shape: tuple[int, int], beside: tuple[int, int, int], dtype: torch.dtype
) -> None:
    weight = weight_of(shape)
    table, b_Or = written(reference.TableWriter, weight, shape, dtype, beside, 0.75)
    assert torch.equal(table[:, : shape[1]], nf4.dequantize_nf4(*weight, shape, dtype))
    tail = torch.zeros(shape[0], beside[0], dtype=dtype)
    if b_Or is not None:
        tail[:, beside[1] : beside[1] + beside[2]] = b_Or * 0.75
    assert torch.equal(table[:, shape[1] :], tail)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_reference(
    shape: tuple[int, int], beside: tuple[int, int, int], dtype: torch.dtype, nested: bool
) -> None:
    triton_path = pytest.importorskip("pronghorn.kernels.nf4_table_triton")
    weight = weight_of(shape, nested)
    for scaling in (1.0, 0.3):
        ours, _ = written(triton_path.TableWriter, weight, shape, dtype, beside, scaling)
        expected, _ = written(reference.TableWriter, weight, shape, dtype, beside, scaling)
        assert torch.equal(ours, expected)


def test_a_weights_own_writer_keeps_its_settings() -> None:
    weight = NF4Tensor.quantize(torch.randn(6, 64))
    table = torch.empty(6, 72)
    weight.writer(torch.float32, 72, 2, 2.0)(table, torch.ones(6, 4))
    assert torch.equal(table[:, :64], weight.dequantize(torch.float32))
    assert table[:, 64:].tolist() == [[0, 0, 2, 2, 2, 2, 0, 0]] * 6


def test_what_does_not_fit_is_refused() -> None:
    shape = (6, 64)
    write = nf4_table.table_writer(*weight_of(shape), shape, torch.float32, 72, 4)
    good = torch.empty(6, 72)
    for table in (torch.empty(6, 71), torch.empty(5, 72), torch.empty(6, 72, dtype=torch.float16), good.T.T[:, ::2]):
        with pytest.raises(ValueError, match="table: "):
            write(table)
    for b in (torch.empty(5, 4), torch.empty(6, 5), torch.empty(6, 4).half(), torch.empty(4, 6).T):
        with pytest.raises(ValueError, match="b: "):
            write(good, b)
