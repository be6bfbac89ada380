"""Attention of packed rows in float64 against torch's own with an explicit mask: values and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from pronghorn.kernels import attention_cuda, shared_prefix
from pronghorn.kernels.attention import Choice, Path, choose
from pronghorn.kernels.reference import attention as reference
from pronghorn.kernels.spans import Spans
from pronghorn.models import attention as module
from pronghorn.models.attention import PackedAttention

SCALE = 0.3


def visible(
    lengths: Sequence[int], prefix: Sequence[int | None] | None = None, window: int | None = None
) -> torch.Tensor:
    """``[T, T]`` bool, which query sees which key; a row stands behind its prefix row."""
    row = torch.tensor([i for i, n in enumerate(lengths) for _ in range(n)])
    before = [0 if p is None else lengths[p] for p in (prefix or [None] * len(lengths))]
    position = torch.tensor([before[i] + j for i, n in enumerate(lengths) for j in range(n)])
    above = torch.tensor([-1 if p is None else p for p in (prefix or [None] * len(lengths))])
    seen = (row[:, None] == row) & (position[:, None] >= position)
    seen |= above[row][:, None] == row
    if window is not None:
        seen &= position[:, None] - position < window
    return seen


def qkv(T: int, H: int, K: int, E: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(T + H)
    return [torch.randn(T, n, E, generator=generator, dtype=dtype, requires_grad=True) for n in (H, K, K)]


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    o = F.scaled_dot_product_attention(
        *(t.transpose(0, 1) for t in (q, k, v)), attn_mask=seen, scale=SCALE, enable_gqa=True
    )
    return o.transpose(0, 1)


@pytest.fixture(params=[Path.CPU, Path.REFERENCE], ids=["cpu", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both paths that run on a CPU."""
    monkeypatch.setattr(PackedAttention, "choice", lambda *_: Choice(request.param, "of a test"))
    return request.param


def compare(attention: PackedAttention, seen: torch.Tensor, H: int = 4, K: int = 2, E: int = 8) -> None:
    inputs = qkv(seen.shape[0], H, K, E)
    expected = plain(*inputs, seen)
    probe = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * probe).sum(), inputs)
    got = attention(0, *inputs, SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(torch.autograd.grad((got * probe).sum(), inputs), gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    detached = [t.detach() for t in inputs]
    o, stats = attention.forward(*detached, SCALE)
    assert not o.requires_grad and torch.equal(o, got)
    for mine, theirs in zip(attention.backward(probe, *detached, o, stats, SCALE), gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


ROWS = [[1], [7], [5, 5, 5], [7, 1, 12], [1, 1], [3, 17, 1, 2]]


@pytest.mark.parametrize("lengths", ROWS, ids=str)
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2), (6, 1)])
def test_rows_do_not_see_each_other(path: Path, lengths: list[int], H: int, K: int) -> None:
    compare(PackedAttention(lengths, "cpu"), visible(lengths), H, K)


@pytest.mark.parametrize("window", [1, 3, 12, 50])
def test_a_window_hides_what_is_further_back(window: int) -> None:
    lengths = [7, 1, 12]
    compare(PackedAttention(lengths, "cpu", window=window), visible(lengths, window=window))


def test_scores_in_chunks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "SCORES", 200)
    monkeypatch.setattr(PackedAttention, "choice", lambda *_: Choice(Path.REFERENCE, "of a test"))
    lengths = [7, 1, 12]
    compare(PackedAttention(lengths, "cpu"), visible(lengths))
    compare(PackedAttention(lengths, "cpu", window=4), visible(lengths, window=4))


GROUPS: list[tuple[list[int], list[int | None]]] = [
    ([5, 3], [None, 0]),
    ([5, 3, 1, 7], [None, 0, 0, 0]),
    ([1, 1, 1], [None, 0, 0]),
    ([4, 5, 3, 1, 2, 6, 1, 9, 4, 4], [None, None, 1, 1, None, None, 5, 5, 5, None]),
    ([2, 3, 3, 7, 3], [None, 0, 0, None, 3]),
]


@pytest.mark.parametrize(("lengths", "prefix"), GROUPS, ids=str)
@pytest.mark.parametrize(("H", "K"), [(4, 4), (4, 2)])
def test_completions_see_their_prompt(path: Path, lengths: list[int], prefix: list[int | None], H: int, K: int) -> None:
    compare(PackedAttention(lengths, "cpu", prefix), visible(lengths, prefix), H, K)


