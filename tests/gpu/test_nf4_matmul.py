"""The product with NF4 weights on a GPU: the bits of cuBLAS on the dequantized weights, whatever the number of rows."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from pronghorn.kernels.launch import Launcher, before_a_start, chained
from pronghorn.kernels.low_rank import low_rank
from pronghorn.kernels.nf4 import quantize_nf4
from pronghorn.kernels.nf4_matmul import LOW_ROWS, Member, nf4_matmul
from pronghorn.kernels.nf4_matmul_cuda import Tile
from pronghorn.kernels.nf4_matmul_cuda import nf4_matmul as launch
from pronghorn.kernels.rms_norm import norm_forward
from pronghorn.quant.nf4 import NF4Tensor

ROWS = 512
"""With so many rows cuBLAS does not split the sum on the shapes below."""


def weight(O: int, I: int, dtype: torch.dtype) -> NF4Tensor:  # noqa: E741
    w = torch.randn(O, I, device="cuda") * torch.linspace(0.01, 0.05, O, device="cuda")[:, None]
    w.view(-1)[64:128] = 0
    return NF4Tensor.quantize(w.to(dtype)).in_tiles()


def single(nf4: NF4Tensor, dtype: torch.dtype) -> NF4Tensor:
    """About the same weight with float32 scales."""
    codes, scales = quantize_nf4(nf4.dequantize(dtype))
    return NF4Tensor(codes, scales, None, None, nf4.shape, dtype=dtype).in_tiles()


def group(outputs: list[int], I: int, rank: int, bias: bool, dtype: torch.dtype) -> list[Member]:  # noqa: E741
    made = []
    for i, O in enumerate(outputs):  # noqa: E741
        b = (torch.randn(O, rank, device="cuda") * 0.05).to(dtype) if rank else None
        made.append(Member(weight(O, I, dtype), b, i * rank, torch.randn(O, device="cuda").to(dtype) if bias else None))
    return made


def by_cublas(x: torch.Tensor, members: list[Member], low: torch.Tensor | None) -> torch.Tensor:
    """``[x | low] [W | s B]^T`` as training multiplies it, bias first."""
    R = 0 if low is None else low.shape[1]
    outs = []
    for m in members:
        O, I = m.weight.shape  # noqa: E741
        wide = torch.zeros(O, I + R, dtype=x.dtype, device="cuda")
        m.weight.dequantize(x.dtype, out=wide[:, :I])
        if m.b_Or is not None:
            wide[:, I + m.at : I + m.at + m.b_Or.shape[1]] = m.b_Or
        left = x if low is None else torch.cat((x, low), dim=1)
        if m.bias_O is None:
            outs.append(left @ wide.T)
        else:  # cuBLAS rounds the product to 16 bits before it adds what lies in the output
            outs.append(m.bias_O.expand(len(x), O).contiguous().addmm_(left, wide.T))
    return torch.cat(outs, dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("outputs", "I", "rank", "bias"),
    [
        ([4096, 1024, 1024], 4096, 32, False),
        ([4096], 4096, 32, False),
        ([2048, 2048], 4096, 64, False),
        ([4096], 14336, 16, False),
        ([4096, 1024, 1024], 4096, 0, True),
        ([14336, 14336], 4096, 32, False),
        ([1000, 72], 1024, 32, True),  # outputs that are no multiple of a tile
    ],
)
def test_bits_are_those_of_the_trainer_s_product(outputs, I, rank, bias, dtype) -> None:  # noqa: E741
    members = group(outputs, I, rank, bias, dtype)
    x = torch.randn(ROWS, I, device="cuda").to(dtype)
    low = torch.randn(ROWS, rank * len(outputs), device="cuda").to(dtype) if rank else None
    expected = by_cublas(x, members, low)
    for M in (1, 3, 8, 9, 16, 31, 64):
        found = nf4_matmul(x[:M].contiguous(), members, None if low is None else low[:M].contiguous())
        assert torch.equal(found, expected[:M]), f"{M} rows: {(found != expected[:M]).float().mean():.4f} differ"


@pytest.mark.parametrize(
    "tile",
    [
        Tile(1, 1, 2, 8, 2048, 1, 256),
        Tile(14, 1, 2, 8, 512, 3, 256),
        Tile(16, 1, 2, 8, 2048, 1, 256, 4),
        Tile(8, 1, 4, 16, 512, 2, 256, 3),
        Tile(5, 1, 1, 8, 1024, 2, 256),
        Tile(7, 2, 4, 8, 512, 3, 128),
        Tile(14, 1, 2, 16, 2048, 1, 256),
        Tile(7, 1, 4, 64, 256, 3, 256),
        Tile(4, 1, 2, 32, 1024, 2, 256),
        Tile(1, 8, 2, 8, 256, 3, 256),
        Tile(2, 6, 2, 8, 2048, 1, 128),
        Tile(3, 5, 2, 8, 512, 2, 256),
        Tile(2, 8, 2, 8, 256, 2, 128),
        Tile(3, 4, 2, 16, 256, 4, 128),
        Tile(2, 3, 2, 64, 256, 3, 128),
    ],
)
def test_tiles_change_no_bit(tile: Tile) -> None:
    members = group([512, 256], 2048, 32, False, torch.bfloat16)
    x, low = torch.randn(20, 2048, device="cuda").bfloat16(), torch.randn(20, 64, device="cuda").bfloat16()
    found = torch.full((20, 768), float("nan"), device="cuda", dtype=torch.bfloat16)
    launch(x, members, low, found, tile)
    assert torch.equal(found, nf4_matmul(x, members, low))


def test_single_quantization() -> None:
    plain = single(weight(512, 1024, torch.bfloat16), torch.bfloat16)
    x = torch.randn(ROWS, 1024, device="cuda").bfloat16()
    assert torch.equal(nf4_matmul(x[:6].contiguous(), [Member(plain)]), (x @ plain.dequantize(torch.bfloat16).T)[:6])


def test_error_is_one_rounding() -> None:
    members = group([4096], 4096, 32, False, torch.bfloat16)
    x, low = torch.randn(6, 4096, device="cuda").bfloat16(), torch.randn(6, 32, device="cuda").bfloat16()
    dense, b = members[0].weight.dequantize(torch.bfloat16), members[0].b_Or
    assert b is not None
    exact = x.double() @ dense.double().T + low.double() @ b.double().T
    assert ((nf4_matmul(x, members, low).double() - exact).norm() / exact.norm()).item() <= 2e-3


def test_no_race_and_nan_shows() -> None:
    members = group([6144], 4096, 32, False, torch.bfloat16)
    x, low = torch.randn(6, 4096, device="cuda").bfloat16(), torch.randn(6, 32, device="cuda").bfloat16()
    first = nf4_matmul(x, members, low)
    for _ in range(50):
        assert torch.equal(nf4_matmul(x, members, low), first)
    x[2, 7] = float("nan")
    found = nf4_matmul(x, members, low)
    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3, 4, 5]], first[[0, 1, 3, 4, 5]])


@pytest.mark.parametrize("outputs", [[512, 256], [28672], [40960]], ids=["turns", "none", "more than one a processor"])
def test_begun_beside_the_low_rank_product_it_has_the_same_bits(outputs: list[int]) -> None:
    members = group(outputs, 4096, 32, False, torch.bfloat16)
    a = torch.randn(32 * len(outputs), 4096, device="cuda").bfloat16()
    xs = [torch.randn(6, 4096, device="cuda").bfloat16() for _ in range(50)]
    expected = [nf4_matmul(x, members, low_rank(x, a)) for x in xs]
    torch.cuda.synchronize()
    begun = [nf4_matmul(x, members, low_rank(x, a), overlap=True) for x in xs]
    within = [with_low_rank(x, a, members) for x in xs]
    with chained():
        early = [nf4_matmul(x, members, low_rank(x, a), overlap=True) for x in xs]
        row = [with_low_rank(x, a, members) for x in xs]  # one right after another
    for found in (begun, within, early, row):
        assert all(torch.equal(own, y) for own, y in zip(found, expected))


@pytest.mark.parametrize(("I", "rank"), [(4096, 16), (4096, 160), (14336, 32), (768, 48)])
@pytest.mark.parametrize("M", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_low_rank_product_within_is_that_of_its_own_launch(M: int, I: int, rank: int, dtype: torch.dtype) -> None:  # noqa: E741
    members = group([512], I, rank, False, dtype)
    x, a = torch.randn(M, I, device="cuda").to(dtype), (torch.randn(rank - 5, I, device="cuda") * I**-0.5).to(dtype)
    low, expected = (torch.full((M, rank), float("nan"), device="cuda", dtype=dtype) for _ in range(2))
    assert members[0].b_Or is not None
    members[0].b_Or[:, -5:] = 0
    y = nf4_matmul(x, members, low, a_RI=a)
    low_rank(x, a, expected[:, : rank - 5])
    assert torch.equal(low[:, : rank - 5], expected[:, : rank - 5]) and low.isfinite().all()
    assert torch.equal(y, nf4_matmul(x, members, low))


def with_low_rank(x: torch.Tensor, a: torch.Tensor, members: list[Member]) -> torch.Tensor:
    """As ``rollout/native/products.py`` multiplies: in one launch, or in two."""
    if len(x) <= LOW_ROWS:
        return nf4_matmul(x, members, x.new_empty(len(x), len(a)), a_RI=a)
    return nf4_matmul(x, members, low_rank(x, a), overlap=True)


@triton.jit
def _slow_copy(from_ptr, to_ptr, elements, one, rounds, BLOCK: tl.constexpr, CHAIN: tl.constexpr):
    """A kernel of a chain that takes its time between letting the next begin and writing."""
    if CHAIN == 2:
        gdc_launch_dependents()
    if CHAIN:
        gdc_wait()
    if CHAIN == 1:
        gdc_launch_dependents()
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(from_ptr + i, mask=i < elements).to(tl.float32)
    for _ in range(rounds):
        value = value * one
    tl.store(to_ptr + i, value.to(to_ptr.dtype.element_ty), mask=i < elements)


_slow = Launcher(_slow_copy, chains=True, hurries=True)


@pytest.mark.parametrize("M", [1, 6, 16, 40])
@pytest.mark.parametrize("normed", [False, True], ids=["copy", "copy, norm"])
@pytest.mark.parametrize("outputs", [[512, 256], [4096], [28672]], ids=["small", "turns", "none"])
def test_begun_before_x_is_whole_it_has_the_same_bits(outputs: list[int], normed: bool, M: int) -> None:
    """Three products a graph; x of the replay before lies where x will be. What makes it takes some 50
    microseconds from letting the next begin on, or is the norm behind such a kernel.
    """
    I, links = 4096, 3  # noqa: E741
    members = group(outputs, I, 32, False, torch.bfloat16)
    a = torch.randn(32 * len(outputs), I, device="cuda").bfloat16()
    weight_D = torch.rand(I, device="cuda").bfloat16()
    given = torch.randn(links, M, I, device="cuda").bfloat16()
    copied = torch.zeros_like(given)
    first = torch.empty(8, device="cuda")

    def made_of(x: torch.Tensor) -> torch.Tensor:
        return norm_forward(x, weight_D, 1e-5, None)[0] if normed else x

    def walk() -> list[torch.Tensor]:
        found = []
        first.fill_(1.0)  # launched as usual, as a step's embedding is
        with chained():
            for source, x in zip(given, copied):
                with before_a_start(M <= LOW_ROWS):
                    _slow((triton.cdiv(M * I, 1024),), source, x, M * I, 1.0, 20000, 1024, num_warps=4)
                    made = made_of(x)
                found.append(with_low_rank(made, a, members))
        return found

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        walk()  # compiles, and makes workspaces
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = walk()
    for replay in range(100):
        with torch.cuda.stream(stream):
            given.normal_()
            expected = [nf4_matmul(made_of(x), members, low_rank(made_of(x), a)) for x in given]
            graph.replay()
            if replay % 10 == 9:
                graph.replay()  # one right after another
            eager = walk()
        stream.synchronize()
        for ys in (found, eager):
            assert all(torch.equal(y, own) for y, own in zip(ys, expected)), replay


@pytest.mark.parametrize(("I", "R"), [(4096, 96), (14336, 32), (4096, 64)])
def test_low_rank_bits_do_not_depend_on_the_rows(I: int, R: int) -> None:  # noqa: E741
    x, a = torch.randn(1500, I, device="cuda").bfloat16(), torch.randn(R, I, device="cuda").bfloat16()
    whole = low_rank(x, a)
    exact = x.double() @ a.double().T
    assert ((whole.double() - exact).norm() / exact.norm()).item() <= 2e-3
    for M in (1, 6, 64, 200, 300, 1499):
        for _ in range(3):
            assert torch.equal(low_rank(x[:M], a), whole[:M])
