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

from pronghorn.kernels import nf4_wide_cuda
from pronghorn.kernels.cuda_source import Map, pointer
from pronghorn.kernels.nf4_code import dynamic_code
from pronghorn.kernels.nf4_matmul_cuda import arguments
from pronghorn.kernels.nf4_wide_cuda import WideArgs, WideTile
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
    return WideArgs(on_cpu.map_of(x, tile.rows), on_cpu.map_of(low, tile.rows), (Map * 3)(*codes), args), blocks


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