@torch.enable_grad()
def last_sees_all(do, q, k, v, o, lse, spans, scale, path):
    """What flash's backward is for spans with more keys than queries, one span after another."""
    assert path is Path.FLASH and spans.causal
    found, a, b = [], 0, 0
    for n, m in zip(spans.q_lengths, spans.k_lengths):
        inputs = [t.detach().requires_grad_() for t in (q[a : a + n], k[b : b + m], v[b : b + m])]
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        got = plain(*inputs, seen)
        torch.testing.assert_close(got, o[a : a + n], rtol=1e-12, atol=1e-12)
        found.append(torch.autograd.grad(got, inputs, do[a : a + n]))
        a, b = a + n, b + m
    return tuple(torch.cat(parts) for parts in zip(*found))


@pytest.mark.parametrize(("lengths", "prefix"), GROUPS, ids=str)
def test_backward_over_copied_prompts(
    lengths: list[int], prefix: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = [t.detach() for t in qkv(sum(lengths), 4, 2, 8)]
    attention = PackedAttention(lengths, "cpu", prefix)
    o, stats = attention.forward(*inputs, SCALE)
    do = torch.randn_like(o)
    parts = attention.backward(do, *inputs, o, stats, SCALE)
    monkeypatch.setattr(shared_prefix, "attention_backward", last_sees_all)
    monkeypatch.setattr(PackedAttention, "choice", lambda *_: Choice(Path.FLASH, "of a test"))
    for got, wanted in zip(attention.backward(do, *inputs, o, stats, SCALE), parts):
        torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-12)


def test_many_copies_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, prefix = GROUPS[1]
    monkeypatch.setattr(shared_prefix, "GATHER", 31)
    assert PackedAttention(lengths, "cpu", prefix).shared.gathered is not None
    monkeypatch.setattr(shared_prefix, "GATHER", 30)
    assert PackedAttention(lengths, "cpu", prefix).shared.gathered is None


