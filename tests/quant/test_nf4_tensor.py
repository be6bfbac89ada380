"""NF4Tensor: what it holds, how much that is, and that it moves whole."""

from __future__ import annotations

import pytest
import torch

from pronghorn.quant.nf4 import NF4Tensor


def test_quantize_and_dequantize() -> None:
    weight = torch.randn(96, 130, dtype=torch.bfloat16)
    nf4 = NF4Tensor.quantize(weight, torch.float32)
    assert nf4.shape == (96, 130) and nf4.numel == 96 * 130 and nf4.dtype == torch.float32
    out = nf4.dequantize()
    assert out.dtype == torch.float32 and out.shape == weight.shape
    # Half a step of the widest interval of the code book (0.304 / 2), in units of the block's largest weight.
    assert ((out - weight.float()).abs().max() / weight.float().abs().max()) < 0.16
    assert torch.equal(nf4.dequantize(torch.bfloat16), out.to(torch.bfloat16))


def test_is_4_bits_and_an_eighth() -> None:
    nf4 = NF4Tensor.quantize(torch.randn(512, 512))
    assert 0.5 <= nf4.nbytes / nf4.numel < 0.5 + 1 / 64 + 0.001


def test_dequantize_into_a_buffer() -> None:
    nf4 = NF4Tensor.quantize(torch.randn(33, 70))
    out = torch.empty(33, 70, dtype=torch.float16)
    assert nf4.dequantize(torch.float16, out=out) is out
    assert torch.equal(out, nf4.dequantize(torch.float16))


def test_to_moves_every_tensor() -> None:
    nf4 = NF4Tensor.quantize(torch.randn(33, 70))
    moved = nf4.to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert moved.shape == nf4.shape and moved.tensors().keys() == nf4.tensors().keys()


@pytest.mark.parametrize("shape", [(16, 128), (33, 70)])
def test_tiles_and_rows_are_the_same_weight(shape: tuple[int, int]) -> None:
    nf4 = NF4Tensor.quantize(torch.randn(shape))
    tiled = nf4.in_tiles()
    assert tiled.tiled == (shape == (16, 128)) and tiled.in_tiles() is tiled and nf4.in_rows() is nf4
    assert torch.equal(tiled.in_rows().codes, nf4.codes) and not tiled.in_rows().tiled
    assert torch.equal(tiled.dequantize(), nf4.dequantize())
    tables = torch.empty(2, shape[0], shape[1] + 8)
    for table, held in zip(tables, (nf4, tiled)):
        held.writer(torch.float32, shape[1] + 8)(table, torch.ones(shape[0], 8))
    assert torch.equal(*tables)
