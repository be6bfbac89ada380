"""Fused linear + cross-entropy against float64 autograd of F.linear and F.cross_entropy: values and every gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pronghorn.kernels import head, logits, logits_triton
from pronghorn.kernels.linear_cross_entropy import linear_cross_entropy
from pronghorn.kernels.reference import logits as logits_reference
from pronghorn.kernels.reference.linear_cross_entropy import linear_cross_entropy as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The logits' kernel and its reference, whatever the device."""
    backend = logits_triton if request.param == "triton" else logits_reference
    monkeypatch.setattr(logits, "_path", lambda tensor: backend)
    return request.param


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def _inputs(N: int, D: int, V: int, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    """Values that float16 holds exactly, so that all dtypes compute on the same numbers; some labels ignored."""
    generator = torch.Generator().manual_seed(N * 1000 + V)
    hidden, weight, bias, weights = (
        torch.randn(size, generator=generator).half().to(DEVICE, dtype) for size in ((N, D), (V, D), (V,), (N,))
    )
    targets = torch.randint(V, (N,), generator=generator)
    targets[1::3] = -100
    return {
        "hidden": hidden, "weight": weight * 0.5, "bias": bias, "weights": weights.abs(), "targets": targets.to(DEVICE),
    }  # fmt: skip


def _run(
    function: Any, given: dict[str, torch.Tensor], biased: bool, weighted: bool, g: float = 1.0, **options: Any
) -> list[torch.Tensor]:
    """Loss, and the gradients of hidden states, weight and bias, for an incoming gradient ``g``."""
    leaves = [given[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")[: 2 + biased]]
    loss = function(
        leaves[0], leaves[1], given["targets"], options.pop("denominator", 13), bias_V=leaves[2] if biased else None,
        weights_N=given["weights"] if weighted else None, **options,
    )  # fmt: skip
    (loss * g).backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("biased, weighted", [(False, False), (True, True)])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "scale": 0.25}], ids=str)
@pytest.mark.parametrize("N, V, chunk", [(1, 1, None), (1, 7, 1), (7, 11, 3), (8, 129, 4), (33, 1000, 16), (5, 503, 9)])
def test_equals_whole_logits(
    N: int, V: int, chunk: int | None, options: dict[str, Any], biased: bool, weighted: bool
) -> None:
    given = _inputs(N, 5, V)
    ours = _run(linear_cross_entropy, given, biased, weighted, -1.7, chunk=chunk, **options)
    exact = _run(reference, given, biased, weighted, -1.7, **options)
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.float16, 7e-4)])
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "scale": 0.25}], ids=str)
def test_dtypes_and_kernel(path: str, dtype: torch.dtype, bound: float, options: dict[str, Any]) -> None:
    """N is no multiple of the chunk, V of nothing. Half an ulp of float16 is 4.9e-4, to which a CPU rounds logits."""
    given = _inputs(19, 24, 307)
    same = {name: t if name == "targets" else t.to(dtype) for name, t in given.items()}
    exact = _run(reference, given, True, True, **options)
    ours = _run(linear_cross_entropy, same, True, True, chunk=8, **options)
    assert ours[0].dtype == torch.float32 and all(t.dtype == dtype for t in ours[1:])
    assert _error(ours[0], exact[0]) < (2e-6 if dtype == torch.float32 else 5e-5)
    for got, want in zip(ours[1:], exact[1:], strict=True):
        assert _error(got, want) < bound


def test_float16_gradients_survive_a_large_denominator() -> None:
    """A million tokens and a loss scaler of 65,536: unscaled, these gradients are 5e-7, which float16 holds to 10%."""
    given = _inputs(19, 24, 307)
    same = {name: t if name == "targets" else t.half() for name, t in given.items()}
    exact = _run(reference, given, True, True, 2.0**16, denominator=10**6)
    ours = _run(linear_cross_entropy, same, True, True, 2.0**16, denominator=10**6)
    for got, want in zip(ours[1:], exact[1:], strict=True):
        assert _error(got, want) < 1e-3


@pytest.mark.parametrize("denominator", [7, 7.0, torch.tensor(7), torch.tensor(7.0), torch.tensor([7.0]).double()])
def test_denominators(denominator: Any) -> None:
    given = _inputs(9, 4, 12, torch.float32)
    one = _run(linear_cross_entropy, given, False, False, denominator=1)
    ours = _run(linear_cross_entropy, given, False, False, denominator=denominator)
    for got, whole in zip(ours, one, strict=True):
        assert got.dtype == torch.float32 and _error(got, whole.double() / 7) < 3e-7


