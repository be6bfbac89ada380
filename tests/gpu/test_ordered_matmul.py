"""The ordered product with 16-bit weights on a GPU: the bits of the trainer's product, whatever the number of rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pronghorn.kernels.adapted_matmul import adapted_matmul
from pronghorn.kernels.launch import chained
from pronghorn.kernels.low_rank import low_rank
from pronghorn.kernels.ordered_matmul import DenseMember, ordered_matmul
from pronghorn.kernels.ordered_matmul_triton import _MAPPED_64, Tile
from pronghorn.kernels.ordered_matmul_triton import ordered_matmul as launch
from pronghorn.lora.fused import ORDERED_ROWS, Input, project
from pronghorn.lora.held import HeldWeights
from pronghorn.lora.projection import Group, Projection
from pronghorn.rollout.native import products
from pronghorn.rollout.native.dense import DenseProduct, TrainerProduct, agrees, dense_members
from pronghorn.rollout.native.products import HeldProduct, Tables, product_of

ROWS = (1, 3, 8, 9, 16, 17, 31, 33, 64, 65, 128, 129, 200, 256)


def make(outputs: list[int], I: int, rank: int, bias: bool, dtype: torch.dtype, scaling: float = 1.0) -> Group:  # noqa: E741
    """Projections of one input, their adapters as a prepared layer rounds them."""
    members, bs, spans, columns = [], [], [], []
    for i, O in enumerate(outputs):  # noqa: E741
        base = nn.Linear(I, O, bias=bias, device="cuda", dtype=dtype).requires_grad_(False)
        bs.append((torch.randn(O, rank, device="cuda") * 0.05).to(dtype) if rank else None)
        a, b = (nn.Parameter(torch.empty(rank, 1)) for _ in range(2)) if rank else (None, None)  # only ranks are read
        members.append(Projection(base, a, b, scaling))
        spans.append(slice(i * rank, (i + 1) * rank))
        columns.append(slice(sum(outputs[:i]), sum(outputs[: i + 1])))
    a_RI = (torch.randn(rank * len(outputs), I, device="cuda") / I**0.5).to(dtype) if rank else None
    return Group(tuple(members), a_RI, tuple(bs), tuple(spans), tuple(columns))


def by_trainer(group: Group, x: torch.Tensor, held: HeldWeights | None = None) -> torch.Tensor:
    given = Input(group, held, rows=len(x), like=x)
    given.x_TI.copy_(x)
    return project(given, group, given.lower(group, None, True), held, ordered=True)


def test_the_decode_step_takes_it_where_its_bits_are_the_trainer_s() -> None:
    """Shapes of which cuBLAS splits the sum are left to it: either way the step's product is the trainer's."""
    for outputs, inputs in (
        ([4096, 1024, 1024], 4096),
        ([4096], 14336),
        ([64, 32, 32], 256),
        ([256], 512),
        ([32], 4096),
    ):
        group = make(outputs, inputs, 16, True, torch.bfloat16)
        product = product_of(group, torch.bfloat16, 8, 64, None)
        assert isinstance(product, DenseProduct if agrees(group, torch.bfloat16) else TrainerProduct)
        if inputs >= 4096 and min(outputs) >= 1024:
            assert isinstance(product, DenseProduct)
        x = torch.randn(ORDERED_ROWS, inputs, device="cuda").bfloat16()
        assert torch.equal(product(x[:6].contiguous()), by_trainer(group, x)[:6])


def check(group: Group, dtype: torch.dtype, rows: tuple[int, ...] = ROWS) -> None:
    x = torch.randn(ORDERED_ROWS, group.members[0].base.in_features, device="cuda").to(dtype)
    expected, product = by_trainer(group, x), DenseProduct(group, dtype)
    for M in rows:
        rows_x = x[:M].contiguous()
        # The product asks whether its kernel agrees, and does without it where not: so the kernel itself is asked too.
        for found in (product(rows_x), product.by_kernel(rows_x) if product.most >= M else None):
            if found is not None:
                assert torch.equal(found, expected[:M]), (
                    f"{M} rows: {(found != expected[:M]).float().mean():.4f} differ"
                )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [0, 8, 16, 32])  # 33: cuBLAS orders unaligned ranks otherwise; the engine sees it
@pytest.mark.parametrize(("outputs", "I"), [([4096, 1024, 1024], 4096), ([4096], 4096)])
def test_bits_are_those_of_the_trainer_s_product(outputs, I, rank, bias, dtype) -> None:  # noqa: E741
    check(make(outputs, I, rank, bias, dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("outputs", "I", "rank", "bias", "scaling"),
    [
        ([14336, 14336], 4096, 32, False, 1.0),
        ([4096], 14336, 32, False, 1.0),
        ([4096], 14336, 16, True, 2.0),
        ([4096, 1024, 1024], 4096, 32, False, 0.3),  # a scale that rounds
        ([4096, 1024, 1024], 4096, 32, True, 0.3),
        ([4096], 4096, 128, True, 0.5),
        ([896, 128, 128], 896, 16, True, 1.0),  # a small model with biases
        ([1000, 72], 1024, 32, True, 1.0),  # outputs that are no multiple of a tile
    ],
)
def test_other_shapes_and_scales(outputs, I, rank, bias, scaling, dtype) -> None:  # noqa: E741
    check(make(outputs, I, rank, bias, dtype, scaling), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("O", "I", "R"), [(4096, 14336, 32), (4096, 4096, 32), (6144, 4096, 96), (28672, 4096, 16)])
def test_a_held_table_has_cublas_s_bits(O: int, I: int, R: int, dtype: torch.dtype) -> None:  # noqa: E741
    table = (torch.randn(O + R, I + R, device="cuda") / I**0.5).to(dtype)[:O]
    x = torch.randn(ORDERED_ROWS, I + R, device="cuda").to(dtype)
    expected = x @ table.T
    for M in ROWS:
        assert torch.equal(ordered_matmul(x[:M], [DenseMember(table)]), expected[:M]), f"{M} rows"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [8, 32])
@pytest.mark.parametrize(
    ("outputs", "I"), [([4096, 1024, 1024], 4096), ([4096], 4096), ([14336, 14336], 4096), ([4096], 14336)]
)
def test_weights_that_are_kept_have_the_trainer_s_bits(outputs, I, rank, dtype, monkeypatch) -> None:  # noqa: E741
    """In a chain. On Hopper one launch has ``x A^T`` and the product; of gate and up, which have too many outputs for
    it, the product begins beside ``x A^T`` up to 64 rows.
    """
    if (dtype, rank, I) == (torch.float16, 8, 14336):
        pytest.skip("cuBLAS has an order of its own for 14,344 inputs in float16")
    group = make(outputs, I, rank, False, dtype)
    x, held = torch.randn(ORDERED_ROWS, I, device="cuda").to(dtype), HeldWeights(group, dtype)
    expected, product = by_trainer(group, x, held), HeldProduct(group, dtype, Tables(), 256)
    beside: list[int] = []
    at_once: list[int] = []
    monkeypatch.setattr(
        products,
        "ordered_matmul",
        lambda x, *args, **more: (beside.append(len(x)), ordered_matmul(x, *args, **more))[1],
    )
    monkeypatch.setattr(
        products.adapted,
        "adapted_matmul",
        lambda x, M, *args, **more: (at_once.append(M), adapted_matmul(x, M, *args, **more))[1],
    )
    for M in (33, 48, 64, 65, 256):
        product.table_TK[:, I:] = float("nan")  # what x A^T of another step left
        product.table_TK[:, I + group.rank :] = 0.0
        with chained():
            product.place(M).copy_(x[:M])
            found = product(product.place(M))
        assert torch.equal(found, expected[:M]), f"{M} rows: {(found != expected[:M]).float().mean():.4f} differ"
    if torch.cuda.get_device_capability() == (9, 0):
        many = len(outputs) == 2
        assert beside == ([64] * 3 if many else []) and at_once == ([] if many else [33, 48, 64, 65, 256])


@pytest.mark.parametrize("late", [1024, 1000])  # the second lies within a step, which is read behind the wait
@pytest.mark.parametrize("tile", _MAPPED_64)
def test_its_last_columns_are_waited_for(tile: Tile, late: int) -> None:
    """Beside a kernel that makes them, and takes longer than the product, in a chain."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("what begins early for its last columns needs Hopper")
    weight = (torch.randn(256, 1152, device="cuda") / 32).bfloat16()
    wide = torch.randn(32, 1 << 16, device="cuda").bfloat16()
    for _ in range(20):
        x, other = torch.randn(48, 1152, device="cuda").bfloat16(), torch.randn(48, 1 << 16, device="cuda").bfloat16()
        x[:, 1056:] = 0.0
        x[:, late : late + 32] = float("nan")
        found = torch.empty(48, 256, device="cuda", dtype=torch.bfloat16)
        torch.cuda.synchronize()
        with chained():
            low_rank(other, wide, x[:, late : late + 32])
            launch(x, [DenseMember(weight)], None, found, tile, late=late)
        assert torch.equal(found, ordered_matmul(x, [DenseMember(weight)])) and not found.isnan().any()


