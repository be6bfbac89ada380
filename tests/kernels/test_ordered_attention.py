"""Ordered attention of rows: both paths against the softmax in float64, and the kernel against its own decode step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pronghorn.kernels import decode_attention_triton, ordered_attention_triton
from pronghorn.kernels import ordered_attention as module
from pronghorn.kernels.ordered_attention import ordered_attention_forward, refusal
from pronghorn.kernels.ordered_attention_triton import Config, launch_config
from pronghorn.kernels.ordered_rows import OrderedRows
from pronghorn.kernels.reference import ordered_attention as reference
from tests.models.test_attention import visible

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-6, torch.float16: 8e-4}  # float16: the probabilities and o are rounded once each


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device; the kernel in tiles of 16 keys, segments of 32 and 32 rows a program."""
    backend = ordered_attention_triton if request.param == "triton" else reference
    monkeypatch.setattr(module, "_path", lambda tensor: backend)
    for where in (ordered_attention_triton, decode_attention_triton):
        monkeypatch.setattr(where, "TILE", 16)
        monkeypatch.setattr(where, "SEGMENT", 32)
    monkeypatch.setattr(ordered_attention_triton, "launch_config", lambda *of: Config(32, 4, 2))
    return request.param


def inputs(T: int, H: int, K: int, E: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Scores wide enough that a few keys dominate."""
    return [(torch.randn(T, n, E) * size).to(DEVICE, dtype) for n, size in ((H, 3), (K, 1), (K, 1))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_within_one_segment_have_the_bits_that_they_have_beside_longer_ones(
    path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel keeps one sum in place of two where no row has more; with a head that sees zeros alone, too."""
    q, k, v = inputs(5 + 17 + 32 + 40, 4, 2, 16, dtype)
    v[:, 0] = 0.0
    T = 5 + 17 + 32
    asked: list[bool] = []
    launch = ordered_attention_triton._launch

    def watched(grid: tuple[int, ...], *given: Any, **more: Any) -> None:
        asked.append(given[-1])
        launch(grid, *given, **more)

    monkeypatch.setattr(ordered_attention_triton, "_launch", watched)
    rows = [OrderedRows.packed(lengths, q.device) for lengths in ((5, 17, 32), (5, 17, 32, 40))]
    short = module.ordered_attention_forward(q[:T], k[:T], v[:T], rows[0], 0.25)
    long = module.ordered_attention_forward(q, k, v, rows[1], 0.25)
    assert asked == ([True, False] if path == "triton" else [])
    for few, all_ in zip(short, (long[0][:T], long[1][:, :T])):
        assert torch.equal(few, all_)


def test_tiles_have_as_many_rows_whether_one_segment_is_enough_or_not() -> None:
    """A prefill's graphs keep the tiles of either."""
    for E in (32, 64, 128, 256):
        for capability in ((8, 0), (9, 0), (10, 0)):
            assert launch_config(E, capability, True).rows == launch_config(E, capability).rows


def truth(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> tuple:
    """o and lse in float64."""
    q, k, v = (t.cpu().double().transpose(0, 1) for t in (q, k, v))
    k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
    s = (q @ k.mT * scale).masked_fill(~seen, float("-inf"))
    return (s.softmax(-1) @ v).transpose(0, 1), s.logsumexp(-1)


def check(got: tuple, exact: tuple, dtype: torch.dtype) -> None:
    o, lse = (t.cpu() for t in got)
    assert o.dtype == dtype and o.is_contiguous() and lse.dtype == torch.float32 and lse.shape == exact[1].shape
    assert ((o.double() - exact[0]).norm() / exact[0].norm()).item() <= TOLERANCE[dtype]
    torch.testing.assert_close(lse.double(), exact[1], rtol=TOLERANCE[dtype] * 4, atol=TOLERANCE[dtype] * 4)


ROWS: list[tuple[list[int], list[int | None] | None]] = [
    ([1], None),
    ([15, 1, 17, 33], None),
    ([70, 32], None),
    ([40, 7, 1, 30], [None, 0, 0, 0]),
    ([5, 33, 31, 3, 2], [None, 0, None, 2, 2]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("lengths", "prefix"), ROWS, ids=str)
@pytest.mark.parametrize(("H", "K", "E"), [(4, 1, 64), (3, 3, 16), (6, 2, 80)])
def test_is_the_softmax_over_the_keys_before(
    path: str, lengths: list[int], prefix: list[int | None] | None, H: int, K: int, E: int, dtype: torch.dtype
) -> None:
    q, k, v = inputs(sum(lengths), H, K, E, dtype)
    rows = OrderedRows.packed(lengths, DEVICE, prefix)
    got = ordered_attention_forward(q, k, v, rows, E**-0.5)
    check(got, truth(q, k, v, visible(lengths, prefix), E**-0.5), dtype)


@pytest.mark.parametrize(("H", "K", "E"), [(2, 2, 96), (2, 1, 128), (1, 1, 256), (40, 1, 8)])
def test_head_sizes(path: str, H: int, K: int, E: int) -> None:
    lengths = [35, 2]
    q, k, v = inputs(37, H, K, E, torch.float16)
    got = ordered_attention_forward(q, k, v, OrderedRows.packed(lengths, DEVICE), E**-0.5)
    check(got, truth(q, k, v, visible(lengths), E**-0.5), torch.float16)


def paged(rows: Sequence[int], K: int, E: int, page: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Keys and values of rows scattered over blocks whose unused slots are NaN, and the blocks of each row."""
    counts = [-(-n // page) for n in rows]
    blocks = torch.randperm(sum(counts) + 2).tolist()
    caches = [torch.full((len(blocks), page, K, E), float("nan"), device=DEVICE) for _ in range(2)]
    tables = [[blocks.pop() for _ in range(count)] for count in counts]
    for n, table in zip(rows, tables):
        for cache in caches:
            for t in range(n):
                cache[table[t // page], t % page] = torch.randn(K, E)
    return caches, tables


def slots(table: list[int], length: int, page: int) -> torch.Tensor:
    return torch.tensor([table[t // page] * page + t % page for t in range(length)])


def test_chunks_over_a_paged_cache(path: str) -> None:
    """Queries that begin in the middle of their rows: the values that a decode step of each would give."""
    lengths, counts, page, H, K, E = [50, 20, 33], [13, 20, 1], 4, 4, 2, 16
    caches, tables = paged(lengths, K, E, page)
    q = torch.randn(sum(counts), H, E, device=DEVICE) * 3
    keys = [slots(table, n, page) for table, n in zip(tables, lengths)]
    rows = OrderedRows.gathered(counts, keys, DEVICE)
    o, lse = ordered_attention_forward(q, *(cache.flatten(0, 1) for cache in caches), rows, 0.25)
    start = 0
    for n, count, at in zip(lengths, counts, keys):
        own = [cache.flatten(0, 1)[at.to(DEVICE)] for cache in caches]
        seen = visible([n])[n - count :]
        part = slice(start, start + count)
        check((o[part].contiguous(), lse[:, part]), truth(q[part], *own, seen, 0.25), torch.float32)
        start += count


def test_a_decode_step_agrees(path: str) -> None:
    """The same helpers in the same order; in the interpreter numpy's products of other shapes may round otherwise."""
    if path == "reference":
        return
    n, page, H, K, E = 70, 4, 4, 2, 16
    caches, tables = paged([n], K, E, page)
    q = torch.randn(n, H, E, device=DEVICE) * 3
    rows = OrderedRows.gathered([n], [slots(tables[0], n, page)], DEVICE)
    o, _ = ordered_attention_forward(q, *(cache.flatten(0, 1) for cache in caches), rows, 0.25)
    some = torch.tensor([1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 65, 70], dtype=torch.int32, device=DEVICE)
    table = torch.tensor(tables, dtype=torch.int32, device=DEVICE).expand(len(some), -1).contiguous()
    o = o[some - 1]
    steps = decode_attention_triton.decode_attention(q[some - 1], *caches, table, some, 0.25)
    torch.testing.assert_close(steps, o, rtol=2e-6, atol=2e-6)


def test_views_of_one_projection(path: str) -> None:
    """q, k and v as slices: nothing is copied first."""
    lengths, H, K, E = [20, 9], 4, 2, 16
    packed = torch.randn(29, H + 2 * K, E, device=DEVICE)
    q, k, v = packed.split((H, K, K), dim=1)
    got = ordered_attention_forward(q, k, v, OrderedRows.packed(lengths, DEVICE), 0.25)
    check(got, truth(q, k, v, visible(lengths), 0.25), torch.float32)


def test_scores_far_from_zero(path: str) -> None:
    q, k, v = inputs(40, 2, 1, 16, torch.float32)
    q, k = torch.full_like(q, 4.0), k + 100
    got = ordered_attention_forward(q, k, v, OrderedRows.packed([40], DEVICE), 1.0)
    exact = truth(q, k, v, visible([40]), 1.0)
    assert ((got[0].cpu().double() - exact[0]).norm() / exact[0].norm()).item() <= 2e-3  # float32: 5e-4 at 6,400
    torch.testing.assert_close(got[1].cpu().double(), exact[1], rtol=1e-6, atol=0)


def test_a_nan_stays_in_its_row_and_head(path: str) -> None:
    lengths = [40, 20]
    q, k, v = inputs(60, 4, 2, 16, torch.float32)
    k[18, 1, 3] = float("nan")
    o, lse = ordered_attention_forward(q, k, v, OrderedRows.packed(lengths, DEVICE), 0.25)
    assert torch.isnan(o[18:40, 2:]).all() and torch.isnan(lse[2:, 18:40]).all()
    assert torch.isfinite(o[:, :2]).all() and torch.isfinite(o[40:]).all() and torch.isfinite(o[:16]).all()


def test_tiles_cover_every_query_once() -> None:
    rows = OrderedRows.packed([70, 5, 64, 1], torch.device("cpu"), [None, 0, None, 2])
    tiles = rows.tiles(32)
    assert tiles.dtype == torch.int32 and rows.tiles(32) is tiles
    found = sorted((int(s) + i, int(f) + i, int(o)) for s, n, f, o in tiles for i in range(int(n)))
    wanted = [(t, t, 0) for t in range(70)] + [(70 + i, 70 + i, 70) for i in range(5)]
    wanted += [(75 + i, i, 145) for i in range(64)] + [(139, 64, 209)]
    assert found == wanted
    ends = (tiles[:, 1] + tiles[:, 2]).tolist()
    assert ends == sorted(ends, reverse=True) and int(tiles[:, 1].max()) <= 32
    assert rows.keys[70 : 70 + 75].tolist() == [*range(70), *range(70, 75)]
    assert rows.keys[209:].tolist() == [*range(75, 140)]


def test_what_does_not_fit_is_refused() -> None:
    q, k = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
    rows = OrderedRows.packed([3, 2], torch.device("cpu"))
    with pytest.raises(ValueError, match="divisor"):
        ordered_attention_forward(q[:, :3], k, k, rows, 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        ordered_attention_forward(q, k.half(), k.half(), rows, 1.0)
    with pytest.raises(ValueError, match="gap"):
        ordered_attention_forward(torch.zeros(5, 8, 4).transpose(1, 2), k, k, rows, 1.0)
    with pytest.raises(ValueError, match="every query once"):
        ordered_attention_forward(q[:4], k, k, rows, 1.0)
    with pytest.raises(ValueError, match="scale=0"):
        ordered_attention_forward(q, k, k, rows, 0.0)


def test_who_is_refused() -> None:
    hopper, bf16 = (9, 0), torch.bfloat16
    assert refusal(hopper, bf16, 128) is None and refusal((8, 6), torch.float16, 80) is None
    assert "CPU" in (refusal(None, bf16, 128) or "")
    assert "window=5" in (refusal(hopper, bf16, 128, window=5) or "")
    assert "softcap=30" in (refusal(hopper, bf16, 128, softcap=30.0) or "")
    assert "float32" in (refusal(hopper, torch.float32, 128) or "")
    assert "head_dim=36" in (refusal(hopper, bf16, 36) or "")


def test_writes_where_it_is_told(path: str) -> None:
    q, k, v = inputs(9, 4, 2, 16, torch.float32)
    rows = OrderedRows.packed([4, 5], DEVICE)
    wanted, lse = ordered_attention_forward(q, k, v, rows, 0.25)
    table = torch.full((9, 70), 7.0, device=DEVICE)
    out = table[:, 3:67].unflatten(1, (4, 16))
    got, same = ordered_attention_forward(q, k, v, rows, 0.25, out)
    assert got.data_ptr() == out.data_ptr() and torch.equal(out, wanted) and torch.equal(same, lse)
    assert (table[:, :3] == 7).all() and (table[:, 67:] == 7).all()
    with pytest.raises(ValueError, match="out is"):
        ordered_attention_forward(q, k, v, rows, 0.25, out[:8])
