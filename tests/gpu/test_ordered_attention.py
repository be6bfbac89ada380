"""Ordered attention on a GPU in 16 bits: one query's bits, whoever computes them; error against float64; no races."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pronghorn.config.sampling import SamplingParams
from pronghorn.kernels import decode_attention_triton, step_attention_cuda
from pronghorn.kernels.decode_attention import decode_attention, write_kv
from pronghorn.kernels.launch import chained
from pronghorn.kernels.ordered_attention import ordered_attention_forward
from pronghorn.kernels.ordered_rows import SEGMENT, OrderedRows
from pronghorn.kernels.rope import rotate_
from pronghorn.kernels.rope_kv import rope_and_write_kv
from pronghorn.kernels.step_attention import step_attention
from pronghorn.models import attention as attention_module
from pronghorn.models.attention import PackedAttention
from pronghorn.rollout.native.attention import PrefillAttention
from pronghorn.rollout.native.kv_cache import KVCache, KVShape
from pronghorn.rollout.native.paged import PagedDecode
from pronghorn.rollout.native.request import Prompt, Sequence
from pronghorn.rollout.native.scheduler import Chunk
from tests.gpu.test_attention import GROUPS, UNEVEN, check, no_waiting
from tests.models.test_attention import visible

DEVICE = torch.device("cuda")
BF16, FP16 = torch.bfloat16, torch.float16
N, PAGE = 1200, 16
EDGES = [1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1000]
SHAPES = [(BF16, 8, 2, 128), (FP16, 8, 2, 128), (BF16, 4, 4, 64), (BF16, 14, 2, 64), (BF16, 3, 1, 80), (BF16, 4, 2, 96),
          (BF16, 4, 2, 256), (BF16, 20, 1, 128)]  # fmt: skip
shapes = pytest.mark.parametrize(("dtype", "H", "K", "E"), SHAPES, ids=str)


class Row:
    """One sequence of N tokens: its q, k and v, packed and in a paged cache whose other slots are NaN."""

    def __init__(self, dtype: torch.dtype, H: int, K: int, E: int) -> None:
        torch.manual_seed(H + E)
        self.q, self.k, self.v = (torch.randn(N, n, E, device=DEVICE).to(dtype) for n in (H, K, K))
        self.q *= 2
        self.scale = E**-0.5
        blocks = -(-N // PAGE)
        self.table = torch.randperm(blocks + 5)[:blocks]
        self.caches = [torch.full((blocks + 5, PAGE, K, E), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2)]
        self.slots = (self.table[:, None] * PAGE + torch.arange(PAGE)).flatten()[:N]
        for cache, x in zip(self.caches, (self.k, self.v)):
            cache.flatten(0, 1)[self.slots.to(DEVICE)] = x

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        rows = OrderedRows.packed([N], DEVICE)
        return ordered_attention_forward(self.q, self.k, self.v, rows, self.scale)

    def decoded(self, lengths: torch.Tensor) -> torch.Tensor:
        """A decode step at each of these lengths."""
        lengths = lengths.to(DEVICE, torch.int32)
        table = self.table.to(DEVICE, torch.int32).expand(len(lengths), -1).contiguous()
        return decode_attention(self.q[lengths - 1], *self.caches, table, lengths, self.scale)

    def truth(self) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (t.double().transpose(0, 1) for t in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(q.shape[0] // t.shape[0], dim=0) for t in (k, v))
        hidden = torch.ones(N, N, dtype=torch.bool, device=DEVICE).triu(1)
        s = (q @ k.mT * self.scale).masked_fill(hidden, float("-inf"))
        return (s.softmax(-1) @ v).transpose(0, 1), s.logsumexp(-1)


@shapes
def test_error_against_float64(dtype: torch.dtype, H: int, K: int, E: int) -> None:
    """p and o are rounded once each (2^-9 at most, in bf16); the sums of rounded p divide out but for chance."""
    row = Row(dtype, H, K, E)
    (o, lse), (exact, exact_lse) = row.whole(), row.truth()
    unit = torch.finfo(dtype).eps / 2
    assert (o.double() - exact).norm() <= unit * exact.norm()
    assert lse.dtype == torch.float32
    assert (lse.double() - exact_lse).abs().max() <= unit


@shapes
def test_a_decode_step_of_every_length_has_the_rows_bits(dtype: torch.dtype, H: int, K: int, E: int) -> None:
    row = Row(dtype, H, K, E)
    o, _ = row.whole()
    assert torch.equal(row.decoded(torch.arange(1, N + 1)), o)


def test_the_order_is_what_makes_them_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other segments in the decode kernel alone, and bits differ: the tests above can fail."""
    row = Row(BF16, 8, 2, 128)
    o, _ = row.whole()
    monkeypatch.setattr(decode_attention_triton, "SEGMENT", 128)
    other = row.decoded(torch.arange(1, N + 1))
    assert torch.equal(other[:128], o[:128]) and not torch.equal(other, o)
    assert (other.double() - o.double()).norm() <= 4e-3 * o.double().norm()