@pytest.mark.parametrize(
    "tile",
    [
        Tile(16, 8, 128, 1, 4),
        Tile(16, 16, 256, 1, 4),
        Tile(32, 16, 128, 2, 4),
        Tile(32, 64, 64, 4, 4),
        Tile(64, 16, 128, 4, 4),  # from 64 outputs, 4 warps and 16 rows on, Hopper's wider instruction
        Tile(64, 32, 64, 4, 3),
        Tile(128, 16, 64, 4, 3),
    ],
)
def test_tiles_change_no_bit(tile: Tile) -> None:
    group = make([512, 256], 2048, 32, True, torch.bfloat16)
    members = dense_members(group, torch.bfloat16)
    x, low = torch.randn(20, 2048, device="cuda").bfloat16(), torch.randn(20, 64, device="cuda").bfloat16()
    found = torch.full((20, 768), float("nan"), device="cuda", dtype=torch.bfloat16)
    launch(x, members, low, found, tile)
    assert torch.equal(found, ordered_matmul(x, members, low))


def test_the_wait_for_x_a_is_kept() -> None:
    """Beside a kernel that makes ``x A^T``, every time another one, the product reads the one that was made."""
    group = make([256], 1024, 32, False, torch.bfloat16)  # a short product, a long sum before it
    (member,) = dense_members(group, torch.bfloat16)
    wide = torch.randn(32, 1 << 16, device="cuda").bfloat16()
    low = torch.empty(8, 32, device="cuda", dtype=torch.bfloat16)
    for _ in range(20):
        x, other = torch.randn(8, 1024, device="cuda").bfloat16(), torch.randn(8, 1 << 16, device="cuda").bfloat16()
        low_rank(other, wide, low)
        found = ordered_matmul(x, [member], low, overlap=True)
        assert torch.equal(found, ordered_matmul(x, [member], low))