def test_micro_batches_add_up() -> None:
    """Two parts of a batch over the denominator of the whole give the whole's loss and gradients."""
    given = _inputs(10, 4, 12)
    whole = _run(linear_cross_entropy, given, False, True, denominator=7)
    parts = [
        _run(
            linear_cross_entropy,
            {name: t[rows] if name in ("hidden", "targets", "weights") else t for name, t in given.items()},
            False, True, denominator=torch.tensor(7),
        )
        for rows in (slice(0, 4), slice(4, 10))
    ]  # fmt: skip
    for index, join in enumerate((torch.add, lambda a, b: torch.cat([a, b]), torch.add)):
        torch.testing.assert_close(join(parts[0][index], parts[1][index]), whole[index], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
def test_one_gradient_alone(trained: str) -> None:
    given = _inputs(7, 4, 12)
    leaves = {name: given[name].clone().requires_grad_(name == trained) for name in ("hidden", "weight", "bias")}
    exact = dict(zip(("loss", "hidden", "weight", "bias"), _run(reference, given, True, False), strict=True))
    loss = linear_cross_entropy(leaves["hidden"], leaves["weight"], given["targets"], 13, bias_V=leaves["bias"])
    loss.backward()
    torch.testing.assert_close(leaves[trained].grad, exact[trained], rtol=1e-11, atol=1e-13)
    assert all(leaf.grad is None for name, leaf in leaves.items() if name != trained)


def test_no_grad_makes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    given = _inputs(7, 4, 12)
    asked = []
    true_walk = head.walk
    monkeypatch.setattr(
        "pronghorn.kernels.linear_cross_entropy.walk",
        lambda *args, **kwargs: (asked.append(kwargs["wanted"]), true_walk(*args, **kwargs))[1],
    )
    with torch.no_grad():
        loss = linear_cross_entropy(given["hidden"].requires_grad_(), given["weight"], given["targets"], 13)
    assert not any(asked[0]) and not loss.requires_grad
    torch.testing.assert_close(loss, reference(given["hidden"], given["weight"], given["targets"], 13).detach())


@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_learn(rows: int) -> None:
    """No rows, or only ignored ones whose hidden states are NaN: loss 0, gradients 0."""
    hidden = torch.full((rows, 4), math.nan, device=DEVICE, requires_grad=True)
    weight = torch.ones(6, 4, device=DEVICE, requires_grad=True)
    targets = torch.full((rows,), -100, device=DEVICE)
    loss = linear_cross_entropy(hidden, weight, targets, 1)
    loss.backward()
    assert loss == 0 and hidden.grad is not None and not hidden.grad.any()
    if not rows:
        assert weight.grad is not None and not weight.grad.any()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_comes_out(path: str, bad: float) -> None:
    given = _inputs(6, 4, 12, torch.float32)
    given["hidden"][2, 1] = bad
    loss, hidden_grad, *_ = _run(linear_cross_entropy, given, False, False)
    assert not loss.isfinite() and not hidden_grad[2].isfinite().any() and hidden_grad[[0, 1, 3, 4, 5]].isfinite().all()


def test_zero_denominator_is_not_hidden() -> None:
    loss, hidden_grad, _ = _run(linear_cross_entropy, _inputs(6, 4, 12), False, False, denominator=0)
    assert not loss.isfinite() and not hidden_grad.isfinite().all()


def test_backward_twice_raises() -> None:
    given = _inputs(6, 4, 12)
    loss = linear_cross_entropy(given["hidden"].requires_grad_(), given["weight"], given["targets"], 13)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="ran before"):
        loss.backward()


def test_logits_never_exist_whole() -> None:
    """The largest tensor that forward and backward make holds a chunk of logits, not N x V of them."""
    N, D, V, chunk = 512, 8, 1000, 32
    given = _inputs(N, D, V, torch.float32)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    with Largest() as seen:
        _run(linear_cross_entropy, given, True, True, chunk=chunk)
    assert seen.numel <= chunk * V < N * V
    with Largest() as seen:
        _run(reference, given, True, True)
    assert seen.numel == N * V  # the probe does see whole logits where they are made


def test_chunk_rows() -> None:
    assert head.chunk_rows(4096, 128256) == 512
    assert head.chunk_rows(4096, 262144) == 256
    assert head.chunk_rows(300, 128256) == 300
    assert head.chunk_rows(4096, 10**6) == 128  # a tile of rows, whatever the vocabulary
    assert head.chunk_rows(10**6, 50257) % 128 == 0
    assert head.chunk_rows(4096, 128256, 4096) == 1024  # the head trains: a quarter of its gradient
    assert head.chunk_rows(4096, 50257, 896) == head.chunk_rows(4096, 50257)
    assert head.chunk_rows(0, 50257) == head.chunk_rows(1, 50257) == 1


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"targets_N": torch.zeros(2).long()}, "shapes do not fit"),
        ({"weight_VD": torch.ones(5, 3)}, "shapes do not fit"),
        ({"weights_N": torch.ones(2)}, "weights have shape"),
        ({"denominator": torch.ones(3)}, "denominator has shape"),
        ({"softcap": -1.0}, "softcap=-1"),
        ({"chunk": 0}, "chunk=0"),
    ],
)
def test_bad_input(bad: dict[str, Any], message: str) -> None:
    arguments = {"hidden_ND": torch.ones(3, 2), "weight_VD": torch.ones(5, 2), "targets_N": torch.zeros(3).long()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, "denominator": 1, **bad})