@shapes
def test_a_tables_width_and_the_neighbours_change_no_bit(dtype: torch.dtype, H: int, K: int, E: int) -> None:
    row = Row(dtype, H, K, E)
    o, _ = row.whole()
    for length in (1, 64, 200, 256, 257):
        table = row.table[: -(-length // PAGE)].to(DEVICE, torch.int32)[None].contiguous()
        lengths = torch.tensor([length], dtype=torch.int32, device=DEVICE)
        alone = decode_attention(row.q[length - 1 : length], *row.caches, table, lengths, row.scale)
        assert torch.equal(alone[0], o[length - 1])


@shapes
def test_rows_of_any_length_have_the_same_bits(dtype: torch.dtype, H: int, K: int, E: int) -> None:
    """Copies of the row cut off at the edges of tiles and segments, packed behind one another; also those alone that
    are within one segment.
    """
    row = Row(dtype, H, K, E)
    o, lse = row.whole()
    for lengths in (EDGES, [n for n in EDGES if n <= SEGMENT]):
        packed = [torch.cat([t[:n] for n in lengths]) for t in (row.q, row.k, row.v)]
        got, got_lse = ordered_attention_forward(*packed, OrderedRows.packed(lengths, DEVICE), row.scale)
        assert torch.equal(got, torch.cat([o[:n] for n in lengths]))
        assert torch.equal(got_lse, torch.cat([lse[:, :n] for n in lengths], dim=1))


@shapes
def test_behind_a_shared_prefix(dtype: torch.dtype, H: int, K: int, E: int) -> None:
    """The row cut into a prompt and its completion at every edge, another completion between them."""
    row = Row(dtype, H, K, E)
    o, lse = row.whole()
    for P in EDGES:
        strangers = [torch.randn_like(t[:77]) for t in (row.q, row.k, row.v)]
        packed = [torch.cat((t[:P], s, t[P:])) for t, s in zip((row.q, row.k, row.v), strangers)]
        attention = PackedAttention([P, 77, N - P], DEVICE, [None, 0, 0], ordered=True)
        assert attention.in_order(dtype, E)
        got, (got_lse,) = attention.forward(*packed, row.scale)
        assert torch.equal(torch.cat((got[:P], got[P + 77 :])), o)
        assert torch.equal(torch.cat((got_lse[:, :P], got_lse[:, P + 77 :]), dim=1), lse)
        together = [torch.cat((t[:P], s)) for t, s in zip((row.q, row.k, row.v), strangers)]
        alone, _ = ordered_attention_forward(*together, OrderedRows.packed([P + 77], DEVICE), row.scale)
        assert torch.equal(got[P : P + 77], alone[P:])


@shapes
def test_prefill_in_chunks_over_the_cache(dtype: torch.dtype, H: int, K: int, E: int) -> None:
    row = Row(dtype, H, K, E)
    o, _ = row.whole()
    pages = [cache.flatten(0, 1) for cache in row.caches]
    for cuts in ([0, 64, 256, N], [0, 1, 65, 255, 700, N], [0, 257, 258, 513, N], list(range(0, N, 100)) + [N]):
        chunks = list(pairwise(cuts))
        rows = OrderedRows.gathered([b - a for a, b in chunks], [row.slots[:b] for _, b in chunks], DEVICE)
        got, _ = ordered_attention_forward(row.q, *pages, rows, row.scale)
        assert torch.equal(got, o)


def test_the_engines_cores_have_the_trainers_bits() -> None:
    """Prefill of two sequences, one in two steps, then a decode step of both: each equal to its packed row."""
    H, K, E = 8, 2, 128
    lengths = [700, 300]
    cache = KVCache(KVShape(1, K, E, BF16, DEVICE), 100, PAGE)
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), n, E, device=DEVICE).to(BF16) for n in (H, K, K))
    wanted = PackedAttention(lengths, DEVICE, ordered=True)(0, q, k, v, 0.1)
    tables = [list(range(3, 3 + 44)), list(range(99, 99 - 19, -1))]
    rows = [
        Sequence(i, i, 0, Prompt([0] * n), SamplingParams(), 1, table=table)
        for i, (n, table) in enumerate(zip(lengths, tables))
    ]
    steps = [[(0, 0, 400)], [(0, 400, 699), (1, 0, 299)]]
    for step in steps:
        chunks = [Chunk(rows[i], a, b) for i, a, b in step]
        tokens = torch.cat([torch.arange(a, b) + (0 if i == 0 else lengths[0]) for i, a, b in step]).to(DEVICE)
        core = PrefillAttention(cache, chunks)
        assert core.ordered is not None
        assert torch.equal(core(0, q[tokens], k[tokens], v[tokens], 0.1), wanted[tokens])
    last = torch.tensor([699, 999], device=DEVICE)
    decode = PagedDecode.of(cache, tables, lengths)
    assert torch.equal(decode(0, q[last], k[last], v[last], 0.1), wanted[last])