@pytest.mark.parametrize(("lengths", "prefix"), [*GROUPS, ([7, 1, 12], None)], ids=str)
def test_in_the_samplers_order(
    lengths: list[int], prefix: list[int | None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that ordered attention is given, by its reference; on a CPU by itself nothing is in order."""
    q, k, v = (t.detach() for t in qkv(sum(lengths), 4, 2, 8))
    assert not PackedAttention(lengths, "cpu", prefix, ordered=True).in_order(torch.float64, 8)
    expected, (expected_lse,) = PackedAttention(lengths, "cpu", prefix).forward(q, k, v, SCALE)
    monkeypatch.setattr(module, "in_order", lambda *kind: True)
    attention = PackedAttention(lengths, "cpu", prefix, ordered=True)
    assert attention.choice(torch.float64, 8).path is Path.FLASH
    got, (lse,) = attention.forward(q, k, v, SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-12, atol=1e-12)
    assert not PackedAttention(lengths, "cpu", prefix).in_order(torch.float64, 8)


def test_a_shared_prompt_is_a_repeated_one(path: Path) -> None:
    """Completions behind one prompt, and each behind a copy of it: equal outputs, and the copies' summed gradients."""
    prompt, completions = 6, [4, 1, 9]
    lengths = [prompt, *completions]
    inputs = qkv(sum(lengths), 4, 2, 8)
    index, at = [], prompt
    for n in completions:
        index += [*range(prompt), *range(at, at + n)]
        at += n
    repeated = [t.detach()[index].requires_grad_() for t in inputs]
    plainly = PackedAttention([prompt + n for n in completions], "cpu")(0, *repeated, SCALE)
    shared = PackedAttention(lengths, "cpu", [None, 0, 0, 0])(0, *inputs, SCALE)
    torch.testing.assert_close(shared[index], plainly, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(plainly)
    expected = torch.autograd.grad((plainly * probe).sum(), repeated)
    got = torch.autograd.grad((shared[index] * probe).sum(), inputs)
    for mine, theirs in zip(got, expected):
        summed = torch.zeros_like(mine).index_add_(0, torch.tensor(index), theirs)
        torch.testing.assert_close(mine, summed, rtol=1e-11, atol=1e-12)


def test_a_window_over_a_shared_prefix() -> None:
    attention = PackedAttention([5, 3, 2], "cpu", [None, 0, 0], window=8)
    assert attention.window is None  # none of these rows reaches further
    with pytest.raises(ValueError, match="window=7"):
        PackedAttention([5, 3, 2], "cpu", [None, 0, 0], window=7)


@pytest.mark.parametrize(
    ("lengths", "prefix"),
    [
        ([3, 2, 2], [None, None, 0]),
        ([3, 2, 2], [None, 0, 1]),
        ([2, 2], [0, None]),
        ([2, 2], [None, 1]),
        ([2], [None, 0]),
    ],
    ids=str,
)
def test_prefixes_elsewhere_are_refused(lengths: list[int], prefix: list[int | None]) -> None:
    with pytest.raises(ValueError, match="prefix"):
        PackedAttention(lengths, "cpu", prefix)


def test_softcap_against_autograd() -> None:
    lengths, cap = [5, 3], 0.7
    q, k, v = qkv(8, 2, 2, 4)
    scores = torch.tanh(torch.einsum("the,uhe->htu", q, k) * SCALE / cap) * cap
    expected = torch.einsum("htu,uhe->the", scores.masked_fill(~visible(lengths), float("-inf")).softmax(-1), v)
    got = PackedAttention(lengths, "cpu", softcap=cap)(0, q, k, v, SCALE)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    probe = torch.randn_like(got)
    gradients: list[Callable] = [torch.autograd.grad((o * probe).sum(), [q, k, v]) for o in (got, expected)]
    for mine, theirs in zip(*gradients):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_float32_and_strided_inputs(path: Path) -> None:
    lengths = [9, 4]
    whole = torch.randn(13, 8, 16)
    q, k, v = whole.split([4, 2, 2], dim=1)
    expected = plain(*(t.double() for t in (q, k, v)), visible(lengths))
    got, (lse,) = PackedAttention(lengths, "cpu").forward(q, k, v, SCALE)
    assert got.dtype == lse.dtype == torch.float32 and lse.shape == (4, 13)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_infinity_stays_in_its_row(path: Path) -> None:
    lengths = [3, 6]
    q, k, v = (t.detach().clone() for t in qkv(9, 2, 2, 4))
    attention = PackedAttention(lengths, "cpu")
    clean = attention.forward(q, k, v, SCALE)[0]
    v[1], k[2] = float("inf"), float("nan")
    o, stats = attention.forward(q, k, v, SCALE)
    assert torch.equal(o[3:], clean[3:]) and o[:3].isnan().any()
    for gradient in attention.backward(torch.ones_like(q), q, k, v, o, stats, SCALE):
        assert gradient[3:].isfinite().all() and not gradient[:3].isfinite().all()


def test_empty_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="empty rows"):
        PackedAttention([3, 0], "cpu")


@pytest.mark.parametrize("run", ["flash", "cudnn"])
def test_library_kernels_take_what_they_are_given(run: str) -> None:
    """On the meta device: the arguments fit the operators' schemas, and results have the promised shapes."""
    lengths = (8, 8)
    spans = Spans(lengths, lengths, causal=True, device=torch.device("meta"))
    q, k, v = (torch.empty(16, n, 64, dtype=torch.bfloat16, device="meta") for n in (4, 2, 2))
    o, lse = getattr(attention_cuda, f"{run}_forward")(q, k, v, spans, SCALE)
    assert o.shape == q.shape and o.is_contiguous() and lse.dtype == torch.float32
    assert lse.shape == ((4, 16) if run == "flash" else (2, 4, 8, 1))
    dq, dk, dv = getattr(attention_cuda, f"{run}_backward")(torch.empty_like(o), q, k, v, o, lse, spans, SCALE)
    assert dq.shape == q.shape and dk.shape == k.shape and dv.shape == v.shape


def test_choice_of_path() -> None:
    hopper, bf16 = (9, 0), torch.bfloat16
    assert choose(None, bf16, 128, 2048).path is Path.CPU
    assert choose(None, bf16, 128, 2048, window=3).path is Path.REFERENCE
    assert choose(None, bf16, 128, 2048, softcap=3.0).path is Path.REFERENCE
    assert choose(hopper, bf16, 128, 2048).path is Path.CUDNN
    assert choose(hopper, bf16, 128, None).path is Path.FLASH
    assert choose(hopper, bf16, 128, 64).path is Path.FLASH
    assert choose(hopper, bf16, 128, 2047).path is Path.FLASH
    assert choose(hopper, bf16, 128, 4096 + 128).path is Path.CUDNN
    assert choose(hopper, bf16, 128, 5000).path is Path.FLASH  # rows of any length would stall nearly every step
    assert choose(hopper, bf16, 128, 32767).path is Path.CUDNN
    assert choose(hopper, bf16, 128, 32767, deterministic=True).path is Path.FLASH
    assert choose(hopper, bf16, 256, 2048).path is Path.FLASH
    assert choose(hopper, bf16, 128, 2048, window=64).path is Path.FLASH
    assert choose((8, 6), bf16, 128, 2048).path is Path.FLASH
    assert choose((8, 6), bf16, 256, 2048).path is Path.REFERENCE
    assert "head_dim=512" in choose(hopper, bf16, 512, 2048).reason
    assert "float32" in choose(hopper, torch.float32, 64, 2048).reason
    with pytest.raises(ValueError, match="softcap"):
        choose(hopper, bf16, 128, 2048, softcap=30.0)
