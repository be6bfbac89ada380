"""The ordered product with 16-bit weights: both paths against float64, rounded where the definition rounds."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import launch, ordered_matmul_triton
from pronghorn.kernels import ordered_matmul as module
from pronghorn.kernels.ordered_matmul import DenseMember, ordered_matmul, why_not
from pronghorn.kernels.ordered_matmul_triton import Tile, tile_for
from pronghorn.kernels.reference import ordered_matmul as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.float32: 1e-6, torch.float16: 4e-4}  # a sum's error, or one rounding: 2**-11 at most, less on average
TILES = [None, Tile(16, 8, 16, 1, 2), Tile(32, 16, 64, 2, 3), Tile(64, 16, 128, 4, 2)]
MAPPED = [Tile(16, 16, 64, 4, 2, True), Tile(32, 32, 128, 4, 2, True)]


def some(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def make(O: int, I: int, r: int, at: int, bias: bool, dtype: torch.dtype, scaling: float = 1.5) -> DenseMember:  # noqa: E741
    """A weight that is a view of a wider table, as a held one is."""
    weight = some(O, I + 8, dtype=dtype)[:, :I]
    b = some(O, r, dtype=dtype) if r else None
    return DenseMember(weight, b, at, scaling, some(O, dtype=dtype) if bias else None)


def exact(x: torch.Tensor, members: list[DenseMember], low: torch.Tensor | None) -> torch.Tensor:
    outs = []
    for m in members:
        y = x.double() @ m.weight_OI.double().T
        if m.b_Or is not None:
            assert low is not None
            y += m.scaling * (low[:, m.at : m.at + m.rank].double() @ m.b_Or.double().T)
        outs.append(y if m.bias_O is None else y + m.bias_O.double())
    return torch.cat(outs, dim=1)


def off(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(
    ("M", "I", "shapes"),  # outputs, rank, first column, bias
    [
        (1, 64, [(33, 0, 0, False)]),
        (5, 200, [(40, 16, 0, True), (24, 0, 0, False), (8, 33, 16, True)]),
        (9, 136, [(20, 8, 3, False), (70, 40, 11, False)]),
        (17, 8, [(16, 0, 0, True)]),
    ],
)
def test_both_paths_give_the_sum_of_base_adapter_and_bias(M, I, shapes, tile, dtype) -> None:  # noqa: E741
    members = [make(O, I, r, at, bias, dtype) for O, r, at, bias in shapes]  # noqa: E741
    x, low = some(M, I + 16, dtype=dtype)[:, :I], some(M, 51, dtype=dtype)
    low = low if any(m.rank for m in members) else None
    truth = exact(x, members, low)
    plain, kernel = (torch.full(truth.shape, float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
    reference.ordered_matmul(x, members, low, plain)
    ordered_matmul_triton.ordered_matmul(x, members, low, kernel, tile)
    for found in (plain, kernel):  # up to three roundings
        assert off(found, truth) <= 2 * UNIT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tile", MAPPED)
@pytest.mark.parametrize(
    ("M", "I", "O", "r", "bias"), [(1, 64, 33, 0, False), (21, 200, 40, 16, True), (17, 136, 70, 33, False)]
)
def test_inputs_that_the_copy_engine_brings(M, I, O, r, bias, tile, dtype) -> None:  # noqa: E741
    """Rows, outputs and inputs that end within a block: zeros stand there, and nothing beyond is written."""
    member = make(O, I, r, 3, bias, dtype)
    x, low = some(M, I + 16, dtype=dtype)[:, :I], some(M, 51, dtype=dtype) if r else None
    truth = exact(x, [member], low)
    around = torch.full((M + 2, O + 2), float("nan"), dtype=dtype, device=DEVICE)
    found = around[1:-1, 1:-1]
    ordered_matmul_triton.ordered_matmul(x, [member], low, found, tile)
    assert off(found, truth) <= 2 * UNIT[dtype]
    found.fill_(float("nan"))
    assert around.isnan().all()


def test_long_sums_of_many_rows_are_for_one_product_where_a_copy_engine_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def weight(K: int, outputs: int = 4224) -> DenseMember:
        return DenseMember(torch.empty(outputs, K, device="meta"))

    assert module.most_rows([weight(8192)]) == module.MAX_ROWS
    monkeypatch.setattr(launch, "has_copy_engine", lambda tensor: True)
    assert module.most_rows([weight(8192)]) == module.MOST_ROWS
    assert module.most_rows([weight(8184)]) == module.most_rows([weight(8192)] * 2) == module.MAX_ROWS
    assert module.most_rows([weight(8192, 4225)]) == module.MAX_ROWS
    for M in (33, 64, 65, 128, 129, 256):
        tile = tile_for(M, 4096, most=module.MOST_ROWS)
        programs = -(-4096 // tile.outputs) * -(-M // tile.rows)
        assert tile.mapped and programs == 128
        assert (tile.outputs + tile.rows) * tile.inputs * 2 * tile.num_stages <= 225 * 1024
    assert not tile_for(32, 4096, most=module.MOST_ROWS).mapped and not tile_for(65, 4096).mapped


def test_some_rows_of_one_product_begin_beside_x_a(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the copy engine, whose product is as fast as the one that has to wait; so many outputs a program that each
    multiprocessor has one.
    """
    single = [DenseMember(torch.empty(6144, 4096, device="meta"))]
    assert module.mapped_rows(single, True) == 0
    monkeypatch.setattr(launch, "has_copy_engine", lambda tensor: True)
    assert module.mapped_rows(single, True) == module.MAX_ROWS
    assert module.mapped_rows(single) == module.mapped_rows(single * 2, True) == 0, (
        "nothing to begin beside, or members"
    )
    for outputs, each in ((4096, 32), (4224, 32), (6144, 64), (28672, 128)):
        for M in (33, 64):
            tile = tile_for(M, outputs, most=module.MAX_ROWS)
            assert tile.mapped and tile.outputs == each and tile.rows >= M
            assert (tile.outputs + tile.rows) * tile.inputs * 2 * tile.num_stages <= 225 * 1024
        assert not tile_for(65, outputs, most=module.MAX_ROWS).mapped


