"""Chunked log-probabilities against whole-logits PyTorch: values, every gradient, and memory."""

from __future__ import annotations

import itertools

import pytest
import torch

from pronghorn.kernels import logits, logits_triton
from pronghorn.kernels.linear_logprob import chosen_logprobs
from pronghorn.kernels.reference.linear_logprob import chosen_logprobs as reference

CASES = [
    pytest.param(temperature, softcap, scale, bias, id=f"t{temperature}-cap{softcap}-s{scale}-bias{bias}")
    for temperature, softcap, scale, bias in itertools.product((1.0, 0.7), (None, 5.0), (1.0, 0.25), (False, True))
]


def _inputs(N: int, D: int, V: int, bias: bool, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(N * 1000 + V)
    hidden = torch.randn(N, D, generator=generator, dtype=dtype)
    weight = torch.randn(V, D, generator=generator, dtype=dtype) * 0.5
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, torch.randn(V, generator=generator, dtype=dtype) if bias else None


@pytest.mark.parametrize("shape", [(1, 3, 2), (7, 5, 11), (33, 16, 129)])
@pytest.mark.parametrize("temperature, softcap, scale, bias", CASES)
def test_equals_whole_logits(
    shape: tuple[int, int, int], temperature: float, softcap: float | None, scale: float, bias: bool
) -> None:
    hidden, weight, targets, bias_V = _inputs(*shape, bias)
    results = []
    for function in (chosen_logprobs, reference):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias_V) if x is not None]
        logps, entropy = function(
            leaves[0], leaves[1], targets, leaves[2] if bias else None, temperature, softcap, scale, 4, True
        )
        (logps * torch.linspace(-1, 2, len(logps), dtype=logps.dtype)).sum().backward()
        results.append([logps.detach(), entropy, *(leaf.grad for leaf in leaves)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float16, 1e-3)])
