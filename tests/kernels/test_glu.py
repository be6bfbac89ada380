"""Gated linear units: the kernels against float64 and transformers, and what backward overwrites."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from pronghorn.kernels import glu as module
from pronghorn.kernels import glu_triton
from pronghorn.kernels.glu import ACTIVATIONS, geglu, glu, glu_backward_, glu_forward, swiglu
from pronghorn.kernels.reference import glu as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4}  # one rounding


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device."""
    backend = glu_triton if request.param == "triton" else reference
    monkeypatch.setattr(module, "_path", lambda tensor: backend)
    return request.param


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def _inputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """gate (wide enough to reach the flat ends), up, and the gradient of h."""
    return [(torch.randn(shape) * scale).to(DEVICE, dtype) for scale in (3, 1, 1)]


def _truth(gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, activation: str) -> list[torch.Tensor]:
    """h, dgate, dup by transformers' activation under autograd in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (gate, up)]
    h = ACT2FN[activation](leaves[0]) * leaves[1]
    h.backward(dh.double())
    return [h.detach(), leaves[0].grad, leaves[1].grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 1025), (2, 3, 100)])
def test_equals_transformers_in_float64(path: str, shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    gate, up, dh = _inputs(shape, dtype)
    h_true, dgate_true, dup_true = _truth(gate, up, dh, activation)
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    h = glu(*leaves, activation)
    h.backward(dh)
    got = {"h": h, "dgate": leaves[0].grad, "dup": leaves[1].grad}
    assert torch.equal(leaves[0], gate) and torch.equal(leaves[1], up)  # leaves keep their values
    again = glu_backward_(dh, gate, up, want_h=True, activation=activation)
    got |= {"h again": again, "dgate in place": gate, "dup in place": up}
    truth = [h_true, dgate_true, dup_true] * 2
    bound = TOLERANCE[dtype] * (4 if gate.numel() == 1 else 1)  # one element's slope may be a difference of near equals
    for (name, ours), exact in zip(got.items(), truth):
        assert ours.dtype == dtype and _error(ours, exact) <= bound, (name, _error(ours, exact))


def test_is_llamas_mlp(path: str) -> None:
    config = LlamaConfig(hidden_size=32, intermediate_size=56, hidden_act="silu")
    mlp = LlamaMLP(config).to(DEVICE)
    gradients = []
    for fused in (False, True):
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
        mlp.zero_grad()
        y = mlp.down_proj(swiglu(mlp.gate_proj(x), mlp.up_proj(x))) if fused else mlp(x)
        y.square().sum().backward()
        gradients.append([y.detach(), x.grad, *(p.grad.clone() for p in mlp.parameters())])
    for theirs, ours in zip(*gradients):
        assert _error(ours, theirs) <= 2e-6


def test_geglu_names() -> None:
    gate, up, _ = _inputs((4, 9), torch.float64)
    for approximate in ("tanh", "none"):
        exact = torch.nn.functional.gelu(gate, approximate=approximate) * up
        torch.testing.assert_close(geglu(gate, up, approximate), exact, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="approximate='fast'"):
        geglu(gate, up, "fast")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str) -> None:
    """The written backward (float64 runs the reference) and the reference under autograd, by finite differences."""
    gate, up = (t.cpu().requires_grad_() for t in _inputs((3, 5), torch.float64)[:2])
    for function in (glu, reference.glu_forward):
        assert torch.autograd.gradcheck(lambda g, u, f=function: f(g, u, activation), (gate, up))


@pytest.mark.parametrize("want_h", [False, True])
def test_halves_of_one_tensor(path: str, want_h: bool) -> None:
    """gate and up as halves of [T, 2I]: strided, side by side, both overwritten, nothing beside them touched."""
    T, columns = 5, 37
    padded = torch.randn(T, 2 * columns + 3, device=DEVICE)
    before = padded.clone()
    gate, up = padded[:, :columns], padded[:, columns : 2 * columns]
    dh = torch.randn(T, columns, device=DEVICE)
    truth = _truth(gate, up, dh, "silu")
    h = glu_backward_(dh, gate, up, want_h)
    assert (h is not None) == want_h and torch.equal(padded[:, 2 * columns :], before[:, 2 * columns :])
    for ours, exact in zip(([h] if want_h else []) + [gate, up], truth if want_h else truth[1:]):
        assert _error(ours, exact) <= 1e-6


def test_backward_overwrites_what_nothing_reads_again(path: str) -> None:
    x = torch.randn(6, 20, device=DEVICE, requires_grad=True)
    gate, up = x * 1.5, x + 1
    kept = [gate.detach().clone(), up.detach().clone()]
    memory = [gate.data_ptr(), up.data_ptr()]
    seen: list[torch.Tensor] = []
    gate.register_hook(seen.append)
    up.register_hook(seen.append)
    swiglu(gate, up).sum().backward()
    assert sorted(g.data_ptr() for g in seen) == sorted(memory)
    _, dgate, dup = _truth(*kept, torch.ones_like(kept[0]), "silu")
    assert _error(x.grad, 1.5 * dgate + dup) <= 1e-6


def test_use_after_overwriting_raises_and_can_be_avoided(path: str) -> None:
    def graph(overwrite: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(6, 20, device=DEVICE, requires_grad=True)
        gate, up = x * 1.5, x + 1
        return swiglu(gate, up, overwrite=overwrite).sum(), gate

    loss, _ = graph(overwrite=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss, gate = graph(overwrite=False)
    before = gate.detach().clone()
    loss.backward(retain_graph=True)
    loss.backward()
    assert torch.equal(gate, before)


def test_the_same_tensor_twice_is_not_overwritten(path: str) -> None:
    x = torch.randn(4, 8, device=DEVICE, requires_grad=True)
    y = x * 1
    glu(y, y).sum().backward()
    _, dgate, dup = _truth(x, x, torch.ones_like(x), "silu")
    assert _error(x.grad, dgate + dup) <= 1e-6
    with pytest.raises(ValueError, match="share memory"):
        glu_backward_(x.detach(), x.detach(), x.detach())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_flat_ends_nan_and_inf(path: str, activation: str) -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, float("nan"), float("inf")]], device=DEVICE)
    up = torch.ones_like(gate)
    h = glu_backward_(torch.ones_like(gate), gate, up, True, activation)
    end = torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]], device=DEVICE)
    torch.testing.assert_close(h[:, :5], end, rtol=0, atol=1e-30)
    torch.testing.assert_close(gate[:, :5], torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=DEVICE), rtol=0, atol=1e-7)
    assert h[0, 5].isnan() and gate[0, 5].isnan() and not h[0, 6].isfinite()


def test_no_rows(path: str) -> None:
    gate = torch.empty(0, 8, device=DEVICE, requires_grad=True)
    glu(gate, gate.detach()).sum().backward()
    assert gate.grad.shape == (0, 8)


def test_bad_input(path: str) -> None:
    gate = torch.ones(2, 4)
    with pytest.raises(ValueError, match="activation='relu'"):
        glu(gate, gate, "relu")
    with pytest.raises(ValueError, match="up is"):
        glu(gate, gate.half())
    with pytest.raises(ValueError, match="dh is"):
        glu_backward_(gate[:1], gate, gate.clone())
    if path == "triton":
        with pytest.raises(ValueError, match="gate.contiguous"):
            glu(gate.t(), gate.t())


def test_forward_into_the_left_part_of_a_wider_tensor(path: str) -> None:
    gate, up, _ = _inputs((5, 33), torch.float16)
    wide = torch.full((5, 40), 7.0, dtype=torch.float16, device=DEVICE)
    written = glu_forward(gate, up, "silu", wide[:, :33])
    assert written.data_ptr() == wide.data_ptr()
    assert torch.equal(wide[:, :33], glu_forward(gate, up))
    assert bool((wide[:, 33:] == 7).all())


def test_h_over_its_own_gradient(path: str) -> None:
    gate, up, dh = _inputs((6, 40), torch.float32)
    plain = [t.clone() for t in (gate, up, dh)]
    h = glu_backward_(plain[2], plain[0], plain[1], want_h=True)
    over = glu_backward_(dh, gate, up, want_h=True, over_dh=True)
    assert h is not None and over is dh
    for a, b in ((over, h), (gate, plain[0]), (up, plain[1])):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="contiguous"):
        glu_backward_(torch.empty(40, 6, device=DEVICE).T, gate, up, want_h=True, over_dh=True)