@pytest.mark.parametrize("path", [reference, ordered_matmul_triton])
@pytest.mark.parametrize("scaling", [1.0, 0.3])
def test_rounds_before_it_adds(path, scaling: float) -> None:
    """Products of integers are exact in any order, so every bit is known: cuBLAS's roundings, done by torch."""

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-40, 41, shape, device=DEVICE).half()

    x, low, w, b = integers(6, 72), integers(6, 16), integers(32, 72), integers(32, 16)
    bias = some(32, dtype=torch.float16) * 100
    base, adapter = (x.float() @ w.float().T), (low.float() @ b.float().T)
    assert base.abs().max() > 2048  # float16 has to round
    for b_Or, bias_O in ((b, bias), (b, None), (None, bias), (None, None)):
        expected = base.half()
        if b_Or is not None:
            begun = (scaling * adapter).half()
            expected = expected + (begun if bias_O is None else bias_O + begun)
        elif bias_O is not None:
            expected = expected + bias_O
        found = torch.empty_like(expected)
        path.ordered_matmul(x, [DenseMember(w, b_Or, 0, scaling, bias_O)], None if b_Or is None else low, found)
        assert torch.equal(found, expected)
        if b_Or is not None and bias_O is not None:
            once = (base + scaling * adapter + bias.float()).half()
            assert not torch.equal(found, once)  # else the test above shows nothing


def test_rows_do_not_see_each_other() -> None:
    member = make(40, 96, 16, 0, True, torch.float16)
    x, low = some(12, 96, dtype=torch.float16), some(12, 16, dtype=torch.float16)
    whole = torch.empty(12, 40, dtype=torch.float16, device=DEVICE)
    ordered_matmul_triton.ordered_matmul(x, [member], low, whole)
    x[3] = float("nan")
    found = torch.empty_like(whole)
    ordered_matmul_triton.ordered_matmul(x, [member], low, found)
    rest = [t for t in range(12) if t != 3]
    assert found[3].isnan().all() and torch.equal(found[rest], whole[rest])


def test_writes_where_it_is_told() -> None:
    members, x = [make(24, 64, 0, 0, False, torch.float16)], some(3, 64, dtype=torch.float16)
    table = torch.zeros(3, 40, dtype=torch.float16, device=DEVICE)
    found = ordered_matmul(x, members, None, table[:, 8:32])
    assert found.data_ptr() == table[:, 8:32].data_ptr() and torch.equal(found, ordered_matmul(x, members))
    assert not table[:, :8].any() and not table[:, 32:].any()
    assert ordered_matmul(x[:0], members).shape == (0, 24)


def test_tiles_cover_all_rows_in_half_a_multiprocessor_or_have_it_to_themselves() -> None:
    for M in (1, 8, 9, 16, 17, 33, 64, 65, 128):
        for outputs in (1024, 4096, 28672):
            for capability, limit in (((9, 0), 113), ((8, 0), 99), ((8, 6), 99)):
                tile = tile_for(M, outputs, capability)
                assert tile.rows >= min(M, module.MAX_ROWS) and tile.rows >= 8
                stage = (tile.outputs + tile.rows) * tile.inputs * 2
                alone = capability == (9, 0) and M > 8 and -(-outputs // tile.outputs) <= 132 and tile.outputs == 64
                assert 2 * stage <= (tile.num_stages - 1) * stage <= ((227 if alone else limit) - 2) * 1024


def test_refuses_what_does_not_fit() -> None:
    member, x = make(16, 64, 8, 0, False, torch.float16), some(2, 64, dtype=torch.float16)
    low = some(2, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="x is"):
        ordered_matmul(x[:, :32], [member], low)
    with pytest.raises(ValueError, match="low is None"):
        ordered_matmul(x, [member])
    with pytest.raises(ValueError, match="low is"):
        ordered_matmul(x, [member], low[:, :4])
    with pytest.raises(ValueError, match="b is"):
        ordered_matmul(x, [member], low.float())
    with pytest.raises(ValueError, match="bias is"):
        ordered_matmul(x, [DenseMember(member.weight_OI, bias_O=low[0])])
    with pytest.raises(ValueError, match="out is"):
        ordered_matmul(x, [member], low, some(2, 17, dtype=torch.float16))


def test_says_why_not() -> None:
    half, member = torch.float16, make(16, 64, 8, 0, False, torch.float16)
    assert not why_not([member], half)
    assert "float32" in why_not([member], torch.float32)
    assert "4 projections" in why_not([member] * 4, half)
    assert "for inputs in torch.bfloat16" in why_not([member], torch.bfloat16)
    assert "aligned to 16 bytes" in why_not([make(16, 60, 0, 0, False, half)], half)
    assert "aligned to 16 bytes" in why_not([DenseMember(some(16, 68, dtype=half)[:, :64])], half)
    assert "rank 136" in why_not([make(16, 64, 136, 0, False, half)], half)
