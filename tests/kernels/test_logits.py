"""A chunk of logits: the kernel and the reference against float64 autograd of plain PyTorch, and what is not finite."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pronghorn.kernels import logits as module
from pronghorn.kernels import logits_triton
from pronghorn.kernels.logits import logit_stats_
from pronghorn.kernels.reference import logits as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAPS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"scale": 0.25, "softcap": 4.0},
    {"scale": -3.0, "softcap": 30.0, "temperature": 1.3},
]


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device."""
    backend = logits_triton if request.param == "triton" else reference
    monkeypatch.setattr(module, "_path", lambda tensor: backend)
    return request.param


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


def _truth(
    x: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    weights: torch.Tensor,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities (0 for target -100), entropies and weighted gradients by autograd in float64."""
    leaf = x.double().requires_grad_()
    z = (leaf if bias is None else leaf + bias.double()) * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    logp = -F.cross_entropy(z / temperature, targets, reduction="none")
    (logp * weights.double()).sum().backward()
    return logp.detach(), torch.distributions.Categorical(logits=(z / temperature).detach()).entropy(), leaf.grad


def _inputs(C: int, V: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(C * 1000 + V)
    x = torch.randn(C, V, generator=generator) * 3
    targets = torch.randint(V, (C,), generator=generator)
    bias, weights = torch.randn(V, generator=generator), torch.randn(C, generator=generator)
    return x.to(DEVICE), targets.to(DEVICE), bias.to(DEVICE), weights.to(DEVICE)


@pytest.mark.parametrize("gradient", [torch.float32, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("semantics", MAPS, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (5, 7), (3, 128), (2, 1000)])
def test_equals_float64(
    path: str, shape: tuple[int, int], semantics: dict[str, Any], biased: bool, gradient: torch.dtype
) -> None:
    x, targets, bias, weights = _inputs(*shape)
    bias = bias if biased else None
    targets[0] = -100
    exact = _truth(x, targets, bias, weights, **semantics)
    logps, entropy, d = logit_stats_(
        x.clone(), targets, bias, weights, ignore_index=-100, with_entropy=True, gradient=gradient, **semantics
    )
    assert entropy is not None and d is not None and d.dtype == gradient and d.shape == shape
    assert logps[0] == 0 and not d[0].any()
    if shape[1] == 1:
        assert not logps.any() and not entropy.any() and not d.any()
        return
    assert _error(logps, exact[0]) < 2e-6 and _error(entropy, exact[1]) < 2e-6
    assert _error(d, exact[2]) < (2e-6 if gradient == torch.float32 else 5e-4)


@pytest.mark.parametrize("V", [8192, 8193, 20001])
def test_many_blocks(path: str, V: int) -> None:
    """Where a row has several blocks, the narrow gradient of each is written over logits that were read before."""
    assert -(-V // logits_triton.launch_config(V)[0]) == {8192: 1, 8193: 2, 20001: 3}[V]
    x, targets, bias, weights = _inputs(3, V)
    targets[:] = torch.tensor([0, V - 1, V // 2])
    exact = _truth(x, targets, bias, weights, softcap=20.0)
    for gradient in (torch.float16, torch.float32):
        logps, entropy, d = logit_stats_(
            x.clone(), targets, bias, weights, softcap=20.0, with_entropy=True, gradient=gradient
        )
        assert entropy is not None and d is not None
        assert _error(logps, exact[0]) < 2e-6 and _error(entropy, exact[1]) < 2e-6
        # Many of float16's gradients are below its normal numbers, 6e-5.
        assert _error(d, exact[2]) < (2e-6 if gradient == torch.float32 else 1e-3)


@pytest.mark.parametrize("gradient, bound", [(torch.float32, 3e-6), (torch.float16, 6e-4)])
@pytest.mark.parametrize("semantics", MAPS, ids=str)
@pytest.mark.parametrize("shape", [(3, 1), (5, 7), (3, 128), (2, 1000), (2, 8193)])
def test_entropy_gradient_equals_float64(
    path: str, shape: tuple[int, int], semantics: dict[str, Any], gradient: torch.dtype, bound: float
) -> None:
    """The gradient of ``w log p + u H``, several blocks and a row with a masked token among them."""
    x, targets, bias, weights = _inputs(*shape)
    shares = weights.flip(0) * 2
    if shape[1] > 1:
        x[-1, 0], targets[-1] = -math.inf, 1
    leaf = x.double().requires_grad_()
    z = (leaf + bias.double()) * semantics.get("scale", 1.0)
    if "softcap" in semantics:
        z = torch.tanh(z / semantics["softcap"]) * semantics["softcap"]
    z = z / semantics.get("temperature", 1.0)
    logp = torch.log_softmax(z, dim=1)
    entropy = -(logp.exp() * logp.masked_fill(logp.exp() == 0, 0)).sum(1)
    chosen = logp.gather(1, targets.unsqueeze(1)).squeeze(1)
    (chosen * weights.double() + entropy * shares.double()).sum().backward()
    _, _, d = logit_stats_(
        x.clone(), targets, bias, weights, with_entropy=True, gradient=gradient, entropy_weights_C=shares, **semantics
    )
    assert d is not None and d.isfinite().all()
    if shape[1] == 1:
        assert not d.any()
        return
    assert _error(d, leaf.grad.nan_to_num(0.0)) < bound


def test_the_gradient_lies_in_the_logits() -> None:
    x, targets, _, _ = _inputs(4, 10)
    _, _, narrow = logits_triton.logit_stats_(x, targets, None, None, 1.0, None, 1.0, None, False, torch.float16)
    assert narrow is not None and narrow.stride() == (20, 1)
    assert x.data_ptr() <= narrow.data_ptr() < x.data_ptr() + x.nbytes
    x, targets, _, _ = _inputs(4, 10)
    _, _, wide = logits_triton.logit_stats_(x, targets, None, None, 1.0, None, 1.0, None, False, torch.float32)
    assert wide is x


def test_statistics_alone_leave_the_logits(path: str) -> None:
    x, targets, bias, weights = _inputs(3, 33)
    before = x.clone()
    logps, entropy, d = logit_stats_(x, targets, bias)
    assert entropy is None and d is None and torch.equal(x, before)
    assert _error(logps, _truth(x, targets, bias, weights)[0]) < 2e-6


def test_no_rows(path: str) -> None:
    logps, entropy, d = logit_stats_(
        torch.empty(0, 5, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE),
        with_entropy=True, gradient=torch.float16,
    )  # fmt: skip
    assert entropy is not None and d is not None
    assert logps.shape == entropy.shape == (0,) and d.shape == (0, 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 5, 8])
def test_nan_and_inf_come_out(path: str, bad: float, column: int) -> None:
    """A row with a NaN or +inf has no distribution; the rows beside it do."""
    x, targets, _, _ = _inputs(3, 9)
    targets[1] = 5
    x[1, column] = bad
    clean = _truth(x[::2], targets[::2], None, torch.ones(2, device=DEVICE))
    logps, entropy, d = logit_stats_(x, targets, with_entropy=True, gradient=torch.float16)
    assert entropy is not None and d is not None
    assert logps[1].isnan() and entropy[1].isnan() and d[1].isnan().any()
    assert _error(logps[::2], clean[0]) < 2e-6 and _error(d[::2], clean[2]) < 1e-3


def test_minus_inf_is_a_masked_token(path: str) -> None:
    x, targets, _, _ = _inputs(3, 9)
    targets[:] = torch.tensor([4, 5, 6])
    x[:, 2] = -math.inf
    kept = torch.cat([x[:, :2], x[:, 3:]], dim=1)
    exact = _truth(kept, targets - 1, None, torch.ones(3, device=DEVICE))
    logps, entropy, d = logit_stats_(x, targets, with_entropy=True, gradient=torch.float32)
    assert entropy is not None and d is not None
    assert _error(logps, exact[0]) < 2e-6 and _error(entropy, exact[1]) < 2e-6
    assert not d[:, 2].any() and _error(torch.cat([d[:, :2], d[:, 3:]], dim=1), exact[2]) < 2e-6
    x = torch.full((1, 4), -math.inf, device=DEVICE)
    assert logit_stats_(x, targets[:1] - 3)[0].isnan().all()  # nothing is left to choose from


def test_large_logits_lose_nothing(path: str) -> None:
    """Offsets that a float32 sum of exponentials could not hold, and an entropy free of them."""
    x = (torch.tensor([[0.0, 1, 2], [5, 5, 5]]) + torch.tensor([[1e4], [-1e4]])).to(DEVICE)
    targets = torch.tensor([1, 2], device=DEVICE)
    exact = _truth(x, targets, None, torch.ones(2, device=DEVICE))
    logps, entropy, _ = logit_stats_(x, targets, with_entropy=True)
    assert entropy is not None
    assert _error(logps, exact[0]) < 1e-6 and _error(entropy, exact[1]) < 1e-6


def test_unknown_target() -> None:
    """Raises on a CPU; the kernel, which cannot, reads nothing outside and gives NaN."""
    for target in (7, 1 << 40, -1, -100):
        targets = torch.tensor([1, target], device=DEVICE)
        logps, _, d = logits_triton.logit_stats_(
            torch.zeros(2, 7, device=DEVICE), targets, None, None, 1.0, None, 1.0, None, False, torch.float32
        )
        assert logps[0] == pytest.approx(-math.log(7)) and logps[1].isnan()
        assert d is not None and d[0].isfinite().all() and d[1].isnan().all()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        logit_stats_(torch.zeros(1, 7), torch.tensor([7]))


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"x_CV": torch.ones(3, 5).half()}, "float16"),
        ({"x_CV": torch.ones(5, 3).T}, "dense"),
        ({"targets_C": torch.zeros(2).long()}, "targets has shape"),
        ({"targets_C": torch.zeros(3).int()}, "int64"),
        ({"bias_V": torch.zeros(3)}, "bias has shape"),
        ({"weights_C": torch.zeros(5)}, "weights has shape"),
        ({"entropy_weights_C": torch.zeros(5), "with_entropy": True}, "entropy_weights has shape"),
        ({"entropy_weights_C": torch.zeros(3)}, "with_entropy=False"),
        ({"entropy_weights_C": torch.zeros(3), "with_entropy": True, "ignore_index": 1}, "ignore_index=1"),
        ({"temperature": 0.0}, "temperature=0"),
        ({"softcap": 0.0}, "softcap=0"),
    ],
)
def test_bad_input(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        logit_stats_(**{"x_CV": torch.ones(3, 5), "targets_C": torch.zeros(3).long(), **bad})
