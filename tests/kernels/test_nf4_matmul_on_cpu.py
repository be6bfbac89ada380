"""``nf4_matmul.cu`` itself on a CPU: a thread for each of CUDA's, its instructions in C++ (``cuda_on_cpu.h``).

What a GPU alone can show, bits of its matrix instruction and speed, is tested there; here, on odd sizes, which element
goes where, who waits for whom, and that nothing is read before it is written (shared memory begins as NaN, and copies
to it happen when they are waited for). So with a launch that begins before x is whole, and that nothing is done too
early there. Not seen: a missing wait of a warp for its own lanes.
"""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pronghorn.kernels import nf4_matmul_cuda
from pronghorn.kernels.cuda_source import pointer
from pronghorn.kernels.nf4 import quantize_nf4
from pronghorn.kernels.nf4_code import dynamic_code
from pronghorn.kernels.nf4_matmul import Member
from pronghorn.kernels.nf4_matmul_cuda import Low, Tile
from pronghorn.kernels.reference import nf4_matmul as reference
from pronghorn.kernels.reference.low_rank import low_rank
from pronghorn.quant.nf4 import NF4Tensor
from tests.kernels import on_cpu

BF16, F16 = torch.bfloat16, torch.float16
GIVEN = Low()

pytestmark = on_cpu.needs_compiler


