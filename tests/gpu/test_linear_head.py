"""The head's losses on a GPU: bfloat16 error, the gradient over the logits, int64 offsets, memory, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pronghorn.kernels.head import chunk_rows
from pronghorn.kernels.linear_cross_entropy import linear_cross_entropy
from pronghorn.kernels.linear_logprob import chosen_logprobs
from pronghorn.kernels.logits import logit_stats_
from pronghorn.kernels.reference.linear_cross_entropy import linear_cross_entropy as whole_cross_entropy
from pronghorn.kernels.reference.linear_logprob import chosen_logprobs as whole_logprobs

BF16 = torch.bfloat16
N, D, V = 777, 4096, 128256
DENOMINATOR = 1000


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def _poison() -> None:
    """Leave NaN in the memory that the next results are made in."""
    torch.full((1 << 29,), float("nan"), device="cuda")


def _inputs(n: int = N, v: int = V) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head whose logits spread by 2, its bias, and labels of which a fifth is ignored."""
    hidden = torch.randn(n, D, device="cuda").to(BF16)
    weight = (torch.randn(v, D, device="cuda") * 2 / D**0.5).to(BF16)
    targets = torch.randint(v, (n,), device="cuda")
    targets[::5] = -100
    return hidden, weight, torch.randn(v, device="cuda").to(BF16), targets


def _gradients(function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], dtype: torch.dtype) -> list[Any]:
    leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
    loss = function(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "scale": 0.5}], ids=str)
def test_cross_entropy_error(options: dict[str, Any]) -> None:
    """At most 1.1 times as far from float64 as whole bfloat16 logits are, in every gradient; the loss far nearer."""
    hidden, weight, bias, targets = _inputs()
    weights = torch.rand(N, device="cuda")

    def loss(function: Any) -> Callable[..., torch.Tensor]:
        return lambda h, w, b: function(h, w, targets, DENOMINATOR, bias_V=b, weights_N=weights, **options)

    _poison()
    ours = _gradients(loss(linear_cross_entropy), [hidden, weight, bias], BF16)
    theirs = _gradients(loss(whole_cross_entropy), [hidden, weight, bias], BF16)
    exact = _gradients(loss(whole_cross_entropy), [hidden, weight, bias], torch.float64)
    assert _error(ours[0], exact[0]) < 1e-5
    for name, got, eager, truth in zip(("hidden", "weight", "bias"), ours[1:], theirs[1:], exact[1:], strict=True):
        assert got.dtype == BF16
        assert _error(got, truth) <= 1.1 * _error(eager, truth) and _error(got, truth) < 0.003, (
            name, _error(got, truth), _error(eager, truth),
        )  # fmt: skip


def test_frozen_head_error_and_no_rounding_by_the_denominator() -> None:
    """Whatever the denominator, the hidden states' gradient is close to bfloat16's nearest, which is 0.0017 by norm."""
    hidden, weight, _, targets = _inputs()
    exact = _gradients(lambda h: whole_cross_entropy(h, weight.double(), targets, 1), [hidden], torch.float64)
    for denominator in (1, 1000, torch.tensor(777, device="cuda")):
        ours = _gradients(lambda h, m=denominator: linear_cross_entropy(h, weight, targets, m), [hidden], BF16)
        assert _error(ours[0], exact[0] / denominator) < 1e-5
        assert _error(ours[1], exact[1] / denominator) < 0.0022


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprob_error(temperature: float) -> None:
    hidden, weight, _, targets = _inputs()
    targets = targets.clamp_min(0)
    upstream = torch.randn(N, device="cuda")
    _poison()

    def run(function: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (hidden, weight)]
        logps, entropy = function(*leaves, targets, temperature=temperature, with_entropy=True)
        (logps * upstream.to(logps.dtype)).sum().backward()
        return [logps.detach(), entropy, *(leaf.grad for leaf in leaves)]

    ours, theirs, exact = run(chosen_logprobs, BF16), run(whole_logprobs, BF16), run(whole_logprobs, torch.float64)
    assert _error(ours[0], exact[0]) < 1e-5 and _error(ours[1], exact[1]) < 1e-5
    for got, eager, truth in zip(ours[2:], theirs[2:], exact[2:], strict=True):
        assert _error(got, truth) <= 1.1 * _error(eager, truth) + 1e-3 and _error(got, truth) < 0.004


