"""A decode step's attention in one launch: to the bit what rotation, cache write and attention do one after another."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pronghorn.kernels import decode_attention, decode_attention_triton, rope_kv, rope_kv_triton, step_attention_cuda
from pronghorn.kernels import step_attention as module
from pronghorn.kernels.decode_attention import workspace_elements
from pronghorn.kernels.reference import step_attention as reference
from pronghorn.kernels.step_attention import step_attention
from tests.kernels import on_cpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["cuda", "many", "triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The kernel for few rows, that for many (compiled for a CPU where there is no GPU), the two operations in their
    place, and the reference. What they are compared with is the two operations, in Triton or plain; tiles of 32 and
    segments of 128 on a CPU.
    """
    triton = request.param != "reference"
    for where, ours, plain in (
        (module, step_attention_cuda, reference),
        (decode_attention, decode_attention_triton, decode_attention.reference),
        (rope_kv, rope_kv_triton, rope_kv.reference),
    ):
        monkeypatch.setattr(where, "_path", lambda tensor, found=ours if triton else plain: found)
    if request.param == "triton":
        monkeypatch.setattr(step_attention_cuda, "way_of", lambda *_: "not here")
    if request.param in ("cuda", "many"):
        other = "not_few" if request.param == "many" else "not_many"
        monkeypatch.setattr(step_attention_cuda, other, lambda *_: "not here")
    if DEVICE == "cpu":
        if request.param in ("cuda", "many") and shutil.which("g++") is None:
            pytest.skip("needs g++")
        monkeypatch.setattr(step_attention_cuda, "_kernel", OnCPU.of(tmp_path))
        monkeypatch.setattr(step_attention_cuda, "processors_of", lambda device: 3)
        monkeypatch.setattr(step_attention_cuda, "map_of_groups", on_cpu.map_of_groups)
        for where in (decode_attention_triton, step_attention_cuda):
            monkeypatch.setattr(where, "TILE", 32)
        for where in (decode_attention, decode_attention_triton, step_attention_cuda):
            monkeypatch.setattr(where, "SEGMENT", 128)
    return request.param


Defines = tuple[tuple[str, int], ...]


class OnCPU:
    """In place of ``CudaKernel``."""

    def __init__(
        self, file: str, defines: Defines, shared_bytes: int, folder: Path, changed: tuple[str, str] = ("", "")
    ) -> None:
        source = step_attention_cuda._source(file)
        places = f"\nstatic_assert(SHARED_BYTES == {shared_bytes});\n"
        given = "ManyArgs" if file == step_attention_cuda.MANY.file else "Args"
        self.run = on_cpu.compiled(source + places, "step_attention", dict(defines), folder, changed, given).run

    @classmethod
    def of(cls, folder: Path, changed: tuple[str, str] = ("", "")) -> Callable[..., OnCPU]:
        made: dict[tuple[str, Defines], OnCPU] = {}

        def kernel(file: str, defines: Defines, device: torch.device, shared_bytes: int) -> OnCPU:
            if (file, defines) not in made:
                own = folder / str(len(made))
                own.mkdir()
                made[file, defines] = cls(file, defines, shared_bytes, own, changed)
            return made[file, defines]

        return kernel

    def __call__(self, grid: tuple[int, int, int], threads: int, args: ctypes.Structure, overlap: bool) -> None:
        assert threads in (160, 256) and not overlap
        assert not self.run(ctypes.byref(args), *grid), "a wait did not end"