def compiled(
    tile: Tile,
    nested: bool,
    rank: int,
    dtype: torch.dtype,
    folder: Path,
    chain: bool = False,
    low: Low = GIVEN,
    changed: tuple[str, str] = ("", ""),
) -> ctypes.CDLL:
    defines = nf4_matmul_cuda._defines(tile, nested, rank // 16, dtype == F16, chain, low)
    return on_cpu.compiled(nf4_matmul_cuda._source(), "nf4_matmul", defines, folder, changed)


def weight(O: int, K: int, nested: bool, dtype: torch.dtype) -> NF4Tensor:  # noqa: E741
    dense = (torch.randn(O, K) * torch.linspace(0.01, 0.1, O)[:, None]).to(dtype)
    if nested:
        return NF4Tensor.quantize(dense).in_tiles()
    codes, scales = quantize_nf4(dense)
    return NF4Tensor(codes, scales, None, None, (O, K), dtype=dtype).in_tiles()


CASES = {
    # one warp for its outputs: x whole, or in stages; outputs that are no whole block, rows no whole tile
    "x whole": (Tile(2, 1, 2, 8, 512, 1, 256), 5, [40, 24], 512, 32, False, True, BF16),
    "two stages, a bias": (Tile(2, 1, 2, 8, 256, 2, 256), 8, [40, 24], 768, 16, True, True, F16),
    "8 outputs a warp, plain scales": (Tile(3, 1, 1, 8, 256, 3, 256), 3, [40], 512, 0, True, False, BF16),
    "stages filled often": (Tile(4, 1, 2, 8, 256, 3, 256), 6, [40, 24], 2560, 32, False, True, BF16),
    "a panel that is not whole": (Tile(2, 1, 2, 8, 512, 2, 256), 1, [16], 768, 32, False, True, BF16),
    "16 rows": (Tile(2, 1, 2, 16, 256, 3, 256), 13, [40, 24], 1024, 32, False, True, BF16),
    "32 rows, 32 outputs a warp": (Tile(1, 1, 4, 32, 512, 2, 256), 27, [40, 8], 512, 32, False, True, F16),
    "blocks of rows": (Tile(2, 1, 2, 16, 512, 1, 256), 37, [40], 512, 16, False, True, BF16),
    "short groups": (Tile(4, 1, 2, 8, 512, 1, 256, 2), 6, [80, 40], 512, 32, False, True, BF16),
    "short groups, 16 rows, a bias": (Tile(2, 1, 4, 16, 256, 2, 256, 1), 13, [72, 40], 768, 16, True, True, F16),
    # blocks with outputs of two members, or three; the last one not whole
    "members side by side": (Tile(3, 1, 2, 8, 512, 1, 256), 6, [32, 16, 64], 512, 32, False, True, BF16),
    "members side by side, a bias": (Tile(4, 1, 1, 8, 256, 2, 256), 5, [16, 8, 32], 512, 16, True, True, F16),
    "turns, members side by side": (Tile(3, 2, 2, 8, 256, 3, 128), 6, [32, 16, 64], 1024, 32, False, True, BF16),
    "16 rows, members side by side": (Tile(3, 2, 2, 16, 256, 3, 128), 13, [64, 32], 768, 32, False, True, BF16),
    # a part of the weights looked up without the table, or all of them
    "some permuted": (Tile(4, 1, 2, 8, 512, 1, 256, 2, 0x49), 6, [80, 40], 512, 32, False, True, BF16),
    "all permuted": (Tile(2, 3, 2, 8, 512, 3, 256, 0, 0xFF), 6, [40, 24], 1280, 32, False, True, BF16),
    "some permuted, 32 rows": (Tile(1, 1, 4, 32, 512, 2, 256, 0, 0x5A5A), 27, [40, 8], 512, 32, False, True, F16),
    # several that take turns: x all there, its stages filled again, warps that miss whole panels; more chunks than
    # warps, fewer, a bias, more rows
    "turns, x whole": (Tile(2, 3, 2, 8, 512, 3, 256), 6, [40, 24], 1280, 32, False, True, BF16),
    "turns, two stages": (Tile(2, 3, 2, 8, 256, 2, 256), 6, [40, 24], 1280, 32, False, True, BF16),
    "turns, three stages filled often": (Tile(3, 4, 2, 8, 256, 3, 128), 7, [40], 3072, 32, False, True, BF16),
    "warps that miss panels": (Tile(2, 5, 2, 8, 256, 2, 128), 4, [40], 2304, 16, False, True, BF16),
    "more warps than turns": (Tile(1, 6, 2, 8, 256, 2, 256), 2, [24], 512, 32, False, True, BF16),
    "short turns, a bias": (Tile(1, 4, 2, 8, 512, 1, 128), 8, [24], 512, 16, True, True, F16),
    "turns of 16 rows": (Tile(2, 2, 2, 16, 256, 3, 128), 11, [40], 1024, 32, False, True, BF16),
    "turns of 32 rows, plain scales": (Tile(1, 3, 2, 32, 256, 2, 128), 30, [16], 512, 32, False, False, BF16),
    "turns of 64 rows": (Tile(2, 3, 2, 64, 256, 3, 128), 50, [40], 1280, 32, False, True, BF16),
}


class Made(NamedTuple):
    """A case's operands, and what the reference makes of them."""

    members: list[Member]
    x: torch.Tensor
    low: torch.Tensor | None
    expected: torch.Tensor

    def check(self, y: torch.Tensor) -> None:
        # Sums in another order: a value near the middle of two may be rounded to the other one.
        ulp = torch.finfo(y.dtype).eps
        torch.testing.assert_close(y, self.expected, rtol=ulp, atol=ulp * self.expected.abs().max().item() / 64)
        assert (y != self.expected).float().mean() <= 0.01


def made(case: str) -> Made:
    return operands_of(*CASES[case][1:])


def operands_of(
    M: int,
    outputs: list[int],
    K: int,
    rank: int,
    bias: bool,
    nested: bool,
    dtype: torch.dtype,
    bare: bool = False,
) -> Made:
    """``bare``: the first member has no adapter."""
    members = [
        Member(
            weight(O, K, nested, dtype),
            (torch.randn(O, rank) * 0.1).to(dtype) if rank and (i or not bare) else None,
            i * rank,
            torch.randn(O).to(dtype) if bias else None,
        )
        for i, O in enumerate(outputs)  # noqa: E741
    ]
    x = torch.randn(M, K).to(dtype)
    low = torch.randn(M, rank * len(outputs)).to(dtype) if rank else None
    expected = torch.empty(M, sum(outputs), dtype=dtype)
    reference.nf4_matmul(x, [Member(m.weight, m.b_Or, m.at) for m in members], low, expected)
    if bias:  # the kernel rounds the product before it adds the bias, as cuBLAS does
        expected += torch.cat([m.bias_O for m in members if m.bias_O is not None])
    return Made(members, x, low, expected)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, tmp_path: Path) -> None:
    tile, M, _, _, rank, _, nested, dtype = CASES[case]
    operands = made(case)
    x, y = operands.x, torch.full_like(operands.expected, float("nan"))
    args, blocks = nf4_matmul_cuda.arguments(x, operands.members, operands.low, y, tile, dynamic_code(x.device))
    compiled(tile, nested, rank, dtype, tmp_path).run(ctypes.byref(args), blocks, -(-M // tile.rows), 1)
    operands.check(y)
    assert pointer(y) == args.y


@pytest.mark.parametrize("case", ["members side by side", "turns, members side by side"])
def test_members_of_one_block_may_differ_in_adapter_and_bias(case: str, tmp_path: Path) -> None:
    """The second without an adapter; the third has one of half the rank, on later columns, and a bias."""
    tile, M, _, _, rank, _, nested, dtype = CASES[case]
    (first, second, third), x, low, _ = made(case)
    assert third.b_Or is not None and low is not None
    short = dataclasses.replace(third, b_Or=third.b_Or[:, :16].contiguous(), at=third.at + 16)
    members = [first, dataclasses.replace(second, b_Or=None, at=0), short]
    bias = torch.randn(third.weight.shape[0]).to(dtype)
    expected = torch.empty(M, sum(m.weight.shape[0] for m in members), dtype=dtype)
    reference.nf4_matmul(x, members, low, expected)
    expected[:, -len(bias) :] += bias
    members[2] = dataclasses.replace(short, bias_O=bias)
    y = torch.full_like(expected, float("nan"))
    args, blocks = nf4_matmul_cuda.arguments(x, members, low, y, tile, dynamic_code(x.device))
    assert args.joined
    compiled(tile, nested, rank, dtype, tmp_path).run(ctypes.byref(args), blocks, -(-M // tile.rows), 1)
    Made(members, x, low, expected).check(y)


class Before(ctypes.Structure):
    """As in ``cuda_on_cpu.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("late", "whole", "low", "y")),
        *((name, ctypes.c_longlong) for name in ("late_bytes", "low_bytes", "y_elements")),
        ("early", ctypes.c_int),
    )


def unwritten(like: torch.Tensor) -> torch.Tensor:
    return torch.full_like(like, -1, dtype=torch.int16).view(like.dtype)


def begun_early(case: str, folder: Path, blocks: int, changed: tuple[str, str] = ("", "")) -> tuple[int, int]:
    """How much a launch that begins while the kernel before runs did too early, and the counts after two in a row.

    That kernel makes x, of which so many blocks make ``x A^T``, or, with none, it makes that. Results are checked where
    nothing was too early.
    """
    tile, M, _, K, rank, bias, nested, dtype = CASES[case]
    operands = made(case)
    assert operands.low is not None
    ranks = operands.low.shape[1] - 5  # of the last tile some are no rank
    a, counts = (torch.randn(ranks, K) * K**-0.5).to(dtype), torch.zeros(64, dtype=torch.int32)
    parts = torch.full((8 * 128 * -(-ranks // 16),), float("nan"))
    low = Low(blocks, 64 if blocks == 1 else 128) if blocks else GIVEN
    if blocks:
        whole = torch.zeros_like(operands.low)
        low_rank(operands.x, a, whole[:, :ranks])
        for m in operands.members:
            assert m.b_Or is not None
            m.b_Or[:, max(ranks - m.at, 0) :] = 0
        reference.nf4_matmul(operands.x, operands.members, whole, operands.expected)
    run, early = compiled(tile, nested, rank, dtype, folder, True, low, changed).run_early, 0
    for _ in range(2):
        x, lows, y = operands.x, unwritten(operands.low), unwritten(operands.expected)
        late, comes = lows, operands.low
        if blocks:
            x = late = unwritten(operands.x)
            comes = operands.x
        given = (a, counts, parts) if blocks else ()
        args, rest = nf4_matmul_cuda.arguments(x, operands.members, lows, y, tile, dynamic_code(x.device), *given)
        before = Before(
            pointer(late), pointer(comes), pointer(lows) if blocks else 0, pointer(y),
            late.nbytes, lows.nbytes if blocks else 0, y.numel(), 0,
        )  # fmt: skip
        run(ctypes.byref(args), blocks + rest, -(-M // tile.rows), ctypes.byref(before))
        early += before.early
        if not early:
            operands.check(y)
    return early, int(counts.count_nonzero())


EARLY = [
    "x whole",
    "stages filled often",
    "short groups",
    "turns, x whole",
    "turns, two stages",
    "warps that miss panels",
    "turns, members side by side",
]


@pytest.mark.parametrize("blocks", [1, 4])
@pytest.mark.parametrize("case", EARLY)
def test_begun_before_x_is_whole_it_waits_and_makes_what_it_needs(case: str, blocks: int, tmp_path: Path) -> None:
    assert begun_early(case, tmp_path, blocks) == (0, 0)


@pytest.mark.parametrize("case", ["x whole", "blocks of rows", "turns, two stages", "turns of 64 rows"])
def test_begun_before_its_low_rank_is_there_it_waits_for_it(case: str, tmp_path: Path) -> None:
    assert begun_early(case, tmp_path, 0) == (0, 0)


CHANGES = {
    "x is not waited for": ("BEFORE_HAS_ENDED;  // it makes x", "waited = true;"),
    "x is read at once": ("#if !(CHAIN && LOW)\n    begin_x();", "#if CHAIN && LOW\n    begin_x();"),
    "who makes x A^T does not wait for x": ("#if CHAIN\n    BEFORE_HAS_ENDED;", "#if CHAIN\n    waited = true;"),
    "low is not waited for": ("while (!flag_read(LOW_FLAG(args))) PAUSE;", ""),
    "low is not heard of": ("    counter_wait(low_is_there, 0);", ""),
    "low is told before it is whole": ("*last != LOW - 1", "*last != 0"),
    "the count stays": ("args.counts[0] = 0;", ""),
    "not all are counted": ("gridDim.x - LOW);", "gridDim.x - LOW + 1);"),
    "the next begins at once": ("#if CHAIN && !LOW\n    NEXT", "#if CHAIN\n    NEXT"),
}


@pytest.mark.parametrize("case", ["x whole", "turns, x whole"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_too_early_shows(change: str, case: str, tmp_path: Path) -> None:
    early, counts = begun_early(case, tmp_path, 2, CHANGES[change])
    assert early > 0 or counts > 0


@pytest.mark.parametrize("case", ["x whole", "turns, x whole"])
@pytest.mark.parametrize(
    "changed",
    [
        ("#elif CHAIN\n    BEFORE_HAS_ENDED;", "#elif CHAIN\n"),
        ("#elif CHAIN\n    BEFORE_HAS_ENDED;", "#elif CHAIN\n    args.y[threadIdx.x] = 0;\n    BEFORE_HAS_ENDED;"),
    ],
    ids=["low is not waited for", "y is written too soon"],
)
def test_what_is_done_before_low_is_given_shows(changed: tuple[str, str], case: str, tmp_path: Path) -> None:
    assert begun_early(case, tmp_path, 0, changed)[0] > 0