def test_error_is_a_few_roundings() -> None:
    group = make([4096], 4096, 32, True, torch.bfloat16)
    (member,) = dense_members(group, torch.bfloat16)
    assert member.b_Or is not None and member.bias_O is not None and group.a_RI is not None
    x = torch.randn(6, 4096, device="cuda").bfloat16()
    low = low_rank(x, group.a_RI)
    exact = x.double() @ member.weight_OI.double().T + low.double() @ member.b_Or.double().T + member.bias_O.double()
    # Each rounding errs by 2**-9 of its number at most, some 0.0017 of it in the mean square; two meet in a result.
    assert ((ordered_matmul(x, [member], low).double() - exact).norm() / exact.norm()).item() <= 4e-3


def test_no_race_and_nan_shows() -> None:
    members = dense_members(make([6144], 4096, 32, False, torch.bfloat16), torch.bfloat16)
    x, low = torch.randn(6, 4096, device="cuda").bfloat16(), torch.randn(6, 32, device="cuda").bfloat16()
    first = ordered_matmul(x, members, low)
    for _ in range(50):
        assert torch.equal(ordered_matmul(x, members, low), first)
    x[2, 7] = float("nan")
    found = ordered_matmul(x, members, low)
    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3, 4, 5]], first[[0, 1, 3, 4, 5]])
