"""The product with NF4 weights: the reference against dequantized weights in float64, and what is refused.

The GPU's kernel is CUDA C++, which no interpreter runs: ``tests/gpu/test_nf4_matmul.py`` tests it.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pronghorn.kernels.few_rows import HOPPER_PROCESSORS
from pronghorn.kernels.nf4_code import dynamic_code
from pronghorn.kernels.nf4_matmul import Member, nf4_matmul, why_not
from pronghorn.kernels.nf4_matmul_cuda import Tile, arguments, joins, low_for, tile_for
from pronghorn.kernels.reference.low_rank import run_length
from pronghorn.quant.nf4 import NF4Tensor

CPU = torch.device("cpu")


def make(O: int, I: int, r: int, at: int, bias: bool, dtype: torch.dtype) -> Member:  # noqa: E741
    weight = NF4Tensor.quantize(torch.randn(O, I).to(dtype)).in_tiles()
    assert weight.tiled
    b = torch.randn(O, r).to(dtype) if r else None
    return Member(weight, b, at, torch.randn(O).to(dtype) if bias else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_the_sum_of_base_adapter_and_bias(dtype: torch.dtype) -> None:
    members = [make(40, 192, 16, 0, True, dtype), make(24, 192, 0, 0, False, dtype), make(8, 192, 32, 16, False, dtype)]
    x, low = torch.randn(5, 192).to(dtype), torch.randn(5, 48).to(dtype)
    expected = []
    for m in members:
        y = x.double() @ m.weight.dequantize(dtype).double().T
        if m.b_Or is not None:
            y += low[:, m.at : m.at + m.b_Or.shape[1]].double() @ m.b_Or.double().T
        expected.append(y if m.bias_O is None else y + m.bias_O.double())
    exact = torch.cat(expected, dim=1)
    found = nf4_matmul(x, members, low)
    assert found.dtype == dtype
    assert ((found.double() - exact).norm() / exact.norm()).item() <= (1e-6 if dtype == torch.float32 else 4e-4)
    assert nf4_matmul(x[:0], members, low[:0]).shape == (0, 72)


def test_what_does_not_fit_is_refused() -> None:
    member = make(8, 64, 16, 0, False, torch.float32)
    x, low = torch.randn(2, 64), torch.randn(2, 16)
    with pytest.raises(ValueError, match="give x A"):
        nf4_matmul(x, [member])
    with pytest.raises(ValueError, match="contiguous rows"):
        nf4_matmul(torch.randn(2, 128), [member], low)
    with pytest.raises(ValueError, match="one dtype"):
        nf4_matmul(x, [member], low.half())
    with pytest.raises(ValueError, match="out is"):
        nf4_matmul(x, [member], low, torch.empty(2, 9))


def test_the_gpu_s_path_says_why_it_is_not_taken() -> None:
    def weight(shape: tuple[int, int]) -> NF4Tensor:
        return NF4Tensor.quantize(torch.randn(shape)).in_tiles()

    half = torch.float16
    assert why_not([weight((8, 256))], half, CPU) == ""
    assert "float32" in why_not([weight((8, 256))], torch.float32, CPU)
    assert "multiples of 256" in why_not([weight((8, 192))], half, CPU)
    assert "row by row" in why_not([weight((9, 256))], half, CPU)
    assert "row by row" in why_not([weight((8, 256)).in_rows()], half, CPU)
    assert "rank 8" in why_not([weight((8, 256))], half, CPU, [32, 8])
    assert "4 projections" in why_not([weight((8, 256))] * 4, half, CPU)


@pytest.mark.parametrize("M", [1, 6, 8, 16, 17, 32, 33, 64])
@pytest.mark.parametrize(("outputs", "K"), [(6144, 4096), (4096, 14336), (28672, 4096), (1024, 28672)])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("limit", [99, 163, 227])
def test_every_tile_fits_into_shared_memory(M: int, outputs: int, K: int, nested: bool, limit: int) -> None:
    """What a block has on an L4 or RTX 4090, on an A100, on Hopper; and what the kernel takes for granted."""
    tile = tile_for(M, outputs, K, nested, limit * 1024)
    assert tile is not None
    assert tile.shared_bytes(K, nested) <= limit * 1024
    assert tile.rows in (8, 16, 32, 64) and (tile.rows >= M or limit < 227)
    assert tile.warps <= 16  # a barrier each
    assert tile.panel % 256 == 0 and tile.panel % tile.chunk == 0 and K % tile.chunk == 0
    assert 2 <= tile.stages <= 8 or tile.panel >= K
    assert tile.pair == 2 if tile.ring > 1 else tile.chunk == 256


@pytest.mark.parametrize("limit", [99, 163, 227])
@pytest.mark.parametrize(("ranks", "K"), [(8, 256), (48, 768), (96, 4096), (32, 14336), (480, 4096)])
@pytest.mark.parametrize("warps", [1, 8, 12, 16])
def test_a_low_rank_product_within_fits_into_shared_memory(warps: int, ranks: int, K: int, limit: int) -> None:
    low = low_for(ranks, K, warps, limit * 1024)
    assert low.shared_bytes(ranks, warps) <= limit * 1024
    assert low.blocks in (1, 2, 4) and low.columns % 64 == 0 and low.columns <= run_length(K)


@pytest.mark.parametrize(("outputs", "ranks", "K"), [(6144, 96, 4096), (28672, 64, 4096), (4096, 32, 14336)])
def test_an_8b_models_adapters_are_fetched_before_their_input_is_there(outputs: int, ranks: int, K: int) -> None:
    tile = tile_for(6, outputs, K)
    assert tile is not None and low_for(ranks, K, tile.warps).columns == 512


@pytest.mark.parametrize("rank", [8, 16])
def test_makes_the_low_rank_product_of_few_rows(rank: int) -> None:
    columns = 16
    members = [make(40, 256, columns, 0, True, torch.float32)]
    x, a, low = torch.randn(5, 256), torch.randn(rank, 256), torch.full((5, columns), float("nan"))
    expected = nf4_matmul(x, members, torch.nn.functional.pad(x @ a.T, (0, columns - rank)))
    torch.testing.assert_close(nf4_matmul(x, members, low, a_RI=a), expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(low[:, :rank], x @ a.T, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="x A\\^T of 9 rows; give a_RI for up to 8"):
        nf4_matmul(torch.randn(9, 256), members, torch.zeros(9, columns), a_RI=a)
    with pytest.raises(ValueError, match=r"a is \(16, 128\), torch.float32; give \[R, 256\]"):
        nf4_matmul(x, members, low, a_RI=torch.randn(16, 128))
    with pytest.raises(ValueError, match=r"low is \(\(5, 32\), .* give \(5, 16\), torch.float32, to write to"):
        nf4_matmul(x, members, torch.zeros(5, 32), a_RI=a)
    with pytest.raises(ValueError, match="a on meta"):
        nf4_matmul(x, members, low, a_RI=a.to("meta"))
    with pytest.raises(ValueError, match=r"a is \(256,\)"):
        nf4_matmul(x, members, low, a_RI=a[0])
    for wrong in (None, torch.zeros(4, columns)):
        with pytest.raises(ValueError, match="low"):
            nf4_matmul(x, members, wrong, a_RI=a)


@pytest.mark.parametrize("outputs", [(4096, 1024, 1024), (4096,), (14336, 14336)], ids=["qkv", "o", "gate_up"])
def test_an_8b_models_groups_fill_an_h200_once(outputs: tuple[int, ...]) -> None:
    """Blocks of outputs and those that make x A^T, of all members: one more, and it would run behind the others."""
    x, low = torch.zeros(6, 256), torch.zeros(6, 16)
    members = [make(O, 256, 16, 0, False, torch.float32) for O in outputs]  # noqa: E741
    tile = tile_for(6, sum(outputs), 4096)
    assert tile is not None
    _, blocks = arguments(x, members, low, torch.zeros(6, sum(outputs)), tile, dynamic_code(CPU))
    assert blocks + low_for(16, 4096, tile.warps).blocks == HOPPER_PROCESSORS


def test_a_block_has_outputs_of_several_members_only_where_warps_and_levels_allow_it() -> None:
    both = [make(O, 256, 0, 0, False, torch.float32) for O in (48, 40)]  # noqa: E741
    tile = Tile(3, 1, 2, 8, 256, 1, 256)
    assert joins(both, tile) and not joins(both[::-1], tile)  # 40 outputs end amid a warp's 16
    assert joins(both[::-1], tile._replace(pair=1))
    assert not joins(both, tile._replace(short=1)) and not joins(both[:1], tile)
    own = dataclasses.replace(both[1].weight, nested_code=dynamic_code(CPU).clone())
    assert not joins([both[0], dataclasses.replace(both[1], weight=own)], tile)
