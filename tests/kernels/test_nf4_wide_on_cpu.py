"""``nf4_wide.cu`` itself on a CPU, as ``test_nf4_matmul_on_cpu.py`` has its kernel.

Copies come when they are waited for, to a place where nothing is left of what was there. Not seen: what the wide
products read while it is written again, as they are done at once here.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from pronghorn.kernels import low_blocks, nf4_wide_cuda
from pronghorn.kernels.cuda_source import Map, pointer
from pronghorn.kernels.nf4_code import dynamic_code
from pronghorn.kernels.nf4_matmul_cuda import arguments
from pronghorn.kernels.nf4_wide_cuda import WideArgs, WideTile
from pronghorn.kernels.reference import nf4_matmul as reference
from pronghorn.kernels.reference.nf4_matmul import Member
from tests.kernels import on_cpu
from tests.kernels.test_nf4_matmul_on_cpu import BF16, F16, Before, Made, operands_of, unwritten

pytestmark = on_cpu.needs_compiler


class Case(NamedTuple):
    tile: WideTile
    M: int
    outputs: list[int]
    K: int
    rank: int
    bias: bool
    nested: bool
    dtype: torch.dtype


CASES = {
    "blocks that are not whole": Case(WideTile(4, 64, 0, 3, 2), 50, [72, 40], 512, 32, False, True, BF16),
    "as an 8B Llama's are": Case(WideTile(8, 64, 2, 4, 2), 64, [192, 40], 1280, 32, False, True, BF16),
    "stages of 64 columns": Case(WideTile(4, 32, 1, 3, 1), 20, [48], 1024, 16, False, True, BF16),
    "two stages, filled often": Case(WideTile(4, 32, 0, 2, 4), 32, [64], 1280, 16, False, True, BF16),
    "three stages, two groups": Case(WideTile(8, 64, 2, 3, 2), 64, [136], 1536, 64, False, True, BF16),
    "fewer chunks than stages, a bias": Case(WideTile(4, 32, 1, 3, 4), 17, [24, 16, 8], 256, 16, True, True, F16),
    "no adapter, plain scales": Case(WideTile(4, 64, 3, 4, 1), 33, [48], 768, 0, False, False, BF16),
}


def made(case: Case) -> Made:
    torch.manual_seed(0)
    return operands_of(*case[1:], bare=len(case.outputs) > 2)  # without an adapter is then who is in the first block


def library(case: Case, folder: Path, chain: bool, changed: tuple[str, str] = ("", "")) -> ctypes.CDLL:
    defines = nf4_wide_cuda._defines(case.tile, case.nested, case.rank // 16, case.dtype == F16, chain)
    source = nf4_wide_cuda._source()
    return on_cpu.compiled(source, "nf4_wide", defines, folder, changed, parameter="WideArgs")


def given(tile: WideTile, operands: Made, low: torch.Tensor | None, y: torch.Tensor) -> tuple[WideArgs, int]:
    x = operands.x
    args, blocks = arguments(x, operands.members, low, y, tile, dynamic_code(x.device))
    block = (tile.outputs // 8, tile.span * 64)
    codes = [
        on_cpu.map_of_words(m.weight.codes.data_ptr(), m.weight.shape[0] // 8, x.shape[1], block)
        for m in operands.members
    ]
    return WideArgs(on_cpu.map_of(x, tile.rows), on_cpu.map_of(low, tile.rows), (Map * 3)(*codes), Map(), args), blocks


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, tmp_path: Path) -> None:
    of = CASES[case]
    operands = made(of)
    y = torch.full_like(operands.expected, float("nan"))
    args, blocks = given(of.tile, operands, operands.low, y)
    assert library(of, tmp_path, False).run(ctypes.byref(args), blocks, 1, 1) == 0, "a wait that does not end"
    operands.check(y)


@pytest.mark.parametrize(
    "changed",
    [
        ("if (!ready && stage + 1 < stages) counter_wait(filled + place * 8, parity);", ""),
        ("        counter_wait(filled + place * 8, parity);\n", ""),
        ("counter_ended(filled + place * 8, parity)", "counter_ended(filled + place * 8, parity ^ 1)"),
        ("counter_ended(filled + place * 8, parity)", "counter_ended(filled, 0)"),
    ],
    ids=["x", "low", "another phase", "another stage"],
)
def test_what_is_not_waited_for_is_not_there(changed: tuple[str, str], tmp_path: Path) -> None:
    of = CASES["three stages, two groups"]
    operands = made(of)
    y = torch.full_like(operands.expected, float("nan"))
    args, blocks = given(of.tile, operands, operands.low, y)
    stuck = library(of, tmp_path, False, changed).run(ctypes.byref(args), blocks, 1, 1)
    assert stuck or not y.isfinite().all()


CHANGES = {
    "": ("", ""),
    "low is not waited for": ("BEFORE_HAS_ENDED;  // it makes low", ""),
    "who ends does not wait": ("BEFORE_HAS_ENDED;  // so that", "// so that"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_begun_before_its_low_rank_is_there_it_waits_for_it(change: str, tmp_path: Path) -> None:
    of = CASES["fewer chunks than stages, a bias"]  # a member without an adapter has nothing else to wait for
    operands = made(of)
    assert operands.low is not None
    lows, y = unwritten(operands.low), unwritten(operands.expected)
    args, blocks = given(of.tile, operands, lows, y)
    before = Before(pointer(lows), pointer(operands.low), 0, pointer(y), lows.nbytes, 0, y.numel(), 0)
    library(of, tmp_path, True, CHANGES[change]).run_early(ctypes.byref(args), blocks, 1, ctypes.byref(before))
    assert (before.early > 0) == bool(change)
    if not change:
        operands.check(y)


class MadeHere(NamedTuple):
    """Operands of a launch that makes low itself, what that will be, and where it works."""

    operands: Made
    a: torch.Tensor
    low: torch.Tensor
    args: WideArgs
    blocks: int
    flags: torch.Tensor
    keeps: tuple[torch.Tensor, ...]

    def right(self) -> bool:
        """Whether low is, and no flag is left."""
        exact = self.operands.x.double() @ self.a.double().T
        close = bool(((self.low[:, : len(self.a)].double() - exact).abs() <= exact.abs() * 2**-7 + 1e-3).all())
        return close and not self.flags.any() and not self.low[:, len(self.a) :].any()


def made_here(of: Case, R: int, y: torch.Tensor | None = None) -> MadeHere:
    """Low of R ranks, the others' columns zero; y: where outputs go."""
    operands = made(of)
    assert operands.low is not None
    a = (torch.randn(R, of.K) / of.K**0.5).to(of.dtype)
    low = unwritten(operands.low)
    whole = low_blocks.whole_ranks(R)
    parts, flags = torch.empty(8 * 64 * whole), torch.zeros(32, dtype=torch.int32)
    out = torch.full_like(operands.expected, float("nan")) if y is None else y
    plain, blocks = given(of.tile, operands, low, out)
    args, _ = arguments(operands.x, operands.members, low, out, of.tile, dynamic_code(low.device), a, flags, parts)
    args = WideArgs(plain.x, plain.low, plain.codes, on_cpu.map_of(a, whole), args)
    return MadeHere(operands, a, low, args, blocks + 4, flags, (parts, out))


