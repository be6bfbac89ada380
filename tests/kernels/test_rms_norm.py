"""RMSNorm: the kernels against the reference, and the reference against transformers, values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pronghorn.kernels import rms_norm as module
from pronghorn.kernels import rms_norm_triton
from pronghorn.kernels.reference import rms_norm as reference
from pronghorn.kernels.rms_norm import add_norm_forward, norm_forward, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LLAMA: dict[str, Any] = {}
GEMMA: dict[str, Any] = {"offset": 1.0, "cast_before_scale": False}
# Half an ulp of float16 is 4.9e-4 for one element; the norm over many is below the mean of that.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4}


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device."""
    backend = rms_norm_triton if request.param == "triton" else reference
    monkeypatch.setattr(module, "_path", lambda tensor: backend)
    return request.param


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def _run(function: Any, inputs: list[torch.Tensor | None], semantics: dict[str, Any]) -> list[torch.Tensor]:
    """Outputs, then the gradients of all inputs under fixed, uneven output gradients."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    x, weight, residual = leaves
    out = function(x, weight, 1e-5, residual, **semantics)
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(7)
    gradients = [
        torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device, torch.float16).to(o.dtype)
        for o in outputs
    ]
    torch.autograd.backward(outputs, gradients)
    return [o.detach() for o in outputs] + [leaf.grad for leaf in leaves if leaf is not None]


def _inputs(shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> list[torch.Tensor | None]:
    x, r = (torch.randn(shape).to(DEVICE, dtype) for _ in range(2))
    return [x, (torch.randn(shape[-1]) * 0.2 + 1).to(DEVICE, dtype), r if residual else None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("semantics", [LLAMA, GEMMA], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (37, 64), (3, 5, 100), (2, 2049), (1, 16384)])
def test_equals_float64(
    path: str, shape: tuple[int, ...], semantics: dict[str, Any], residual: bool, dtype: torch.dtype
) -> None:
    inputs = _inputs(shape, dtype, residual)
    exact = [None if x is None else x.double() for x in inputs]
    if residual:  # the sum is rounded before it is normalised, and that is no error of the norm
        exact = [(inputs[0] + inputs[2]).double(), exact[1], torch.zeros_like(exact[0])]
    ours, truth = _run(rms_norm, inputs, semantics), _run(reference.rms_norm, exact, semantics)
    assert len(ours) == len(truth) == (5 if residual else 3)
    # A row of one element is normalised to a sign: its gradient is a difference of equals.
    few = 20 if shape == (1, 1) else 1
    for name, got, want in zip(
        ("normed", "sum", "dx", "dw", "dr") if residual else ("normed", "dx", "dw"), ours, truth
    ):
        # Llama rounds twice, and the weight's gradient sums rounded numbers.
        bound = (2 if dtype == torch.float16 else 1) * TOLERANCE[dtype]
        if few == 1:
            assert got.dtype == dtype and _error(got, want) <= bound, (name, _error(got, want))
        else:
            torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_is_transformers_bit_for_bit(dtype: torch.dtype) -> None:
    x, weight = torch.randn(9, 96).to(dtype), torch.randn(96).to(dtype)
    for layer, semantics in ((LlamaRMSNorm(96, 1e-5), LLAMA), (Gemma2RMSNorm(96, 1e-5), GEMMA)):
        layer.to(dtype).weight.data.copy_(weight)
        ours = rms_norm(x, weight, 1e-5, **semantics)
        assert torch.equal(ours, layer(x)) and ours.dtype == dtype
        normed, total = rms_norm(x, weight, 1e-5, x.flip(0), **semantics)
        assert torch.equal(total, x + x.flip(0)) and torch.equal(normed, layer(total))


@pytest.mark.parametrize("semantics", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_gradients_are_transformers(path: str, semantics: dict[str, Any]) -> None:
    layer = (Gemma2RMSNorm if semantics else LlamaRMSNorm)(96, 1e-5).to(DEVICE)
    layer.weight.data.normal_()
    x, dy = torch.randn(2, 11, 96, device=DEVICE)
    leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    layer(leaves[0]).backward(dy)
    weight = layer.weight.detach().clone().requires_grad_()
    rms_norm(leaves[1], weight, 1e-5, **semantics).backward(dy)
    assert _error(leaves[1].grad, leaves[0].grad) <= 1e-6 and _error(weight.grad, layer.weight.grad) <= 1e-6


def test_float32_weight_promotes_as_in_transformers(path: str) -> None:
    x, weight = torch.randn(5, 64, device=DEVICE).half(), torch.randn(64, device=DEVICE)
    layer = LlamaRMSNorm(64, 1e-5).to(DEVICE)
    layer.weight.data.copy_(weight)
    ours = rms_norm(x, weight, 1e-5)
    assert ours.dtype == torch.float32 and _error(ours, layer(x)) <= 1e-4  # a rare float16 tie may fall the other way
    assert rms_norm(x, weight, 1e-5, **GEMMA).dtype == torch.float16


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("semantics", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_gradcheck(semantics: dict[str, Any], residual: bool) -> None:
    """The written backward (float64 runs the reference) and the reference under autograd, by finite differences."""
    x, weight, r = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 7), (7,), (4, 7)))
    for function in (rms_norm, reference.rms_norm):
        assert torch.autograd.gradcheck(
            lambda x, w, r, f=function: f(x, w, 1e-5, r if residual else None, **semantics), (x, weight, r)
        )


def test_strided_rows_and_expanded_gradients(path: str) -> None:
    packed = torch.randn(6, 50, device=DEVICE)
    view = packed[:, 8:41]
    weight = torch.randn(33, device=DEVICE)
    outs = []
    for x in (view, view.contiguous()):
        x = x.detach().requires_grad_()
        out = rms_norm(x, weight, 1e-6)
        out.sum().backward()
        outs += [out, x.grad]
    assert torch.equal(outs[0], outs[2]) and torch.equal(outs[1], outs[3])


@pytest.mark.parametrize("used", ["normed", "sum"])
def test_one_output_alone_carries_the_gradient(path: str, used: str) -> None:
    inputs = _inputs((5, 24), torch.float32, True)
    got, want = [], []
    for function, grads in ((rms_norm, got), (reference.rms_norm, want)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        function(leaves[0], leaves[1], 1e-5, leaves[2])[used == "sum"].square().sum().backward()
        grads += [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(got) == len(want) == (3 if used == "normed" else 2)
    for g, w in zip(got, want):
        assert _error(g, w) <= 1e-6


def test_saves_only_the_input_and_one_number_a_row(path: str) -> None:
    x, weight, residual = (t.requires_grad_() for t in _inputs((8, 32), torch.float32, True))
    saved: list[torch.Tensor] = []
    for r in (None, residual):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            out = rms_norm(x, weight, 1e-5, r)
        held = x if r is None else out[1]
        kept = {t.data_ptr() for t in saved} - {held.data_ptr(), weight.data_ptr()}
        assert len(kept) == 1 and sum(t.numel() for t in saved) == 8 * 32 + 32 + 8


def test_no_rows_and_frozen_weight(path: str) -> None:
    weight = torch.ones(16, device=DEVICE)
    x = torch.empty(0, 16, device=DEVICE, requires_grad=True)
    out = rms_norm(x, weight, 1e-5)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 16) and weight.grad is None
    trained = weight.clone().requires_grad_()
    rms_norm(x, trained, 1e-5).sum().backward()
    assert torch.equal(trained.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_come_out(path: str, bad: float) -> None:
    x = torch.randn(3, 8, device=DEVICE)
    x[1, 2] = bad
    out = rms_norm(x, torch.ones(8, device=DEVICE), 1e-5)
    assert out[1].isnan().any() and out[[0, 2]].isfinite().all()


def test_bad_input() -> None:
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, torch.ones(5), 1e-5)
    with pytest.raises(ValueError, match="residual is"):
        rms_norm(x, torch.ones(4), 1e-5, x.half())


def test_forward_into_the_left_part_of_a_wider_tensor(path: str) -> None:
    x, weight, residual = _inputs((5, 48), torch.float16, residual=True)
    assert x is not None and weight is not None and residual is not None
    for run in (
        lambda out: norm_forward(x, weight, 1e-5, out),
        lambda out: add_norm_forward(x, residual, weight, 1e-5, out),
    ):
        wide = torch.full((5, 56), 7.0, dtype=torch.float16, device=DEVICE)
        written, plain = run(wide[:, :48]), run(None)
        assert written[0].data_ptr() == wide.data_ptr()
        for a, b in zip(written, plain):
            assert torch.equal(a, b)
        assert bool((wide[:, 48:] == 7).all())
    with pytest.raises(ValueError, match="out is"):
        norm_forward(x, weight, 1e-5, torch.empty(5, 47, dtype=torch.float16, device=DEVICE))
