"""The product with NF4 weights of 17 to 64 rows by Hopper's wide instruction: the bits of ``nf4_matmul.cu``, which are
those of cuBLAS (``test_nf4_matmul.py``).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pronghorn.kernels.launch import before_a_start, chained, has_copy_engine
from pronghorn.kernels.low_rank import low_rank
from pronghorn.kernels.nf4_matmul import Member, makes_low, nf4_matmul
from pronghorn.kernels.nf4_matmul_cuda import nf4_matmul as narrow
from pronghorn.kernels.nf4_wide_cuda import WideTile, chosen, nf4_wide, wide_tile_for
from pronghorn.kernels.rms_norm import norm_forward
from tests.gpu.test_nf4_matmul import group, single


@pytest.fixture(autouse=True)
def on_hopper() -> None:
    if not has_copy_engine(torch.empty(1, device="cuda")):
        pytest.skip("a GPU with no copy engine")


def made(M: int, outputs: list[int], I: int, rank: int, bias: bool, dtype: torch.dtype):  # noqa: E741
    members = group(outputs, I, rank, bias, dtype)
    x, low, expected = inputs(M, members, dtype)
    return x, members, low, expected


def inputs(M: int, members: list[Member], dtype: torch.dtype):
    ranks, outputs = sum(m.rank for m in members), sum(m.weight.shape[0] for m in members)
    x = torch.randn(M, members[0].weight.shape[1], device="cuda").to(dtype)
    low = torch.randn(M, ranks, device="cuda").to(dtype) if ranks else None
    return x, low, torch.empty(M, outputs, device="cuda", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("outputs", "I", "rank", "bias", "groups", "rest"),
    [
        ([14336, 14336], 4096, 32, False, 16, (2, 4, 2)),  # as an 8B Llama's gate and up take it
        ([4096, 1024, 1024], 4096, 16, True, 4, (1, 4, 2)),
        ([4096], 14336, 64, False, 16, (0, 3, 2)),
        ([1000, 72, 520], 768, 32, True, 8, (3, 3, 1)),  # outputs that are no multiple of a block
        ([2048], 256, 0, False, 12, (0, 3, 2)),
        ([2048, 264], 256, 48, True, 8, (0, 2, 4)),
        ([2048], 512, 16, False, 4, (3, 3, 2)),  # low is narrower than a block of it
    ],
    ids=str,
)
def test_same_bits(
    outputs: list[int],
    I: int,  # noqa: E741
    rank: int,
    bias: bool,
    groups: int,
    rest: tuple[int, int, int],
    dtype: torch.dtype,
) -> None:
    members = group(outputs, I, rank, bias, dtype)
    for M in (1, 17, 32, 33, 50, 64):
        x, low, expected = inputs(M, members, dtype)
        narrow(x, members, low, expected)
        for tile in (WideTile(groups, 32, *rest), WideTile(groups, 64, *rest)):
            if tile.rows < M:
                continue
            found = torch.full_like(expected, float("nan"))
            nf4_wide(x, members, low, found, tile)
            assert torch.equal(found, expected), f"{M} rows, {tile}: {(found != expected).float().mean():.4f} differ"


def test_scales_of_32_bits_and_a_member_without_an_adapter() -> None:
    x, members, low, expected = made(40, [512, 256], 1024, 32, False, torch.bfloat16)
    plain = [dataclasses.replace(m, weight=single(m.weight, torch.bfloat16)) for m in members]
    plain[0] = dataclasses.replace(plain[0], b_Or=None, at=0)
    narrow(x, plain, low, expected)
    found = torch.full_like(expected, float("nan"))
    nf4_wide(x, plain, low, found, WideTile(8, 64, 1, 3, 2))
    assert torch.equal(found, expected)


def test_views_and_which_kernel_it_is() -> None:
    """x and low beside each other in one table; outputs in a wider one. Odd places are for the other kernel."""
    M, K = 64, 1024
    _, members, _, expected = made(M, [4096, 2048], K, 32, False, torch.bfloat16)
    table = torch.randn(M, K + 64, device="cuda").bfloat16()
    x, low = table[:, :K], table[:, K:]
    wider = torch.zeros(M, 6160, device="cuda", dtype=torch.bfloat16)
    found = wider[:, 8:6152]
    assert chosen(x, members, low, found) == wide_tile_for(M, [4096, 2048], K, [32, 32])
    assert chosen(x, members, low, found) is not None
    narrow(x, members, low, expected)
    nf4_matmul(x, members, low, found)
    assert torch.equal(found, expected)
    assert not wider[:, :8].any() and not wider[:, 6152:].any()
    odd = torch.empty(M, 6145, device="cuda", dtype=torch.bfloat16)[:, :6144]
    assert chosen(x, members, low, odd) is None
    assert torch.equal(nf4_matmul(x, members, low, odd), expected)


def test_no_race_and_nan_shows() -> None:
    x, members, low, first = made(50, [14336, 14336], 4096, 32, False, torch.bfloat16)
    assert chosen(x, members, low, first) == WideTile(16, 64, 2, 4, 2)
    narrow(x, members, low, first)
    for _ in range(100):
        assert torch.equal(nf4_matmul(x, members, low), first)
    x[2, 7] = float("nan")
    found, rest = nf4_matmul(x, members, low), [i for i in range(50) if i != 2]
    assert found[2].isnan().all() and torch.equal(found[rest], first[rest])


@pytest.mark.parametrize("M", [20, 64])
@pytest.mark.parametrize("outputs", [[14336, 14336], [40960]], ids=["one a processor", "more"])
def test_begun_beside_the_low_rank_product_it_has_the_same_bits(outputs: list[int], M: int) -> None:
    members = group(outputs, 4096, 32, False, torch.bfloat16)
    a = torch.randn(32 * len(outputs), 4096, device="cuda").bfloat16()
    xs = [torch.randn(M, 4096, device="cuda").bfloat16() for _ in range(30)]
    expected = [torch.empty(M, sum(outputs), device="cuda", dtype=torch.bfloat16) for _ in xs]
    for x, y in zip(xs, expected):
        low = low_rank(x, a)
        assert chosen(x, members, low, y) is not None
        narrow(x, members, low, y)
    torch.cuda.synchronize()
    begun = [nf4_matmul(x, members, low_rank(x, a), overlap=True) for x in xs]
    with chained():
        early = [nf4_matmul(x, members, low_rank(x, a), overlap=True) for x in xs]
    for found in (begun, early):
        assert all(torch.equal(own, y) for own, y in zip(found, expected))


@pytest.mark.parametrize("M", [17, 32, 33, 64])
@pytest.mark.parametrize("outputs", [[14336, 14336], [40960]], ids=["one a processor", "more"])
def test_made_in_its_launch_the_low_rank_product_has_the_same_bits(outputs: list[int], M: int) -> None:
    """Apart, and behind norms that let it begin at once, each time on other inputs."""
    members, R = group(outputs, 4096, 32, False, torch.bfloat16), 32 * len(outputs)
    a = (torch.randn(R, 4096, device="cuda") / 64).bfloat16()
    weight = torch.randn(4096, device="cuda").bfloat16()
    assert makes_low(M, members, a)
    raw = [torch.randn(M, 4096, device="cuda").bfloat16() for _ in range(30)]
    xs = [norm_forward(x, weight, 1e-5)[0] for x in raw]
    lows = [low_rank(x, a) for x in xs]
    expected = [nf4_matmul(x, members, low) for x, low in zip(xs, lows)]
    torch.cuda.synchronize()
    for x, y, low in zip(xs, expected, lows):
        here = torch.full_like(low, float("nan"))
        assert torch.equal(nf4_matmul(x, members, here, a_RI=a), y) and torch.equal(here, low)
    early = []
    with chained():
        for x in raw:
            with before_a_start():
                normed = norm_forward(x, weight, 1e-5)[0]
            early.append(nf4_matmul(normed, members, x.new_empty(M, R), a_RI=a))
    assert all(torch.equal(own, y) for own, y in zip(early, expected))


def test_what_it_does_not_take_is_an_error() -> None:
    x, members, low, out = made(40, [512, 256], 1024, 32, False, torch.bfloat16)
    with pytest.raises(ValueError, match="give up to 32 rows"):
        nf4_wide(x, members, low, out, WideTile(4, 32, 0, 3, 2))
    with pytest.raises(ValueError, match="groups in fours"):
        nf4_wide(x, members, low, out, WideTile(6, 64, 0, 3, 2))
    codes = torch.empty(members[1].weight.codes.numel() + 8, dtype=torch.uint8, device="cuda")[8:]
    odd = dataclasses.replace(members[1], weight=dataclasses.replace(members[1].weight, codes=codes))
    assert chosen(x, [members[0], odd], low, out) is None
    with pytest.raises(ValueError, match="codes with rows"):
        nf4_wide(x, [members[0], odd], low, out, WideTile(4, 64, 0, 3, 2))
    for tile in (WideTile(4, 64, 0, 2, 2), WideTile(4, 64, 4, 3, 2), WideTile(4, 64, 0, 3, 3)):
        with pytest.raises(ValueError, match="give 0 to 3 idle warps"):
            nf4_wide(x, members, low, out, tile)
    assert members[0].b_Or is not None
    other = [Member(members[0].weight, members[0].b_Or[:, :16].contiguous(), 0, None), members[1]]
    with pytest.raises(ValueError, match=r"ranks \[16, 32\]"):
        nf4_wide(x, other, low, out, WideTile(4, 64, 0, 3, 2))
