"""``low_rank.cu`` compiled for a CPU: every element in its place, and who waits for whom. Sums are taken in double
there, so that their order is a GPU test's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pronghorn.kernels import low_blocks
from pronghorn.kernels import low_rank_cuda as module
from pronghorn.kernels.cuda_source import pointer
from pronghorn.kernels.low_rank_cuda import LEAST_ROWS, blocks_for, low_rank
from tests.kernels import on_cpu
from tests.kernels.test_nf4_matmul_on_cpu import Before, unwritten


class Case(NamedTuple):
    blocks: int
    T: int
    I: int  # noqa: E741 - a shape letter
    R: int
    twice: bool = False


CASES = [
    Case(1, 130, 1088, 24, True),  # runs and ranks that are no whole ones, empty runs, rows that are no whole block
    Case(2, 64, 520, 96),
    Case(4, 100, 640, 48, True),
    Case(8, 64, 200, 16),  # fewer steps than runs
]


class Operands:
    """x with columns beside it, A; where the product goes, twice if so, with columns that stay."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        self.x = torch.randn(case.T, case.I + 8).to(dtype)
        self.a = torch.randn(case.R, case.I).to(dtype)
        self.outs = [unwritten(torch.empty(case.T, case.R + more, dtype=dtype)) for more in (6, 2)][: 1 + case.twice]

    def call(self) -> None:
        outs = [out[:, : self.case.R] for out in self.outs]
        low_rank(self.x[:, : self.case.I], self.a, *outs, blocks=self.case.blocks)

    def right(self) -> bool:
        """Whether the product is, and what is beside it as it was, and no count is left."""
        case = self.case
        exact = self.x[:, : case.I].double() @ self.a.double().T
        bound = exact.abs() * 2.0 ** (-8 if self.dtype == torch.bfloat16 else -11) + 1e-4
        room = low_blocks.room_for(case.T)
        counts = low_blocks.workspace(self.x.device, 0, low_blocks.whole_ranks(case.R), room)[1]
        return not counts.any() and all(
            bool(((out[:, : case.R].double() - exact).abs() <= bound).all())
            and bool((out[:, case.R :].contiguous().view(torch.int16) == -1).all())
            for out in self.outs
        )


@contextmanager
def on_a_cpu(folder: Path, early: Before | None = None, changed: tuple[str, str] = ("", "")) -> Iterator[Any]:
    """``low_rank`` goes to the kernel as it is compiled for a CPU, begun while the kernel before runs if so."""

    class Kernel:
        def __init__(self, defines: tuple[tuple[str, int], ...], device: torch.device, shared_bytes: int) -> None:
            given = dict(defines) | {"CHAIN": int(early is not None)}
            places = f"\nstatic_assert(LOW_BYTES <= {shared_bytes});\n"
            self.library = on_cpu.compiled(module._source() + places, "low_rank", given, folder, changed)

        def __call__(self, grid: tuple[int, int, int], threads: int, args: ctypes.Structure, overlap: bool) -> None:
            assert threads == 160 and grid[1:] == (1, 1)
            on_cpu.run(self.library, args, grid[0], early)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_kernel", Kernel)
        patch.setattr(module, "map_of", on_cpu.map_of)
        patch.setattr(module, "_SHARED", 3 * (64 + 96) * 128)  # stages are used again
        low_blocks.workspace.cache_clear()
        yield
        low_blocks.workspace.cache_clear()


@on_cpu.needs_compiler
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_element_is_in_its_place(case: Case, dtype: torch.dtype, tmp_path: Path) -> None:
    of = Operands(case, dtype)
    with on_a_cpu(tmp_path):
        of.call()
        assert of.right()


CHANGES = {
    "": ("", ""),
    "x is asked for too early": (
        "#if CHAIN\n        BEFORE_HAS_ENDED;\n        NEXT_MAY_BEGIN;\n#endif\n        for (int column = first;",
        "        for (int column = first;",
    ),
    "a block writes rows of another": ("args.low_stride, args.rows,", "args.low_stride, args.rows - 1,"),
    "a count stays": ("of.flag[16] = 0;", ""),
    "the second place is left out": ("#ifdef TWICE\n    store(of.also", "#if 0\n    store(of.also"),
}


@on_cpu.needs_compiler
@pytest.mark.parametrize("change", CHANGES)
def test_in_a_chain_it_waits_for_x_and_the_tests_see_a_change(change: str, tmp_path: Path) -> None:
    case = Case(1, 130, 640, 32, True) if "second" in change else Case(2, 130, 640, 32)
    of = Operands(case, torch.float16)
    whole = of.x.clone()
    of.x.copy_(unwritten(of.x))
    out = of.outs[0]
    before = Before(pointer(of.x), pointer(whole), 0, pointer(out), of.x.nbytes, 0, out.numel(), 0)
    with on_a_cpu(tmp_path, before, CHANGES[change]):
        of.call()
        assert (before.early == 0 and of.right()) == (not change)


@pytest.mark.parametrize(("T", "R", "blocks"), [(LEAST_ROWS, 32, 4), (4096, 32, 2), (4096, 96, 1), (20000, 16, 1)])
def test_blocks_have_a_multiprocessor_each_where_that_is_enough(T: int, R: int, blocks: int) -> None:
    assert blocks_for(T, R) == blocks


def test_what_does_not_divide_the_runs_is_an_error() -> None:
    of = Operands(CASES[0]._replace(blocks=3), torch.float16)
    with pytest.raises(ValueError, match="blocks=3"):
        of.call()