def test_entropy_gradient_error() -> None:
    """A loss of log-probabilities and entropies, with a frozen head and with one that trains."""
    hidden, weight, _, targets = _inputs()
    targets = targets.clamp_min(0)
    upstream, shares = torch.randn(N, device="cuda") / N, torch.rand(N, device="cuda") * 0.1 / N
    _poison()

    def run(function: Any, dtype: torch.dtype, count: int) -> list[torch.Tensor]:
        leaves = [t.to(dtype, copy=True) for t in (hidden, weight)]
        for leaf in leaves[:count]:
            leaf.requires_grad_()
        logps, entropy = function(*leaves, targets, temperature=0.7, with_entropy=True, entropy_gradient=True)
        (logps * upstream.to(logps.dtype) - entropy * shares.to(logps.dtype)).sum().backward()
        return [logps.detach(), entropy.detach(), *(leaf.grad for leaf in leaves[:count])]

    for count in (1, 2):
        ours, theirs = run(chosen_logprobs, BF16, count), run(whole_logprobs, BF16, count)
        exact = run(whole_logprobs, torch.float64, count)
        assert _error(ours[0], exact[0]) < 1e-5 and _error(ours[1], exact[1]) < 1e-5
        for got, eager, truth in zip(ours[2:], theirs[2:], exact[2:], strict=True):
            assert _error(got, truth) <= 1.1 * _error(eager, truth) + 1e-3 and _error(got, truth) < 0.004