def test_kernel(dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same through the Triton kernel: N no multiple of the chunk, V of nothing, gradients as small as 1e-6.

    In float16 half an ulp is 4.9e-4, a CPU rounds its logits to that, and the results of small gradients are below its
    normal numbers; the gradients of weight and bias, scaled to ordinary ones before they are rounded, are not.
    """
    monkeypatch.setattr(logits, "_path", lambda tensor: logits_triton)
    given = [None if x is None else x.half().double() for x in _inputs(19, 24, 307, True)[:2]]
    targets, bias = _inputs(19, 24, 307, True)[2:]
    upstream = torch.linspace(-1, 2, 19, dtype=torch.float64) * (1e-6 if dtype == torch.float32 else 1e-2)
    results = []
    for function, cast in ((chosen_logprobs, dtype), (reference, torch.float64)):
        leaves = [x.to(cast).requires_grad_() for x in (*given, bias.half())]
        logps, entropy = function(leaves[0], leaves[1], targets, leaves[2], 0.7, 5.0, 0.5, 8, True)
        (logps * upstream.to(logps.dtype)).sum().backward()
        results.append([logps.detach(), entropy, *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*results):
        assert ((ours.double() - exact).norm() / exact.norm()).item() < bound


def test_no_grad_makes_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets, _ = _inputs(7, 5, 11, False)
    asked = []
    stats = logits.reference.logit_stats_
    monkeypatch.setattr(logits.reference, "logit_stats_", lambda *args: (asked.append(args[9]), stats(*args))[1])
    with torch.no_grad():
        chosen_logprobs(hidden.requires_grad_(), weight, targets, chunk=4)
    assert asked == [None, None]


def test_gradcheck() -> None:
    hidden, weight, targets, bias_V = _inputs(5, 4, 7, True)
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias_V))
    assert torch.autograd.gradcheck(
        lambda h, w, b: chosen_logprobs(h, w, targets, b, temperature=0.8, softcap=3.0, scale=0.5, chunk=2)[0], leaves
    )


@pytest.mark.parametrize("temperature, softcap, scale, bias", CASES)
@pytest.mark.parametrize("trained_head", [False, True])
def test_entropy_gradient_equals_autograd(
    temperature: float, softcap: float | None, scale: float, bias: bool, trained_head: bool
) -> None:
    """A loss of log-probabilities and entropies in float64: to hidden states, weight and bias as autograd has it."""
    hidden, weight, targets, bias_V = _inputs(33, 16, 129, bias)
    results = []
    for function in (chosen_logprobs, reference):
        leaves = [x.clone() for x in (hidden, weight, bias_V) if x is not None]
        for leaf in leaves if trained_head else leaves[:1]:
            leaf.requires_grad_()
        logps, entropy = function(
            leaves[0], leaves[1], targets, leaves[2] if bias else None, temperature, softcap, scale, 4, True, True
        )
        upstream = torch.linspace(-1, 2, len(logps), dtype=logps.dtype)
        (logps * upstream - 3 * entropy * upstream.flip(0).square()).sum().backward()
        results.append([logps.detach(), entropy.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    assert len(results[0]) == (4 + bias if trained_head else 3)


def test_entropy_gradient_alone_and_gradcheck() -> None:
    hidden, weight, targets, bias_V = _inputs(5, 4, 7, True)
    leaves = tuple(x.requires_grad_() for x in (hidden, weight, bias_V))
    given = {"temperature": 0.8, "softcap": 3.0, "scale": 0.5, "chunk": 2, "with_entropy": True}
    assert torch.autograd.gradcheck(
        lambda h, w, b: chosen_logprobs(h, w, targets, b, entropy_gradient=True, **given), leaves
    )
    _, entropy = chosen_logprobs(hidden, weight, targets, entropy_gradient=True, **given)
    (alone,) = torch.autograd.grad(entropy.sum(), hidden)  # no gradient comes through the log-probabilities
    _, exact = reference(hidden, weight, targets, entropy_gradient=True, **given)
    torch.testing.assert_close(alone, torch.autograd.grad(exact.sum(), hidden)[0], rtol=1e-11, atol=1e-12)
    assert not chosen_logprobs(hidden, weight, targets, **given)[1].requires_grad


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 3e-6), (torch.float16, 1e-3)])
def test_entropy_gradient_of_the_kernel(dtype: torch.dtype, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the Triton kernel, log-probabilities weighing 1e-6 beside entropies of 1e-5, as a loss of 1e5 tokens."""
    monkeypatch.setattr(logits, "_path", lambda tensor: logits_triton)
    given = [None if x is None else x.half().double() for x in _inputs(19, 24, 307, True)[:2]]
    targets, bias = _inputs(19, 24, 307, True)[2:]
    upstream = torch.linspace(-1, 2, 19, dtype=torch.float64) * (1e-6 if dtype == torch.float32 else 1e-2)
    results = []
    for function, cast in ((chosen_logprobs, dtype), (reference, torch.float64)):
        leaves = [x.to(cast).requires_grad_() for x in (*given, bias.half())]
        logps, entropy = function(leaves[0], leaves[1], targets, leaves[2], 0.7, 5.0, 0.5, 8, True, True)
        (logps * upstream.to(logps.dtype) - 10 * upstream.flip(0).to(logps.dtype) * entropy).sum().backward()
        results.append([logps.detach(), entropy.detach(), *(leaf.grad for leaf in leaves)])
    for ours, exact in zip(*results):
        assert ((ours.double() - exact).norm() / exact.norm()).item() < bound


def test_frozen_head_gets_no_gradient_and_bfloat16_stays_near() -> None:
    hidden, weight, targets, _ = _inputs(40, 32, 257, False)
    exact = hidden.clone().requires_grad_()
    reference(exact, weight, targets)[0].sum().backward()
    rounded = hidden.bfloat16().requires_grad_()
    frozen = weight.bfloat16()
    logps, entropy = chosen_logprobs(rounded, frozen, targets, chunk=16)
    assert logps.dtype == torch.float32 and entropy is None
    logps.sum().backward()
    assert frozen.grad is None and rounded.grad.dtype == torch.bfloat16
    cosine = torch.cosine_similarity(rounded.grad.double().flatten(), exact.grad.flatten(), dim=0)
    assert cosine > 0.999


def test_no_rows() -> None:
    hidden, weight, _, _ = _inputs(3, 4, 5, False)
    empty = hidden[:0].clone().requires_grad_()
    logps, entropy = chosen_logprobs(empty, weight, torch.empty(0, dtype=torch.int64), with_entropy=True)
    assert logps.shape == entropy.shape == (0,)
    logps.sum().backward()
    assert empty.grad.shape == (0, 4)


def test_logits_never_exist_whole() -> None:
    """The largest tensor that forward and backward make holds a chunk of logits, not N x V of them."""
    N, D, V, chunk = 512, 8, 1000, 32
    hidden, weight, targets, _ = _inputs(N, D, V, False, torch.float32)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    with Largest() as seen:
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]
        chosen_logprobs(*leaves, targets, chunk=chunk, with_entropy=True)[0].sum().backward()
    assert seen.numel <= chunk * V < N * V
    with Largest() as seen:
        logps, entropy = chosen_logprobs(*leaves, targets, chunk=chunk, with_entropy=True, entropy_gradient=True)
        (logps + entropy).sum().backward()
    assert seen.numel <= chunk * V
    with Largest() as seen:
        reference(hidden, weight, targets)
    assert seen.numel == N * V  # the probe does see whole logits where they are made


@pytest.mark.parametrize("bad", [{"temperature": 0.0}, {"targets_N": torch.zeros(2, dtype=torch.int64)}])
def test_bad_input(bad: dict) -> None:
    arguments = {"hidden_ND": torch.ones(3, 2), "weight_VD": torch.ones(5, 2), "targets_N": torch.zeros(3).long()}
    with pytest.raises(ValueError, match="temperature=0|shapes do not fit"):
        chosen_logprobs(**{**arguments, **bad})
