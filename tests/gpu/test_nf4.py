"""NF4 on CUDA against bitsandbytes on the same GPU, bit for bit; gradients and memory of the 4-bit linear layer."""

from __future__ import annotations

import bitsandbytes as bnb
import pytest
import torch
from torch.nn import functional as F

from pronghorn.kernels import nf4
from pronghorn.quant.linear4bit import Linear4bit
from pronghorn.quant.nf4 import NF4Tensor

BITS = {2: torch.int16, 4: torch.int32}
# The 8B's; whole runs of 64 and not; numel a multiple of 8 but not of 64; odd; less than one block; tiny.
SHAPES = [(1024, 4096), (4096, 1024), (64, 64), (33, 104), (5, 131), (300, 334), (3, 8), (1, 3)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = BITS[a.dtype.itemsize]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(kind), b.view(kind))


def make_weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * torch.linspace(0.01, 3, shape[0], device="cuda")[:, None]).to(dtype)


def assert_equals_bnb(weight: torch.Tensor) -> NF4Tensor:
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    ours = NF4Tensor.quantize(weight)
    assert torch.equal(ours.codes, packed.view(-1))
    assert torch.equal(ours.scales, state.absmax)
    assert torch.equal(ours.nested_absmax, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    theirs = bnb.functional.dequantize_4bit(packed, state)
    theirs = theirs.t().contiguous() if packed.shape[0] == 1 else theirs  # their shim for a lone byte of codes
    assert same_bits(ours.dequantize(), theirs)
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_equals_bnb(make_weight(shape, dtype))


def test_many_values_equal_bitsandbytes() -> None:
    """Enough weights to meet every boundary: an exact inverse instead of the GPU's would show."""
    for scale in (1e-3, 1.0, 37.0):
        assert_equals_bnb(torch.randn(8192, 4096, device="cuda") * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks_equal_bitsandbytes(dtype: torch.dtype) -> None:
    weight = make_weight((64, 256), dtype)
    weight[3, :128] = 0
    weight[-1] = 0
    assert_equals_bnb(weight)
    assert_equals_bnb(torch.zeros(64, 64, dtype=dtype, device="cuda"))
    assert_equals_bnb(torch.full((64, 64), -0.5, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_with_every_scale(dtype: torch.dtype) -> None:
    """All 256 bytes under 256 scales, some of them negative: both kernels against the reference on the CPU."""
    codes = torch.randint(0, 256, (256 * 256,), dtype=torch.uint8)
    codes.view(256, 256)[:, :] = torch.arange(256)
    codes, shape = codes[torch.randperm(codes.numel())].contiguous(), (512, 256)
    scales = torch.arange(codes.numel() // 32, dtype=torch.int64).remainder(256).to(torch.uint8)
    tensor = NF4Tensor(codes, scales, torch.rand(8) * 3, torch.tensor(0.7), shape, dtype=dtype)
    assert same_bits(tensor.to("cuda").dequantize().cpu(), tensor.dequantize())
    assert same_bits(tensor.to("cuda").in_tiles().dequantize().cpu(), tensor.dequantize())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 64), (8, 192), (24, 4096), (1024, 14336), (4096, 1024), (72, 320)])
def test_codes_in_tiles(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows = NF4Tensor.quantize(make_weight(shape, dtype))
    tiles = rows.in_tiles()
    assert tiles.tiled and same_bits(tiles.dequantize(), rows.dequantize())
    for room in (8, 32, 7):
        wide = torch.full((shape[0], shape[1] + room), 7.0, dtype=dtype, device="cuda")
        tiles.dequantize(dtype, wide[:, : shape[1]])
        assert same_bits(wide[:, : shape[1]].contiguous(), rows.dequantize())
        assert bool((wide[:, shape[1] :] == 7).all())


def test_single_quantization_and_wide_blocks() -> None:
    weight = make_weight((96, 256), torch.bfloat16)
    for blocksize in (64, 128):
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=blocksize)
        codes, absmax = nf4.quantize_nf4(weight, blocksize)
        assert torch.equal(codes, packed.view(-1)) and torch.equal(absmax, state.absmax)
        out = nf4.dequantize_nf4(codes, absmax, None, None, weight.shape, weight.dtype, blocksize=blocksize)
        assert same_bits(out, bnb.functional.dequantize_4bit(packed, state))


def test_unaligned_out() -> None:
    tensor = NF4Tensor.quantize(make_weight((64, 128), torch.bfloat16))
    out = torch.empty(64 * 128 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(64, 128)
    assert same_bits(tensor.dequantize(out=out), tensor.dequantize())


@pytest.mark.parametrize("shape", [(192, 4096), (33, 64), (7, 100), (1, 14336)])
def test_rows_of_a_wider_matrix(shape: tuple[int, int]) -> None:
    """Both kernels: whole runs of 64 in a row, and not."""
    nf4 = NF4Tensor.quantize(make_weight(shape, torch.bfloat16))
    for room in (8, 32, 96):
        wide = torch.full((shape[0], shape[1] + room), 7.0, dtype=torch.bfloat16, device="cuda")
        nf4.dequantize(torch.bfloat16, wide[:, : shape[1]])
        assert same_bits(wide[:, : shape[1]].contiguous(), nf4.dequantize(torch.bfloat16))
        assert bool((wide[:, shape[1] :] == 7).all())


def test_saved_state_loads_in_bitsandbytes() -> None:
    ours = Linear4bit.from_linear(torch.nn.Linear(256, 96, bias=False, dtype=torch.bfloat16, device="cuda"))
    state = ours.state_dict()
    stats = {k.removeprefix("weight."): v for k, v in state.items() if k != "weight"}
    theirs = bnb.nn.Params4bit.from_prequantized(state["weight"], stats, device="cuda")
    assert same_bits(bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), ours.nf4.dequantize())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "dtype"), [((96, 256), torch.bfloat16), ((33, 71), torch.float32)])
def test_gradients_equal_a_dense_layer(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    layer = Linear4bit.from_linear(torch.nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype, device="cuda"))
    dense = layer.nf4.dequantize()
    x = torch.randn(2, 7, shape[1], dtype=dtype, device="cuda", requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    y, y_dense = layer(x), F.linear(x_dense, dense, layer.bias)
    assert same_bits(y.detach(), y_dense.detach())
    grad = torch.randn_like(y)
    y.backward(grad)
    ours = None if layer.bias is None else layer.bias.grad.clone()
    y_dense.backward(grad)
    torch.testing.assert_close(x.grad, x_dense.grad)
    if ours is not None:
        torch.testing.assert_close(ours, layer.bias.grad - ours)


def test_memory() -> None:
    """Forward holds one dequantized weight while it runs and none after; quantizing needs no float32 copy."""
    layer = Linear4bit(4096, 8192, False, torch.bfloat16, "cuda")
    weight = torch.randn(8192, 4096, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    layer.load_weight(weight)
    assert torch.cuda.max_memory_allocated() - before < 0.75 * weight.nbytes

    x = torch.randn(16, 4096, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layer(x).sum().backward()  # cuBLAS takes its workspace
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = layer(x)
    assert torch.cuda.memory_allocated() - before <= 2 * y.nbytes
    y.sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1.1 * weight.nbytes


def test_in_a_cuda_graph() -> None:
    layer = Linear4bit.from_linear(torch.nn.Linear(256, 128, dtype=torch.bfloat16, device="cuda"))
    x = torch.randn(4, 256, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.load_weight(torch.randn(128, 256, dtype=torch.bfloat16, device="cuda"))
        graph.replay()
        assert torch.equal(y, layer(x))
