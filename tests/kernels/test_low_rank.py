"""``x A^T`` in runs: both launches of the kernel against float64 and against each other, bit for bit."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import low_rank as module
from pronghorn.kernels import low_rank_triton
from pronghorn.kernels.low_rank import SPLITS, low_rank, run_length
from pronghorn.kernels.low_rank_triton import Tile, few_rows_tile

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_runs_cover_the_inputs_once() -> None:
    for inputs in (1, 63, 64, 512, 513, 4096, 14336, 14337):
        step = run_length(inputs)
        assert step % 64 == 0 and step * SPLITS >= inputs > step * SPLITS - 64 * SPLITS


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "tile",
    [
        None,
        Tile(16, 32, 64, 2, 3),
        Tile(16, 32, 64, 2, 3, 2),
        Tile(32, 64, 64, 2, 3, 4),
    ],
)
@pytest.mark.parametrize(("T", "I", "R"), [(1, 64, 4), (17, 130, 16), (3, 700, 40), (33, 512, 96), (5, 1000, 130)])
def test_both_launches_give_the_product(T: int, I: int, R: int, tile: Tile | None, dtype: torch.dtype) -> None:  # noqa: E741
    x = torch.randn(T, I + 8, device=DEVICE).to(dtype)[:, :I]  # rows lie apart
    a = torch.randn(R, I, device=DEVICE).to(dtype)
    exact = x.double() @ a.double().T
    few, many, plain = (torch.full((T, R), float("nan"), dtype=dtype, device=DEVICE) for _ in range(3))
    seconds = [torch.full((T, R + 5), float("nan"), dtype=dtype, device=DEVICE)[:, 3 : R + 3] for _ in range(3)]
    low_rank_triton.low_rank(x, a, few, seconds[0], few_rows=T, tile=tile)
    low_rank_triton.low_rank(x, a, many, seconds[1], few_rows=0)
    module.reference.low_rank(x, a, plain, seconds[2])
    assert all(torch.equal(first, second) for first, second in zip((few, many, plain), seconds))
    # The sum errs by about its length times float32's unit, and float16 rounds once.
    bound = 1e-6 if dtype == torch.float32 else 6e-4
    for found in (few, many, plain):
        assert ((found.double() - exact).norm() / exact.norm()).item() <= bound
    if DEVICE == "cuda" and dtype == torch.float16:  # the interpreter's products have an order of their own
        assert torch.equal(few, many)


def test_few_programs_leave_a_product_its_multiprocessors() -> None:
    for T in range(9, 65):
        for R in range(1, 129):
            tile = few_rows_tile(T, R, 512)
            programs = SPLITS // tile.runs * -(-T // tile.rows) * -(-R // tile.ranks)
            if (32 if T <= 16 else 64 if T <= 32 else 128) >= R:
                assert programs == (4 if R <= 64 else 8)
            assert SPLITS % tile.runs == 0
            assert tile.num_stages >= 3 and tile.num_stages * (tile.rows + tile.ranks) * tile.inputs * 2 <= 180 * 1024
    assert few_rows_tile(8, 32, 512).runs == few_rows_tile(65, 32, 512).runs == 1
    assert few_rows_tile(64, 32, 512, (8, 0)).runs == 1, "no product begins beside it"


def test_the_count_of_arrivals_is_cleared() -> None:
    x, a = torch.randn(4, 256, device=DEVICE), torch.randn(16, 256, device=DEVICE)
    first, second = (torch.empty(4, 16, device=DEVICE) for _ in range(2))
    low_rank_triton.low_rank(x, a, first)
    low_rank_triton.low_rank(x, a, second)
    assert torch.equal(first, second)


def test_writes_where_it_is_told_and_refuses_what_does_not_fit() -> None:
    x, a = torch.randn(3, 128), torch.randn(8, 128)
    table = torch.zeros(3, 20)
    assert low_rank(x, a, table[:, 4:12]).data_ptr() == table[:, 4:12].data_ptr()
    assert torch.equal(table[:, 4:12], low_rank(x, a)) and not table[:, :4].any() and not table[:, 12:].any()
    with pytest.raises(ValueError, match="one dtype"):
        low_rank(x, a.half())
    with pytest.raises(ValueError, match="out is"):
        low_rank(x, a, torch.empty(3, 9))
    with pytest.raises(ValueError, match="out is"):
        low_rank(x, a, table[:, 4:12], torch.empty(3, 9))