class Step:
    """Rows of ``lengths`` tokens with the new one, whose slot is NaN as every free one; tables of ``width`` blocks."""

    def __init__(
        self, lengths: list[int], H: int, K: int, E: int, R: int, page: int, dtype: torch.dtype, extra: int = 2
    ) -> None:
        self.heads, self.page = (H, K, K), page
        counts = [-(-n // page) for n in lengths]
        blocks = torch.randperm(sum(counts) + 3).tolist()
        self.table = torch.full((len(lengths), max(counts) + extra), 2**30, dtype=torch.int32)
        self.caches = [torch.full((len(blocks), page, K, E), float("nan"), dtype=dtype) for _ in range(2)]
        for b, (n, count) in enumerate(zip(lengths, counts)):
            own = [blocks.pop() for _ in range(count)]
            self.table[b, :count] = torch.tensor(own)
            for t in range(n - 1):
                for cache in self.caches:
                    cache[own[t // page], t % page] = torch.randn(K, E).to(dtype)
        self.table, self.caches = self.table.to(DEVICE), [cache.to(DEVICE) for cache in self.caches]
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.qkv = (torch.randn(len(lengths), sum(self.heads), E) * 2).to(DEVICE, dtype)
        angle_PE = torch.rand(max(lengths) + 1, R // 2).mul(6).repeat(1, 2).to(DEVICE)
        self.angles = angle_PE.cos(), angle_PE.sin()
        self.scale = E**-0.5

    def apart(self) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the operations give one after another, and the caches behind them."""
        caches = [cache.clone() for cache in self.caches]
        q, k, v = self.qkv.clone().split(self.heads, dim=1)
        rope_kv.rope_and_write_kv(q, k, v, *self.angles, *caches, self.table, self.lengths - 1)
        o = decode_attention.decode_attention(q, *caches, self.table, self.lengths, self.scale)
        return o, caches

    def at_once(self, **options: object) -> torch.Tensor:
        q, k, v = self.qkv.clone().split(self.heads, dim=1)
        lengths = self.lengths - 1, self.lengths
        return step_attention(q, k, v, *self.angles, *self.caches, self.table, *lengths, self.scale, **options)

    def check(self, path: str) -> None:
        """To the bit, where products are summed as a GPU sums them; the caches always."""
        wanted, caches = self.apart()
        (B, _, E), tokens = wanted.shape, self.table.shape[1] * self.page
        needed = workspace_elements(B, tokens, self.heads[0], E)
        nothing = torch.full_like(wanted, float("nan"))
        got = self.at_once(workspace=torch.full((needed,), float("nan"), device=DEVICE), out_BHE=nothing)
        assert torch.isfinite(wanted).all()
        if path in ("cuda", "many") and DEVICE == "cpu" and self.qkv.dtype == torch.float16:
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=1e-3 * wanted.abs().max().item())
        else:
            assert torch.equal(got, wanted)
        for cache, same in zip(self.caches, caches):
            assert torch.equal(cache.nan_to_num(7.0), same.nan_to_num(7.0))


CASES = [
    ([1], 1, 1, 16, 16, 16),
    ([33, 0, 130, 1, 32], 4, 1, 64, 64, 16),  # 1, 0, 2, 1 and 1 segments; a new token that begins a tile, or ends one
    ([128, 129, 127, 161], 2, 1, 16, 16, 16),  # a whole segment, a segment of the new token alone, one token less
    ([270, 160, 257], 6, 2, 80, 24, 8),  # a part of each head is rotated
    ([70], 3, 3, 96, 96, 5),
    ([40, 5], 8, 2, 128, 128, 16),
    ([140], 2, 2, 256, 64, 4),  # wider heads than one launch takes
    ([50], 8, 1, 32, 8, 64),  # a block longer than a tile, as many query heads as one launch takes
    ([50], 9, 1, 16, 16, 16),  # and one more
    ([690, 520, 641], 2, 1, 16, 2, 16),  # 6 segments: more than are read at once
    ([690, 1, 520, 641, 0, 257, 33], 4, 2, 64, 32, 16),  # some rows are shared by groups of blocks
    ([65, 31, 300], 16, 2, 128, 128, 8),  # as many query heads as one launch takes, small blocks
    ([129, 70], 2, 1, 64, 64, 64),  # blocks of two tiles
]


@pytest.mark.parametrize("angles", [torch.float32, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("lengths", "H", "K", "E", "R", "page"), CASES)
def test_equals_the_operations(
    path: str, lengths: list[int], H: int, K: int, E: int, R: int, page: int, dtype: torch.dtype, angles: torch.dtype
) -> None:
    step = Step(lengths, H, K, E, R, page, dtype)
    step.angles = tuple(table.to(angles) for table in step.angles)
    step.check(path)


def way(
    rows: tuple[torch.Tensor, ...], tokens: int = 512, cache: torch.Tensor | None = None, page: int = 16
) -> step_attention_cuda.Way | str:
    """The kernel for rows that fit a cache otherwise, or why there is none."""
    pages = torch.zeros(1, page, *rows[1].shape[1:], dtype=rows[1].dtype) if cache is None else cache
    return step_attention_cuda.way_of(*rows, pages, pages, tokens)


def test_which_kernel_takes_which_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the cases above are what they say."""
    monkeypatch.setattr(step_attention_cuda, "processors_of", lambda device: 132)
    one = [not isinstance(way(step_of(case, torch.float16)), str) for case in CASES]
    assert one == [True, True, True, True, True, True, False, True, False, True, True, True, True]
    assert "float32" in way(step_of(CASES[0], torch.float32))
    q, k, v, cos, sin = step_of(CASES[1], torch.float16)
    assert "angles" in way((q, k, v, cos.double(), sin.double()))
    assert "angles" in way((q, k, v, cos, sin.half()))
    assert "no angles" in way((q, k, v, cos[:0], sin[:0])) and "no blocks" in way((q, k, v, cos, sin), 0)
    odd = torch.zeros(5, 65, dtype=torch.float16)[:, 1:].unflatten(1, (1, 64))
    assert "aligned" in way((q, k, odd, cos, sin))
    assert "aligned" in way((q, k, v, cos, sin), cache=torch.zeros(1025, dtype=torch.float16)[1:].view(1, 16, 1, 64))


def test_more_blocks_than_multiprocessors_are_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_attention_cuda, "processors_of", lambda device: 132)
    few, many = step_attention_cuda.FEW, step_attention_cuda.MANY
    rows = step_of(([3] * 16, 8, 8, 64, 64, 16), torch.float16)  # 128 blocks a segment
    assert way(rows, 256) is few and way(rows, 257) is many and way([x[:8] for x in rows[:3]] + [*rows[3:]], 512) is few
    assert (
        way([x[:1] for x in rows[:3]] + [*rows[3:]], 12288) is few
        and way([x[:1] for x in rows[:3]] + [*rows[3:]], 12289) is many
    )
    more = [x[:1].expand(17, -1, -1) for x in rows[:3]]
    assert way((*more, *rows[3:])) is many
    assert "1025 rows" in way((*(x[:1].expand(1025, -1, -1) for x in rows[:3]), *rows[3:]))
    assert way(rows, 768, page=12) is few and "blocks of 12 tokens" in way((*more, *rows[3:]), page=12)
    assert way(rows, 768, page=64) is many and way(rows, 768, page=128) is many and way(rows, 768, page=96) is few
    q, k, v, cos, sin = rows
    assert way((q.transpose(0, 1).contiguous().transpose(0, 1), k, v, cos, sin), 512) is many
    odd = torch.zeros(16, 8 * 64 + 1, dtype=torch.float16)[:, 1:].unflatten(1, (8, 64))
    assert way((odd, k, v, cos, sin), 512) is few, "whose queries need not be aligned"
    assert (
        way((q, k, v, cos[:, :20], sin[:, :20]), 512) is few and way((q, k, v, cos[:, :16], sin[:, :16]), 512) is many
    )
    small = step_of(([3] * 16, 8, 8, 96, 96, 16), torch.float16)
    assert way(small, 512) is few and "heads of 96" in way((*(x[:1].expand(17, -1, -1) for x in small[:3]), *small[3:]))


def step_of(case: tuple, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    step = Step(*case, dtype)
    return *step.qkv.split(step.heads, dim=1), *step.angles


def test_again_and_again(path: str) -> None:
    """Counts of arrivals are 0 behind each launch, whatever the rows were."""
    for lengths in ([270, 129, 140], [129, 270, 1], [0, 256, 257]):
        step = Step(lengths, 4, 2, 16, 16, 4, torch.float16)
        step.check(path)
        step.lengths = (step.lengths - 3).clamp(min=0)
        step.check(path)


def test_a_workspace_and_an_output_that_are_given(path: str) -> None:
    step = Step([137, 270], 4, 2, 16, 16, 4, torch.float16)
    needed = workspace_elements(2, step.table.shape[1] * 4, 4, 16)
    space = torch.full((needed + 7,), float("nan"), device=DEVICE)
    wide = torch.full((2, 5, 16), 9.0, device=DEVICE, dtype=torch.float16)
    wanted = step.at_once()
    assert step.at_once(workspace=space, out_BHE=wide[:, :4]).data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :4], wanted) and (wide[:, 4:] == 9.0).all()
    with pytest.raises(ValueError, match=f"{needed} float32"):
        step.at_once(workspace=space[: needed - 1])
    with pytest.raises(ValueError, match="out"):
        step.at_once(out_BHE=wide)


@pytest.mark.parametrize("what", ["blocks", "angles"])
def test_a_length_beyond_a_table(path: str, what: str) -> None:
    """A GPU stores nothing, and reads nothing outside: what it says then is nobody's answer, but a number."""
    step = Step([12, 40], 2, 1, 16, 16, 4, torch.float16, extra=0)
    for cache in step.caches:
        cache.nan_to_num_(0.5)
    if what == "blocks":
        step.lengths[1] = 41
    else:
        step.angles = tuple(table[:39] for table in step.angles)
    before = [cache.clone() for cache in step.caches]
    if path == "reference" and DEVICE == "cpu":
        with pytest.raises(ValueError, match="reaches position"):
            step.at_once()
        return
    if path == "reference":
        return
    assert torch.isfinite(step.at_once()).all()
    slot = int(step.table[0, 2]), 3  # the first row's new token
    for cache, same in zip(step.caches, before):
        assert not torch.equal(cache[slot], same[slot])
        cache[slot] = same[slot]
        assert torch.equal(cache, same)


def test_a_nan_shows_in_its_own_row_and_head_alone(path: str) -> None:
    step = Step([137, 40], 4, 2, 16, 16, 4, torch.float16)
    step.caches[0][int(step.table[0, 4]), 2, 1, 3] = float("nan")
    o = step.at_once()
    assert torch.isnan(o[0, 2:]).all()
    assert torch.isfinite(o[0, :2]).all() and torch.isfinite(o[1]).all()


MUTATIONS = {
    "copies are not waited for": ("    COPIES_WAIT(0);\n    __syncthreads();", "    __syncthreads();"),
    "the new token is left where it is": ("fresh * ROW : Q_AT", "0 * ROW : Q_AT"),
    "hidden keys count": ("c[i][j] = NONE;", "c[i][j] = c[i][j];"),
    "values behind the last are not numbers": ("*(float4*)(shared + V_AT + to) = make_float4(0, 0, 0, 0);", ""),
    "nothing is lost of earlier tiles": ("sum[j] = __fmul_rn(sum[j], decay[tile][j % 2]);", ""),
    "the last but one merges": ("== used - 1;", "== used - 2;"),
    "arrivals are never 0 again": ("if (thread == 0) *arrived = 0;", ""),
}

MANY_MUTATIONS = {
    "inputs are not waited for": ("COPIES_WAIT(0);", ""),
    "a tile is not waited for": ("counter_wait(filled + stage * 8, phase);", ""),
    "inputs of the next row come to those in use": ("of_head ^ INPUTS_AT ^ NEXT_INPUTS_AT);", "of_head);"),
    "the new token is left where it is": ("stage + place(fresh, at * 2)", "stage + place(0, at * 2)"),
    "the new value is not stored": ("else *(float4*)(args.v + to)", "else if (0) *(float4*)(args.v + to)"),
    "hidden keys count": ("count) c[j] = NONE;", "count) c[j] = c[j];"),
    "values behind the last are not numbers": ("i < TILE * PIECES; i", "0; i"),
    "nothing is lost of earlier tiles": ("sum[n][j] = __fmul_rn(sum[n][j], decay[j % 2]);", ";"),
    "nothing is lost of earlier segments": ("return __fadd_rn(__fmul_rn(sum, before),", "return __fadd_rn(sum,"),
    "a segment begins with the one before": ("            begin_segment();\n", ""),
    "a row begins with the one before": (", whole = begin_row();", ";"),
    "a group begins within a segment": ("(first - begin + TILES - 1) / TILES * TILES;", "first - begin;"),
    "some of a row's parts are not counted": ("else ++parts[1], part_of[1]", "else part_of[1]"),
    "who comes last but one merges": ("== used - n ?", "== used - n - 1 ?"),
    "arrivals are never 0 again": ("args.arrived[row * args.K + head] = 0;", ";"),
    "a row without tokens has no tile": ("max((length + TILE - 1) / TILE, 1);", "(length + TILE - 1) / TILE;"),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="a mutation is compiled for a CPU")
@pytest.mark.parametrize(
    ("kernel", "name"), [("few", name) for name in MUTATIONS] + [("many", name) for name in MANY_MUTATIONS]
)
def test_a_fault_in_the_kernel_shows(kernel: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    few = kernel == "few"
    monkeypatch.setattr(module, "_path", lambda tensor: step_attention_cuda)
    monkeypatch.setattr(step_attention_cuda, "not_many" if few else "not_few", lambda *_: "not here")
    monkeypatch.setattr(step_attention_cuda, "map_of_groups", on_cpu.map_of_groups)
    monkeypatch.setattr(step_attention_cuda, "processors_of", lambda device: 3)
    changed = (MUTATIONS if few else MANY_MUTATIONS)[name]
    monkeypatch.setattr(step_attention_cuda, "_kernel", OnCPU.of(tmp_path, changed))
    step_attention_cuda._arrivals.cache_clear()
    heads = (4, 2, 16, 16, 4) if few else (4, 2, 64, 32, 16)
    steps = [Step([300, 1, 257, 600, 0, 5], *heads, torch.float16) for _ in range(2)]

    def check_both() -> None:
        for step in steps:
            step.check("cuda")

    with pytest.raises(AssertionError):
        check_both()
    step_attention_cuda._arrivals.cache_clear()


@pytest.mark.parametrize("groups", [1, 2, 5, 12])
def test_rows_are_shared_out_among_any_number_of_blocks(
    path: str, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more rows than a block has threads, too."""
    if path != "many" or DEVICE != "cpu":
        pytest.skip("blocks are as many as a GPU takes")
    monkeypatch.setattr(step_attention_cuda, "processors_of", lambda device: groups)
    monkeypatch.setattr(step_attention_cuda, "BLOCKS", 1)
    lengths = [5, 0, 300, 129, 1, 128, 700, 33] if groups < 12 else [0, 5, 1] * 54 + [260]
    Step(lengths, 2, 1, 64, 32, 16, torch.float16).check(path)


def test_what_does_not_fit_is_refused() -> None:
    step = Step([3, 5], 4, 2, 16, 16, 4, torch.float32)
    q, k, v = step.qkv.split(step.heads, dim=1)
    angles, caches, counts = step.angles, step.caches, (step.lengths - 1, step.lengths)
    with pytest.raises(ValueError, match="divisor"):
        step_attention(q[:, :3], k, v, *angles, *caches, step.table, *counts, 0.1)
    with pytest.raises(ValueError, match="scale=0"):
        step_attention(q, k, v, *angles, *caches, step.table, *counts, 0.0)
    with pytest.raises(ValueError, match="blocks"):
        step_attention(q, k, v, *angles, *caches, step.table[:, 0], *counts, 0.1)
    with pytest.raises(ValueError, match="positions is"):
        step_attention(q, k, v, *angles, *caches, step.table, counts[0].long(), counts[1], 0.1)
    with pytest.raises(ValueError, match="lengths is"):
        step_attention(q, k, v, *angles, *caches, step.table, counts[0], counts[1].long(), 0.1)