LOW_CASES = {"as an 8B Llama's are": 64, "three stages, two groups": 50, "a member without an adapter": 32}
MORE = {"a member without an adapter": Case(WideTile(8, 32, 1, 3, 2), 20, [112, 40], 512, 16, False, True, F16)}


def with_low(case: str, folder: Path, chain: bool, changed: tuple[str, str] = ("", "")) -> ctypes.CDLL:
    of = (CASES | MORE)[case]
    defines = nf4_wide_cuda._defines(of.tile, of.nested, of.rank // 16, of.dtype == F16, chain, LOW_CASES[case])
    return on_cpu.compiled(nf4_wide_cuda._source(), "nf4_wide", defines, folder, changed, parameter="WideArgs")


def reference_of(here: MadeHere) -> torch.Tensor:
    """What is to come out with the low that was made."""
    expected = torch.empty_like(here.operands.expected)
    members = [Member(m.weight, m.b_Or, m.at) for m in here.operands.members]
    reference.nf4_matmul(here.operands.x, members, here.low, expected)
    return expected


@pytest.mark.parametrize("case", LOW_CASES)
def test_a_launch_that_makes_its_low_rank_equals_the_reference(case: str, tmp_path: Path) -> None:
    of = (CASES | MORE)[case]
    here = made_here(of, LOW_CASES[case])
    if case in MORE:  # the first member's blocks have nothing to hear, and count for the flag all the same
        here.args.args.member[0].b = 0
        here.operands.members[0] = Member(here.operands.members[0].weight, None, 0)
    y = here.keeps[1]
    assert with_low(case, tmp_path, False).run(ctypes.byref(here.args), here.blocks, 1, 1) == 0, "a wait has no end"
    assert here.right()
    here.operands._replace(expected=reference_of(here)).check(y)


_X_WAIT = "        BEFORE_HAS_ENDED;  // it makes x\n        NEXT_MAY_BEGIN;\n"
LOW_CHANGES = {
    "": ("", ""),
    "x is asked for too early": (_X_WAIT, "        NEXT_MAY_BEGIN;\n"),
    "the next begins too early": (_X_WAIT, "        NEXT_MAY_BEGIN;\n        BEFORE_HAS_ENDED;\n"),
    "low is not waited for": ("while (!flag_read(flag)) PAUSE;", ""),
    "a flag stays": ("flag_count(flag, readers);", ""),
}


@pytest.mark.parametrize("change", LOW_CHANGES)
def test_a_launch_that_makes_its_low_rank_waits_for_x(change: str, tmp_path: Path) -> None:
    case = "three stages, two groups"
    of = CASES[case]
    y = unwritten(made(of).expected)
    here = made_here(of, LOW_CASES[case], y)
    x, low = here.operands.x, here.low[:1, :16]
    whole = x.clone()
    x.copy_(unwritten(x))
    before = Before(pointer(x), pointer(whole), pointer(low), pointer(y), x.nbytes, low.nbytes, y.numel(), 0)
    library = with_low(case, tmp_path, True, LOW_CHANGES[change])
    assert library.run_early(ctypes.byref(here.args), here.blocks, 1, ctypes.byref(before)) == 0
    assert (before.early == 0 and here.right()) == (not change)
    if not change:
        here.operands._replace(expected=reference_of(here)).check(y)
