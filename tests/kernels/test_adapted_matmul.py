"""A product with its adapters in one launch: what it is, in plain PyTorch, for whom it is meant, and what it refuses.
The kernel itself: ``test_adapted_matmul_on_cpu.py`` and ``tests/gpu/test_adapted_matmul.py``.
"""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import adapted_matmul as module
from pronghorn.kernels.adapted_matmul import adapted_matmul, coded_bytes, coded_of, takes
from pronghorn.kernels.adapted_matmul_cuda import Tile, defines_of, eighths_for, shared_bytes, tile_for
from pronghorn.kernels.low_blocks import whole_ranks
from pronghorn.quant.nf4 import NF4Tensor


def operands(M: int, O: int, I: int, R: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # noqa: E741
    """A table with rows behind M and columns behind I + R, a weight, and A."""
    table, weight = torch.zeros(M + 3, I + R + 8, dtype=dtype), torch.randn(O, I + R + 8).to(dtype)
    table[:M, :I] = torch.randn(M, I)
    return table, weight, torch.randn(R, I).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_is_the_product_of_x_and_x_a_side_by_side(dtype: torch.dtype) -> None:
    M, O, I, R = 5, 24, 192, 16  # noqa: E741 - shape letters
    table, weight, a = operands(M, O, I, R, dtype)
    table[:M, I : I + R] = float("nan")
    y = adapted_matmul(table, M, weight, a)
    x, b = table[:M, :I].double(), weight[:, I : I + R].double()
    low = (x @ a.double().T).to(dtype)  # rounded before it is multiplied
    exact = x @ weight[:, :I].double().T + low.double() @ b.T
    bound = 1e-6 if dtype == torch.float32 else 1e-3
    assert y.dtype == dtype and ((y.double() - exact).norm() / exact.norm()).item() <= bound
    torch.testing.assert_close(table[:M, I : I + R], low, rtol=10 * bound, atol=10 * bound)
    assert not table[M:].any() and not table[:, I + R :].any()


def test_what_does_not_fit_is_refused() -> None:
    table, weight, a = operands(5, 24, 192, 16, torch.float32)
    wrong = (
        ((table, 9, weight, a), "9 rows of a table of (8, 216)"),
        ((table, 5, weight[:, 8:], a), "a weight of (24, 208)"),
        ((table, 5, weight, torch.randn(25, 192)), "A of (25, 192)"),
        ((table, 5, weight.half(), a), "torch.float16"),
        ((table, 5, weight, a, torch.empty(5, 23)), "(5, 23)"),
    )
    for given, said in wrong:
        with pytest.raises(ValueError, match="give") as refused:
            adapted_matmul(*given)
        assert said in str(refused.value)


def test_a_tile_fills_the_multiprocessors_once() -> None:
    """An 8B Llama's outputs: each block has a multiprocessor, x A^T the others."""
    assert tile_for(64, 4096) == Tile(1, 32, 9, 4) and tile_for(17, 4096) == tile_for(64, 4096)
    assert tile_for(64, 6144) == Tile(1, 48, 6, 4)
    assert tile_for(65, 4096) == Tile(2, 32, 5, 2) and tile_for(128, 6144) == Tile(2, 48, 5, 2)
    assert tile_for(129, 4096) == Tile(2, 64, 4, 1) == tile_for(256, 4096)
    assert tile_for(256, 6144) == Tile(2, 96, 4, 1)
    assert tile_for(64, 28672) is None and tile_for(256, 28672) is None, "more blocks than multiprocessors"
    assert tile_for(64, 2048) is None, "half of them would have none"
    for rows in range(17, 257):
        for outputs in range(64, 16384, 72):
            tile = tile_for(rows, outputs)
            if tile is None:
                continue
            blocks = -(-outputs // tile.outputs) * -(-rows // tile.rows) + -(-rows // 64) * tile.low
            assert 88 < blocks <= 132 and tile.stages >= 3
            for ranks in (2, 96, 128):  # x A^T has its own stages there
                defines = defines_of(tile, ranks, torch.float16, False)
                assert shared_bytes(tile, defines) <= 227 * 1024 and defines["LOW_STAGES"] >= 3


def test_ranks_are_as_many_as_an_instruction_has() -> None:
    assert [whole_ranks(n) for n in (2, 16, 18, 64, 66, 96, 128)] == [16, 16, 32, 64, 96, 96, 128]


def test_a_part_is_read_as_codes_where_that_is_meant_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """An 8B Llama's down, and q, k and v; what is kept of them is what was said to be; it fits into shared memory."""
    assert [eighths_for(*sizes) for sizes in ((4096, 14336), (6144, 4096), (4096, 4096))] == [2, 4, 0]
    assert eighths_for(8192, 8192) == eighths_for(28672, 4096) == 0, "other tiles, or none"
    monkeypatch.setattr(module.launch, "has_copy_engine", lambda tensor: True)
    monkeypatch.setattr(module, "processors_of", lambda device: 132)
    for members, inputs in (((4608, 8, 1024), 256), ((4096,), 8192)):
        nf4 = [NF4Tensor.quantize(torch.randn(n, inputs)).in_tiles() for n in members]
        coded, outputs = coded_of(nf4), sum(members)
        assert coded is not None and coded.packed.nbytes == coded_bytes(outputs, inputs, coded.packed)
        assert coded.packed.shape[0] == inputs // 128 * coded.eighths // 8
        assert coded_of([w.in_rows() for w in nf4]) is None
        table, weight = torch.zeros(8, inputs + 64), torch.zeros(outputs + 8, inputs + 64)
        with pytest.raises(ValueError, match="what `coded_of` made of this weight"):
            adapted_matmul(table, 8, weight, torch.zeros(16, inputs), coded=coded)
    for outputs in range(8, 20000, 8):
        for inputs in (4096, 8192):
            tile = tile_for(64, outputs, eighths=eighths_for(outputs, inputs))
            if tile is not None:
                assert shared_bytes(tile, defines_of(tile, 96, torch.bfloat16, True)) <= 227 * 1024


def test_it_is_meant_for_some_rows_of_weights_in_16_bits_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, a = torch.empty(4096, 4160, dtype=torch.bfloat16), torch.empty(32, 4096, dtype=torch.bfloat16)
    assert not takes(64, weight, a), "not on a CPU"
    monkeypatch.setattr(module.launch, "has_copy_engine", lambda tensor: True)
    monkeypatch.setattr(module, "processors_of", lambda device: 132)
    assert [takes(n, weight, a) for n in (16, 17, 256, 257)] == [False, True, True, False]
    assert not takes(64, weight, None) and not takes(64, weight[:2048], a)
    assert not takes(64, weight.float(), a), "weights in 32 bits"
    assert not takes(64, weight, torch.empty(130, 4096, dtype=torch.bfloat16)), "ranks"
    assert not takes(64, weight, torch.empty(31, 4096, dtype=torch.bfloat16)), "odd ranks"
    assert not takes(64, weight, a[:, :4000]), "inputs that are no whole 64"
    assert not takes(64, weight[:, 1:], a), "rows that are not aligned"