@pytest.mark.parametrize(
    "v, dtype",
    [(v, BF16) for v in (128256, 131072, 50257, 20001, 8193, 8192, 1000, 7, 1)] + [(50257, torch.float16)],
)
def test_gradient_over_the_logits(v: int, dtype: torch.dtype) -> None:
    """Twenty runs, the same bits, and the bits of the gradient that has memory of its own, but for a last one."""
    rows = 700
    x = torch.randn(rows, v, device="cuda") * 3
    targets, bias = torch.randint(v, (rows,), device="cuda"), torch.randn(v, device="cuda")
    options: dict[str, Any] = {"softcap": 20.0, "scale": 1.5, "with_entropy": True}
    logps, entropy, wide = logit_stats_(x.clone(), targets, bias, gradient=torch.float32, **options)
    assert wide is not None
    first: list[torch.Tensor] | None = None
    for _ in range(20):
        mine = x.clone()
        got = logit_stats_(mine, targets, bias, gradient=dtype, **options)
        d = got[2]
        assert d is not None and mine.data_ptr() <= d.data_ptr() < mine.data_ptr() + mine.nbytes
        results = [t.clone() for t in got if t is not None]
        if first is None:
            first = results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))
    assert first is not None
    torch.testing.assert_close(first[0], logps, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(first[1], entropy, rtol=1e-6, atol=1e-6)
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(first[2], wide.to(dtype), rtol=ulp, atol=1e-7)


def test_statistics_against_float64() -> None:
    x = torch.randn(300, V, device="cuda") * 4
    targets = torch.randint(V, (300,), device="cuda")
    logp = torch.log_softmax(x.double(), dim=1)
    exact = logp.gather(1, targets.unsqueeze(1)).squeeze(1)
    d_exact = -logp.exp()
    d_exact.scatter_add_(1, targets.unsqueeze(1), torch.ones_like(exact).unsqueeze(1))
    logps, entropy, d = logit_stats_(x, targets, with_entropy=True, gradient=torch.float32)
    assert entropy is not None and d is not None
    assert _error(logps, exact) < 1e-6 and _error(entropy, -(logp.exp() * logp).sum(1)) < 1e-6
    assert _error(d, d_exact) < 2e-6


def test_rows_beyond_int32() -> None:
    rows = (1 << 31) // V + 300
    x = torch.empty(rows, V, device="cuda").normal_()
    targets = torch.randint(V, (rows,), device="cuda")
    tail = x[-64:].clone()
    logps, _, d = logit_stats_(x, targets, gradient=BF16)
    assert d is not None
    want_logps, _, want_d = logit_stats_(tail, targets[-64:], gradient=BF16)
    assert want_d is not None and torch.equal(logps[-64:], want_logps) and torch.equal(d[-64:], want_d)
    assert logps.isfinite().all()


def test_not_finite_and_unknown_targets() -> None:
    x = torch.randn(6, V, device="cuda")
    targets = torch.randint(V, (6,), device="cuda")
    x[1, 100000], x[2, 5] = float("nan"), float("inf")
    targets[3], targets[4] = V, -100
    logps, entropy, d = logit_stats_(x, targets, ignore_index=-100, with_entropy=True, gradient=BF16)
    assert entropy is not None and d is not None
    assert logps[1:4].isnan().all() and entropy[1:3].isnan().all() and d[1:4].isnan().any(dim=1).all()
    assert logps[4] == 0 and not d[4].any()
    assert logps[[0, 5]].isfinite().all() and d[[0, 5]].isfinite().all()


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_nothing_waits_for_the_gpu(trains: bool) -> None:
    hidden, weight, bias, targets = _inputs(600, 32064)
    leaves = [hidden.requires_grad_(), weight.requires_grad_(trains), bias.requires_grad_(trains)]
    denominator, weights = torch.tensor(600, device="cuda"), torch.rand(600, device="cuda")
    safe = targets.clamp_min(0)

    def step() -> None:
        linear_cross_entropy(
            leaves[0], leaves[1], targets, denominator, bias_V=leaves[2], weights_N=weights, chunk=256
        ).backward()
        logps, _ = chosen_logprobs(leaves[0], leaves[1], safe, leaves[2], chunk=256, with_entropy=True)
        logps.sum().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with pytest.raises(RuntimeError, match="sync"):  # the mode does see a wait
            targets.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_peak_memory_is_one_chunk() -> None:
    n = 2000
    hidden, weight, _, targets = _inputs(n)
    hidden.requires_grad_()
    chunk = chunk_rows(n, V)
    assert chunk == 512

    def peak(step: Callable[[], Any]) -> int:
        step()
        hidden.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        hidden.grad = None
        return torch.cuda.max_memory_allocated() - before

    def entropies() -> None:
        logps, _ = chosen_logprobs(hidden, weight, targets.clamp_min(0), with_entropy=True)
        logps.sum().backward()

    allowed = 4 * chunk * (V + D) + hidden.nbytes + (4 << 20)
    assert peak(lambda: linear_cross_entropy(hidden, weight, targets, n).backward()) <= allowed
    assert peak(entropies) <= allowed + hidden.nbytes  # the log-probabilities keep their gradient for another backward


def test_equals_eager_where_rows_are_not_aligned() -> None:
    """A vocabulary divisible by nothing: rows of the strided gradient begin at any even byte."""
    v = 50257
    hidden, weight, _, targets = _inputs(300, v)
    ours = _gradients(lambda h, w: linear_cross_entropy(h, w, targets, 240, chunk=128), [hidden, weight], BF16)
    leaves = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    loss = F.cross_entropy(F.linear(*leaves), targets, reduction="sum") / 240
    loss.backward()
    assert _error(ours[0], loss) < 1e-5
    assert _error(ours[1], leaves[0].grad) < 0.003 and _error(ours[2], leaves[1].grad) < 0.003