def test_a_captured_decode_step_follows_its_tensors() -> None:
    """Tables, positions and lengths filled anew after capture; a row of padding stays zero and writes nothing."""
    H, K, E, B, width = 8, 2, 128, 3, 40
    cache = KVCache(KVShape(1, K, E, BF16, DEVICE), 130, PAGE)
    for pages in (*cache.keys, *cache.values):
        pages.normal_()
    table = torch.randperm(130)[: B * width].view(B, width).to(DEVICE, torch.int32)
    positions = torch.tensor([5, 6, 7], dtype=torch.int32, device=DEVICE)
    core = PagedDecode(cache, table, positions, positions + 1, query_heads=H)
    angles = torch.rand(width * PAGE, E // 2, device=DEVICE).repeat(1, 2)
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
    qkv = torch.randn(B, H + 2 * K, E, device=DEVICE).to(BF16)
    stream = torch.cuda.Stream()

    def step() -> torch.Tensor:
        return core.rotate_and_attend(0, *qkv.split((H, K, K), dim=1), cos, sin, 0.1)

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        o = step()
    for at in ([630, 255, -1], [0, 256, 639]):
        positions.copy_(torch.tensor(at))
        core.lengths_B.copy_(positions + 1)
        qkv.normal_()
        before, caches = qkv.clone(), [t.clone() for t in (cache.keys[0], cache.values[0])]
        graph.replay()
        live = positions >= 0
        q, k, v = before[live].split((H, K, K), dim=1)
        rotate_(q, k, cos, sin, positions[live])
        write_kv(k, v, *caches, table[live], positions[live])
        wanted = decode_attention(q, *caches, table[live].contiguous(), positions[live] + 1, 0.1)
        assert torch.equal(o[live], wanted) and not o[~live].any()
        assert torch.equal(cache.keys[0], caches[0]) and torch.equal(cache.values[0], caches[1])


@pytest.mark.parametrize(
    ("kernel", "B"), [("few", 1), ("few", 6), ("few", 16), ("many", 3), ("many", 17), ("many", 130)]
)
@pytest.mark.parametrize("angles", ["own", "float32"])
@pytest.mark.parametrize(
    ("dtype", "H", "K", "E", "R"),
    [
        (BF16, 32, 8, 128, 128),
        (FP16, 14, 2, 64, 32),
        (BF16, 4, 4, 80, 80),
        (FP16, 8, 1, 128, 64),
        (BF16, 40, 1, 256, 64),
    ],
)
def test_a_step_in_one_launch(
    kernel: str,
    B: int,
    angles: str,
    dtype: torch.dtype,
    H: int,
    K: int,
    E: int,
    R: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers in a chain, as a decode step launches them, many times over: the bits of the operations apart, by either
    kernel or, of heads that it does not take, in those operations.
    """
    width, layers = 82, 10 if B < 100 else 2
    qkvs = [torch.randn(B, H + 2 * K, E, device=DEVICE).to(dtype) * 2 for _ in range(layers)]
    angle = (torch.rand(width * PAGE, R // 2, device=DEVICE) * 7).repeat(1, 2)
    cos, sin = (x if angles == "float32" else x.to(dtype) for x in (angle.cos(), angle.sin()))
    shape = (B * width, PAGE, K, E)
    caches = [[torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)] for _ in range(layers)]
    few = kernel == "few"
    monkeypatch.setattr(step_attention_cuda, "not_few", lambda *_: "" if few else "not here")
    if few:
        monkeypatch.setattr(step_attention_cuda, "not_many", lambda *_: "not here")
    way = step_attention_cuda.way_of(*qkvs[0].split((H, K, K), dim=1), cos, sin, *caches[0], width * PAGE)
    assert isinstance(way, str) != (E <= 128 if few else E in (64, 128))
    table = torch.randperm(B * width, device=DEVICE).view(B, width).int()
    for shift in range(3):
        lengths = torch.tensor((EDGES * 10)[5 * shift :][:B], dtype=torch.int32, device=DEVICE)
        lengths[2 + shift :][:1] = 0
        counts = lengths - 1, lengths
        wanted, kept = [], []
        for qkv, pair in zip(qkvs, caches):
            pair = [t.clone() for t in pair]
            q, k, v = qkv.clone().split((H, K, K), dim=1)
            rope_and_write_kv(q, k, v, cos, sin, *pair, table, counts[0])
            wanted.append(decode_attention(q, *pair, table, lengths, E**-0.5))
            kept.append(pair)
        for _ in range(20 if B < 100 else 5):
            ours = [[t.clone() for t in pair] for pair in caches]
            given = [qkv.clone().split((H, K, K), dim=1) for qkv in qkvs]
            torch.cuda.synchronize()
            with chained():
                got = [
                    step_attention(*rows, cos, sin, *pair, table, *counts, E**-0.5) for rows, pair in zip(given, ours)
                ]
            assert all(torch.equal(a, b) for a, b in zip(got, wanted))
            assert all(torch.equal(a, b) for pair, same in zip(ours, kept) for a, b in zip(pair, same))


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("angles", [BF16, FP16, torch.float32])
@pytest.mark.parametrize(("H", "K", "E", "R"), [(32, 8, 128, 128), (14, 2, 64, 32), (4, 4, 80, 80), (40, 1, 256, 64)])
def test_rotation_and_write_in_one_launch(
    dtype: torch.dtype, angles: torch.dtype, H: int, K: int, E: int, R: int
) -> None:
    B, width = 67, 5
    packed = torch.randn(B, H + 2 * K, E, device=DEVICE).to(dtype)
    angle = (torch.rand(width * PAGE, R // 2, device=DEVICE) * 7).repeat(1, 2)
    cos, sin = angle.cos().to(angles), angle.sin().to(angles)
    caches = [torch.randn(B * width, PAGE, K, E, device=DEVICE).to(dtype) for _ in range(2)]
    table = torch.randperm(B * width, device=DEVICE).view(B, width).int()
    positions = torch.randint(0, width * PAGE, (B,), device=DEVICE, dtype=torch.int32)
    wanted, expected = packed.clone(), [cache.clone() for cache in caches]
    q, k, v = wanted.split((H, K, K), dim=1)
    rotate_(q, k, cos, sin, positions)
    write_kv(k, v, *expected, table, positions)
    rope_and_write_kv(*packed.split((H, K, K), dim=1), cos, sin, *caches, table, positions)
    assert torch.equal(packed, wanted)
    assert all(torch.equal(got, same) for got, same in zip(caches, expected))


def test_no_races() -> None:
    row = Row(BF16, 32, 8, 128)
    o, lse = row.whole()
    lengths = torch.arange(1, N + 1)
    for _ in range(20):
        again, again_lse = row.whole()
        assert torch.equal(again, o) and torch.equal(again_lse, lse)
        assert torch.equal(row.decoded(lengths), o)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(("lengths", "prefix"), [(UNEVEN, None), ([512, 512], None), *GROUPS[:3]], ids=str)
def test_gradients(lengths: list[int], prefix: list[int | None] | None, head_dim: int) -> None:
    """The ordered forward and flash's backward on its o and lse, against float64 and torch's own error."""
    torch.manual_seed(head_dim)
    inputs = [torch.randn(sum(lengths), n, head_dim, device=DEVICE).to(BF16) for n in (8, 2, 2)]
    check(PackedAttention(lengths, DEVICE, prefix, ordered=True), inputs, visible(lengths, prefix))


def test_the_host_never_waits() -> None:
    lengths, prefix = [100, 64, 199, 50, 3, 33], [None, 0, 0, None, 3, 3]
    inputs = [torch.randn(sum(lengths), n, 128, device=DEVICE).to(BF16).requires_grad_() for n in (8, 2, 2)]
    PackedAttention(lengths, DEVICE, prefix, ordered=True)(0, *inputs, 0.1).sum().backward()
    row = Row(BF16, 8, 2, 128)
    lengths_B = torch.tensor([9, 700], dtype=torch.int32, device=DEVICE)
    table = row.table.to(DEVICE, torch.int32).expand(2, -1).contiguous()
    with no_waiting():
        PackedAttention(lengths, DEVICE, prefix, ordered=True)(0, *inputs, 0.1).sum().backward()
        decode_attention(row.q[:2], *row.caches, table, lengths_B, 0.1)


def test_what_does_not_run_in_order_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """float32 takes the old path, close to the same softmax."""
    attention_module._say_once.cache_clear()
    inputs = [torch.randn(70, n, 36, device=DEVICE) for n in (4, 2, 2)]
    got = PackedAttention([70], DEVICE, ordered=True)(0, *inputs, 0.1)
    assert "because of torch.float32" in capsys.readouterr().out
    wanted, _ = ordered_attention_forward(*inputs, OrderedRows.packed([70], DEVICE), 0.1)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
