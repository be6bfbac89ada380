"""Decode attention over a paged cache: both paths against the softmax over each row's tokens in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pronghorn.kernels import decode_attention as module
from pronghorn.kernels import decode_attention_triton
from pronghorn.kernels.decode_attention import decode_attention, workspace_elements, write_kv
from pronghorn.kernels.reference import decode_attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 8e-4}  # float16: the probabilities and o are rounded once each


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device; the kernel in tiles of 16 tokens and segments of 32."""
    backend = decode_attention_triton if request.param == "triton" else reference
    monkeypatch.setattr(module, "_path", lambda tensor: backend)
    monkeypatch.setattr(decode_attention_triton, "TILE", 16)
    for where in (module, decode_attention_triton):
        monkeypatch.setattr(where, "SEGMENT", 32)
    return request.param


class Paged:
    """Rows of tokens scattered over blocks of a cache whose unused slots are NaN; unused table entries are absurd."""

    def __init__(self, lengths: list[int], K: int, E: int, page: int, dtype: torch.dtype) -> None:
        self.rows = [[torch.randn(n, K, E).to(dtype) for _ in range(2)] for n in lengths]
        counts = [-(-n // page) for n in lengths]
        blocks = torch.randperm(sum(counts) + 3).tolist()
        self.caches = [torch.full((len(blocks), page, K, E), float("nan"), dtype=dtype) for _ in range(2)]
        table = torch.full((len(lengths), max(counts) + 2), 2**30, dtype=torch.int32)
        for b, (n, count) in enumerate(zip(lengths, counts)):
            own = [blocks.pop() for _ in range(count)]
            table[b, :count] = torch.tensor(own)
            for t in range(n):
                for cache, tokens in zip(self.caches, self.rows[b]):
                    cache[own[t // page], t % page] = tokens[t]
        self.caches = [cache.to(DEVICE) for cache in self.caches]
        self.table = table.to(DEVICE)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)

    def truth(self, q_BHE: torch.Tensor, scale: float) -> torch.Tensor:
        """torch's attention in float64, row by row; zeros for a row without tokens."""
        out = torch.zeros(q_BHE.shape, dtype=torch.float64)
        for b, (k, v) in enumerate(self.rows):
            if len(k):
                q = q_BHE[b].cpu().double().unsqueeze(1)
                k, v = (x.double().transpose(0, 1) for x in (k, v))
                out[b] = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True).squeeze(1)
        return out

    def attend(self, q_BHE: torch.Tensor, scale: float) -> torch.Tensor:
        return decode_attention(q_BHE, *self.caches, self.table, self.lengths, scale)


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double().cpu() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("lengths", "H", "K", "E", "page"),
    [
        ([1], 1, 1, 8, 16),
        ([17, 0, 48, 1], 4, 1, 64, 16),  # 1, 0, 2 and 1 segments
        ([32, 33, 31], 2, 1, 16, 16),  # a whole segment, one token more, one less
        ([70, 33], 6, 2, 80, 8),
        ([50], 3, 3, 96, 5),
        ([20, 5], 8, 2, 128, 16),  # a table that holds several segments, and no row does
        ([35], 2, 2, 256, 4),
        ([19], 20, 1, 16, 32),  # a block longer than a tile, and more query heads than one tile of 16
        ([170, 130], 2, 1, 16, 16),  # 6 segments: more than merge at once
    ],
)
def test_is_the_softmax_over_each_rows_tokens(
    path: str, lengths: list[int], H: int, K: int, E: int, page: int, dtype: torch.dtype
) -> None:
    """Scores are wide enough that a few tokens dominate; what is outside the rows is NaN and must not show."""
    paged = Paged(lengths, K, E, page, dtype)
    q = (torch.randn(len(lengths), H, E) * 3).to(DEVICE, dtype)
    o = paged.attend(q, E**-0.5)
    exact = paged.truth(q, E**-0.5)
    assert o.dtype == dtype and o.shape == q.shape and o.is_contiguous()
    assert torch.isfinite(o).all()
    assert _error(o, exact) <= TOLERANCE[dtype]
    assert not o[paged.lengths == 0].any()


def test_scores_far_from_zero(path: str) -> None:
    """Scores in the thousands: only differences are exponentiated, within a segment and between them."""
    paged = Paged([40], 1, 16, 8, torch.float32)
    q = torch.full((1, 2, 16), 4.0, device=DEVICE)
    for cache, tokens in zip(paged.caches[:1], paged.rows[0]):
        cache += 100.0
        tokens += 100.0
    assert _error(paged.attend(q, 1.0), paged.truth(q, 1.0)) <= 2e-3  # float32 has 5e-4 between scores of 6,400


@pytest.mark.parametrize("behind", [0, 5])
def test_a_rows_bits_depend_on_its_own_tokens_alone(path: str, behind: int) -> None:
    """Not on its neighbours, not on how wide the table is; nor do heads mix."""
    paged = Paged([37, 5, 70], 2, 16, 4, torch.float32)
    q = torch.randn(3, 4, 16, device=DEVICE)
    together = paged.attend(q, 0.25)
    if path == "reference":  # its sums are as long as the longest row
        return
    for b, length in enumerate((37, 5, 70)):
        table = paged.table[b : b + 1, : -(-length // 4) + behind]
        alone = decode_attention(q[b : b + 1], *paged.caches, table, paged.lengths[b : b + 1], 0.25)
        assert torch.equal(alone[0], together[b])


def test_a_given_workspace(path: str) -> None:
    """Larger than needed and full of NaN; one that is too small is refused."""
    paged = Paged([37, 70], 2, 16, 4, torch.float32)
    q = torch.randn(2, 4, 16, device=DEVICE)
    needed = workspace_elements(2, paged.table.shape[1] * 4, 4, 16)
    space = torch.full((needed + 7,), float("nan"), device=DEVICE)
    got = decode_attention(q, *paged.caches, paged.table, paged.lengths, 0.25, space)
    assert torch.equal(got, paged.attend(q, 0.25))
    assert workspace_elements(2, 32, 4, 16) == 0
    with pytest.raises(ValueError, match=f"{needed} float32"):
        decode_attention(q, *paged.caches, paged.table, paged.lengths, 0.25, space[: needed - 1])


def test_a_nan_shows_in_its_own_row_and_head_alone(path: str) -> None:
    """Masking must not hide a model that overflowed."""
    paged = Paged([67, 20], 2, 16, 4, torch.float32)
    at = 18
    paged.caches[0][int(paged.table[0, at // 4]), at % 4, 1, 3] = float("nan")
    o = paged.attend(torch.randn(2, 4, 16, device=DEVICE), 0.25)
    assert torch.isnan(o[0, 2:]).all()
    assert torch.isfinite(o[0, :2]).all() and torch.isfinite(o[1]).all()


def test_rows_of_a_larger_product_are_read_where_they_are(path: str) -> None:
    """q, k and v as slices of one projection's output: nothing is copied first."""
    H, K, E, page = 4, 2, 16, 4
    paged = Paged([11, 6], K, E, page, torch.float16)
    packed = torch.randn(2, H + 2 * K, E).to(DEVICE, torch.float16)
    q, k, v = packed.split((H, K, K), dim=1)
    positions = paged.lengths - 1
    write_kv(k, v, *paged.caches, paged.table, positions)
    for b, (keys, values) in enumerate(paged.rows):
        keys[-1], values[-1] = k[b].cpu(), v[b].cpu()
    assert _error(paged.attend(q, 0.25), paged.truth(q, 0.25)) <= TOLERANCE[torch.float16]


def test_writes_where_it_is_told(path: str) -> None:
    """Into the columns of a table: rows of one segment and of several, and one without a token."""
    paged = Paged([3, 67, 1], 2, 16, 4, torch.float32)
    q = torch.randn(3, 4, 16, device=DEVICE)
    lengths = paged.lengths.clone()
    lengths[2] = 0
    table = torch.full((3, 4 * 16 + 5), 7.0, device=DEVICE)
    out = table[:, 2 : 2 + 4 * 16].unflatten(1, (4, 16))
    wanted = decode_attention(q, *paged.caches, paged.table, lengths, 0.25)
    got = decode_attention(q, *paged.caches, paged.table, lengths, 0.25, out_BHE=out)
    assert got.data_ptr() == out.data_ptr() and torch.equal(out, wanted) and not wanted[2].any()
    assert (table[:, :2] == 7).all() and (table[:, 2 + 4 * 16 :] == 7).all()
    for wrong in (out[:2], out.transpose(1, 2), out.half()):
        with pytest.raises(ValueError, match="out is"):
            decode_attention(q, *paged.caches, paged.table, lengths, 0.25, out_BHE=wrong)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("K", "E", "page"), [(1, 8, 1), (3, 80, 5), (2, 64, 16), (9, 128, 4)])
def test_write_stores_its_rows_and_nothing_else(path: str, K: int, E: int, page: int, dtype: torch.dtype) -> None:
    B, N = 5, 3
    caches = [torch.randn(B * N + 2, page, K, E).to(DEVICE, dtype) for _ in range(2)]
    expected = [cache.clone() for cache in caches]
    table = torch.randperm(B * N + 2)[: B * N].view(B, N).to(DEVICE, torch.int32)
    positions = [0, N * page - 1, -1, page, 2 * page - 1]
    k, v = (torch.randn(B, K, E).to(DEVICE, dtype) for _ in range(2))
    for b, position in enumerate(positions):
        if position >= 0:
            for cache, tokens in zip(expected, (k, v)):
                cache[int(table[b, position // page]), position % page] = tokens[b]
    write_kv(k, v, *caches, table, torch.tensor(positions, dtype=torch.int32, device=DEVICE))
    for cache, wanted in zip(caches, expected):
        assert torch.equal(cache, wanted)


def test_nothing_outside_the_table_is_touched(path: str) -> None:
    """A length or position beyond the table raises where it can be seen, and is held back where it cannot."""
    paged = Paged([8, 8], 1, 16, 4, torch.float32)
    table = paged.table[:, :2]
    q, far = torch.randn(2, 1, 16, device=DEVICE), torch.tensor([9, 8], dtype=torch.int32, device=DEVICE)
    before = [cache.clone() for cache in paged.caches]
    if path == "reference" and DEVICE == "cpu":
        with pytest.raises(ValueError, match="add blocks"):
            decode_attention(q, *paged.caches, table, far, 0.25)
        with pytest.raises(ValueError, match="add blocks"):
            write_kv(q, q, *paged.caches, table, far - 1)
    if path == "triton":
        assert torch.equal(decode_attention(q, *paged.caches, table, far, 0.25), paged.attend(q, 0.25))
        write_kv(q[:1], q[:1], *paged.caches, table[:1], far[:1] - 1)
    for cache, old in zip(paged.caches, before):
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)


def test_what_does_not_fit_is_refused() -> None:
    q, cache = torch.zeros(2, 4, 8), torch.zeros(3, 4, 2, 8)
    table, lengths = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="caches are"):
        decode_attention(q, cache, torch.zeros(3, 4, 2, 9), table, lengths, 1.0)
    with pytest.raises(ValueError, match="one dtype"):
        decode_attention(q.half(), cache, cache, table, lengths, 1.0)
    with pytest.raises(ValueError, match="without a gap"):
        decode_attention(torch.zeros(2, 8, 4).transpose(1, 2), cache, cache, table, lengths, 1.0)
    with pytest.raises(ValueError, match="int32"):
        decode_attention(q, cache, cache, table.long(), lengths, 1.0)
    with pytest.raises(ValueError, match="lengths"):
        decode_attention(q, cache, cache, table, lengths.long(), 1.0)
    with pytest.raises(ValueError, match="contiguous"):
        decode_attention(q, cache.transpose(0, 1), cache.transpose(0, 1), table, lengths, 1.0)
    with pytest.raises(ValueError, match="blocks must follow"):
        decode_attention(q, cache, cache, torch.zeros(2, 2, dtype=torch.int32).t(), lengths, 1.0)
    with pytest.raises(ValueError, match="multiple"):
        decode_attention(torch.zeros(2, 3, 8), cache, cache, table, lengths, 1.0)
    with pytest.raises(ValueError, match="scale=0"):
        decode_attention(q, cache, cache, table, lengths, 0.0)
    with pytest.raises(ValueError, match="slot of the cache"):
        write_kv(q, q, cache, cache, table, lengths)
