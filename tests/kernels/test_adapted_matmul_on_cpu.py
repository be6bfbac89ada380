"""``adapted_matmul.cu`` compiled for a CPU: every element in its place, and who waits for whom. Sums are taken in
double there, so that their order is a GPU test's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pronghorn.kernels import adapted_matmul_cuda as module
from pronghorn.kernels import low_blocks
from pronghorn.kernels.adapted_matmul import coded_of
from pronghorn.kernels.adapted_matmul_cuda import Tile, adapted_matmul
from pronghorn.kernels.cuda_source import pointer
from tests.kernels import on_cpu
from tests.kernels.test_nf4_matmul_on_cpu import Before, unwritten
from tests.kernels.test_nf4_matmul_on_cpu import weight as weight_of

pytestmark = on_cpu.needs_compiler


class Case(NamedTuple):
    tile: Tile
    M: int
    O: int  # noqa: E741 - a shape letter
    K: int
    R: int
    members: tuple[int, ...] = ()  # of these outputs; NF4, as half of the steps are codes


CASES = [
    Case(Tile(1, 32, 2, 2), 64, 64, 192, 16),
    Case(Tile(1, 32, 3, 4), 50, 72, 1088, 24),  # outputs that are no whole block, and ranks that are no whole 16
    Case(Tile(1, 48, 2, 2), 17, 200, 192, 96),  # fewer steps than runs
    Case(Tile(2, 64, 2, 8), 256, 136, 640, 32),
    Case(Tile(2, 64, 3), 130, 64, 128, 16),  # rows that are no whole block
    Case(Tile(2, 96, 2), 200, 96, 64, 64),  # fewer steps than stages
    Case(Tile(1, 32, 3, 4, 4), 50, 72, 1152, 32, (72,)),  # outputs that are no whole block
    Case(Tile(1, 48, 2, 2, 4), 64, 104, 640, 32, (72, 16, 16)),  # a block has outputs of three
    Case(Tile(1, 96, 3, 2, 4), 40, 72, 640, 16, (40, 32)),
    Case(Tile(1, 32, 2, 2, 6), 64, 40, 2560, 16, (40,)),
    Case(Tile(1, 32, 2, 2, 2), 20, 40, 9216, 16, (40,)),
]


class Operands:
    """A table whose last columns are to be made, a weight, A; where outputs go, with columns that stay."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        width = -(-(case.K + case.R) // 64) * 64
        self.table = torch.zeros(case.M, width).to(dtype)
        self.table[:, : case.K] = torch.randn(case.M, case.K)
        self.table[:, case.K : case.K + case.R] = float("nan")
        self.weight, self.a = torch.randn(case.O, width).to(dtype), torch.randn(case.R, case.K).to(dtype)
        self.coded, self.given = None, self.weight
        if case.members:
            nf4 = [weight_of(outputs, case.K, True, dtype) for outputs in case.members]
            self.coded = coded_of(nf4, case.tile.eighths)
            assert self.coded is not None
            self.weight[:, : case.K] = torch.cat([w.dequantize(dtype) for w in nf4])
            self.given = self.weight.clone()  # where codes are read, it is not
            for step in range(case.K // 128):
                if step * case.tile.eighths // 8 != (step + 1) * case.tile.eighths // 8:
                    self.given[:, step * 128 : step * 128 + 128] = float("nan")
        self.out = unwritten(torch.empty(case.M, case.O + 6, dtype=dtype))

    def bound(self, exact: torch.Tensor) -> torch.Tensor:
        """Half a unit of the last place, and float32's sums."""
        return exact.abs() * 2.0 ** (-8 if self.dtype == torch.bfloat16 else -11) + 1e-4

    def right(self) -> bool:
        """Whether low and outputs are, and what is beside these as it was, and no flag is left."""
        K, R, O = self.case.K, self.case.R, self.case.O  # noqa: E741 - a shape letter
        x, low = self.table[:, :K].double(), self.table[:, K : K + R].double()
        exact_low, exact = x @ self.a.double().T, self.table.double() @ self.weight.double().T
        flags = low_blocks.workspace(self.table.device, 0, low_blocks.whole_ranks(R))[1]
        return (
            bool(((low - exact_low).abs() <= self.bound(exact_low)).all())
            and bool(((self.out[:, :O].double() - exact).abs() <= self.bound(exact)).all())
            and bool((self.out[:, O:].contiguous().view(torch.int16) == -1).all())
            and not flags.any()
        )


@contextmanager
def on_a_cpu(
    tile: Tile, folder: Path, early: Before | None = None, changed: tuple[str, str] = ("", "")
) -> Iterator[Any]:
    """``adapted_matmul`` goes to the kernel as it is compiled for a CPU, begun while the kernel before runs if so."""

    class Kernel:
        def __init__(self, defines: tuple[tuple[str, int], ...], device: torch.device, shared_bytes: int) -> None:
            given = dict(defines) | {"CHAIN": int(early is not None), "FILLED_BY": 2}
            places = f"\nstatic_assert(SHARED_BYTES == {shared_bytes});\n"
            self.library = on_cpu.compiled(module._source() + places, "adapted_matmul", given, folder, changed)

        def __call__(self, grid: tuple[int, int, int], threads: int, args: ctypes.Structure, overlap: bool) -> None:
            assert threads == tile.warps * 32 and grid[1:] == (1, 1)
            on_cpu.run(self.library, args, grid[0], early)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_kernel", Kernel)
        patch.setattr(module, "map_of", on_cpu.map_of)
        patch.setattr(module, "map_of_groups", on_cpu.map_of_groups)
        low_blocks.workspace.cache_clear()
        yield
        low_blocks.workspace.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_element_is_in_its_place(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    of = Operands(case, dtype)
    with on_a_cpu(case.tile, tmp_path):
        adapted_matmul(of.table, case.M, of.given, of.a, of.out[:, : case.O], of.coded, case.tile)
        assert of.right()


_START = (
    "#if CHAIN\n        BEFORE_HAS_ENDED;\n        NEXT_MAY_BEGIN;\n#endif\n#pragma unroll 1\n        for (int n = 0;"
)
_LOW_START = "#if CHAIN\n        BEFORE_HAS_ENDED;\n        NEXT_MAY_BEGIN;\n#endif\n        for (int column = first;"
CHANGES = {
    "": ("", ""),
    "x is asked for too early": (_START, "#pragma unroll 1\n        for (int n = 0;"),
    "x is asked for too early, for low": (_LOW_START, "        for (int column = first;"),
    "the next begins too early": (
        _START,
        _START.replace("BEFORE_HAS_ENDED;\n        NEXT_MAY_BEGIN;", "NEXT_MAY_BEGIN;\n        BEFORE_HAS_ENDED;"),
    ),
    "low is not waited for": ("while (!flag_read(flag)) PAUSE;", ""),
    "a flag stays": ("flag_count(flag, readers);", ""),
    "a count stays": ("of.flag[16] = 0;", ""),
    "what is multiplied is not waited for": (
        "counter_wait(filled + ring.stage * 8, ring.phase);\n#if CODED", "#if CODED"
    ),
    "a group has the rows of the first": ("+ warp / 4 * 8192", ""),
    "the second half is the first": ("k / 4 * W_HALF + ", ""),
    "runs are added twice": ("for (int run = 1; run < RUNS; ++run) sums", "for (int run = 0; run < RUNS; ++run) sums"),
}  # fmt: skip


CODED_CHANGES = {
    "": ("", ""),
    "codes are not waited for": ("counter_wait(counts, phase);", ""),
    "weights are not waited for": ("counter_wait(base + MADE_AT + made.stage * 8, made.phase);", ""),
    "their place is not waited for to be free": ("counter_wait(counts + 16, phase);", ""),
    "codes that were not read are not waited for": ("if (i >= CODES) counter_wait(counts + 8, ring.phase ^ 1);", ""),
    "codes of the first outputs": ("args.codes + first_output / 8 * EIGHT_CODES", "args.codes"),
    "both halves have one scale": (" + half * 32 + g * 4", " + g * 4"),
    "the lower code first": ("pair(scaled(levels[code / 16 * 32]", "pair(scaled(levels[code % 16 * 32]"),
}  # fmt: skip


@pytest.mark.parametrize("change", CODED_CHANGES)
def test_weights_of_codes_are_made_before_they_are_multiplied(change: str, tmp_path: Path) -> None:
    case = Case(Tile(1, 32, 2, 2, 4), 40, 96, 3840, 32, (56, 40))
    of = Operands(case, torch.float16)
    with on_a_cpu(case.tile, tmp_path, None, CODED_CHANGES[change]):
        if "waited" not in change:
            adapted_matmul(of.table, case.M, of.given, of.a, of.out[:, : case.O], of.coded, case.tile)
            assert of.right() == (not change)
            return
        try:
            adapted_matmul(of.table, case.M, of.given, of.a, of.out[:, : case.O], of.coded, case.tile)
        except AssertionError:
            return  # a wait that does not end
        assert not of.right()


_WAIT = "#if CHAIN\n    BEFORE_HAS_ENDED;  // a block"


@pytest.mark.parametrize("waits", [True, False])
def test_a_block_that_has_no_part_of_x_a_waits_too(waits: bool, tmp_path: Path) -> None:
    """Of 1,088 inputs the last two runs are empty: who has them reads nothing, and writes zeros."""
    case = Case(Tile(1, 32, 2, 4), 20, 40, 1088, 16)
    of = Operands(case, torch.float16)
    whole = of.table.clone()
    of.table.copy_(unwritten(of.table))
    before = Before(pointer(of.table), pointer(whole), 0, pointer(of.out), of.table.nbytes, 0, of.out.numel(), 0)
    changed = ("", "") if waits else (_WAIT, _WAIT.replace("CHAIN", "0"))
    with on_a_cpu(case.tile, tmp_path, before, changed):
        adapted_matmul(of.table, case.M, of.given, of.a, of.out[:, : case.O], of.coded, case.tile)
        assert of.right() and (before.early == 0) == waits


@pytest.mark.parametrize("change", [*CHANGES, "codes"])
def test_begun_early_it_waits_for_what_is_late(change: str, tmp_path: Path) -> None:
    """x is made by the kernel before; x A^T by other blocks. What is changed shows; a part as codes changes nothing."""
    case = Case(Tile(2, 32, 2, 2), 130, 72, 320, 32)
    if change == "codes":
        case, change = Case(Tile(1, 32, 2, 2, 4), 64, 72, 640, 32, (72,)), ""
    of = Operands(case, torch.bfloat16)
    whole, low = of.table.clone(), of.table[:1, case.K : case.K + case.R]
    of.table.copy_(unwritten(of.table))
    before = Before(
        pointer(of.table), pointer(whole), pointer(low), pointer(of.out), of.table.nbytes, low.nbytes, of.out.numel(), 0
    )
    with on_a_cpu(case.tile, tmp_path, before, CHANGES[change]):
        adapted_matmul(of.table, case.M, of.given, of.a, of.out[:, : case.O], of.coded, case.tile)
        assert (before.early == 0 and of.right()) == (not change)
