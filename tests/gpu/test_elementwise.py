"""RMSNorm, rotary embedding and gated linear units on a GPU: bfloat16 error, int64 offsets, races, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from pronghorn.kernels.glu import ACTIVATIONS, glu, glu_backward_
from pronghorn.kernels.reference import rms_norm as rms_norm_reference
from pronghorn.kernels.rms_norm import rms_norm
from pronghorn.kernels.rope import rope_packed_, rotate_

BF16 = torch.bfloat16
GEMMA: dict[str, Any] = {"offset": 1.0, "cast_before_scale": False}


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def _assert_no_worse(ours: list[torch.Tensor], eager: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Each of ours is at most 1.1 times as far from float64 as eager bfloat16 is."""
    assert len(ours) == len(eager) == len(exact)
    for i, (got, theirs, truth) in enumerate(zip(ours, eager, exact)):
        assert got.dtype == theirs.dtype == BF16
        bound = 1.1 * _error(theirs, truth)
        assert _error(got, truth) <= bound < 0.02, (i, _error(got, truth), bound)


def _with_gradients(
    function: Callable[..., Any], inputs: list[torch.Tensor], upstream: list[torch.Tensor], wide: bool = False
) -> list[torch.Tensor]:
    cast = torch.float64 if wide else BF16
    leaves = [x.to(cast, copy=True).requires_grad_() for x in inputs]
    out = function(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    torch.autograd.backward(outputs, [dy.to(cast) for dy in upstream])
    return [o.detach() for o in outputs] + [leaf.grad for leaf in leaves]


def _normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(BF16)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("gemma", [False, True], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", [(4096, 4096), (513, 5120), (77, 2049), (4096, 32, 128), (64, 16384)])
def test_rms_norm_error(shape: tuple[int, ...], gemma: bool, residual: bool) -> None:
    semantics = GEMMA if gemma else {}
    D = shape[-1]
    layer = (Gemma2RMSNorm if gemma else LlamaRMSNorm)(D, 1e-5).to("cuda", BF16)
    x, weight = _normal(*shape), (torch.randn(D, device="cuda") * 0.2 + 1).to(BF16)
    # The addends' sum is exact in bfloat16, so that all three normalise the same numbers.
    inputs = [x, weight] + ([torch.zeros_like(x)] if residual else [])
    upstream = [_normal(*shape) for _ in range(1 + residual)]

    def eager(x: torch.Tensor, w: torch.Tensor, r: torch.Tensor | None = None) -> Any:
        total = x if r is None else x + r
        normed = torch.func.functional_call(layer, {"weight": w}, (total,))
        return normed if r is None else (normed, total)

    exact = _with_gradients(
        lambda x, w, r=None: rms_norm_reference.rms_norm(x, w, 1e-5, r, **semantics), inputs, upstream, wide=True
    )
    ours = _with_gradients(lambda x, w, r=None: rms_norm(x, w, 1e-5, r, **semantics), inputs, upstream)
    theirs = _with_gradients(eager, inputs, upstream)
    if residual:  # the sum is exact on both sides: an error of zero has no multiple
        assert torch.equal(ours[1], theirs[1])
        ours, theirs, exact = (rows[:1] + rows[2:] for rows in (ours, theirs, exact))
    _assert_no_worse(ours, theirs, exact)


def test_rms_norm_is_transformers_to_an_ulp() -> None:
    """Only the order of the sum of squares differs, so all but a few elements in ten thousand have the same bits."""
    x, r, weight = _normal(4096, 4096), _normal(4096, 4096), _normal(4096)
    layer = LlamaRMSNorm(4096, 1e-5).to("cuda", BF16)
    layer.weight.data.copy_(weight)
    normed, total = rms_norm(x, weight, 1e-5, r)
    assert torch.equal(total, x + r)
    assert (normed != layer(total)).float().mean() < 1e-3
    torch.testing.assert_close(normed, layer(total), rtol=2**-6, atol=0)  # two roundings, an ulp each


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(4096, 14336), (77, 1025), (1, 8)])
def test_glu_error(shape: tuple[int, int], activation: str) -> None:
    inputs, dh = [_normal(*shape, scale=2), _normal(*shape)], _normal(*shape)

    def eager(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return ACT2FN[activation](gate) * up

    exact = _with_gradients(eager, inputs, [dh], wide=True)
    ours = _with_gradients(lambda g, u: glu(g, u, activation), inputs, [dh])
    if shape == (1, 8):  # too few elements for a comparison of norms
        assert all(_error(got, truth) <= 2**-8 for got, truth in zip(ours, exact))
    else:
        _assert_no_worse(ours, _with_gradients(eager, inputs, [dh]), exact)
    gate, up = inputs[0].clone(), inputs[1].clone()
    h = glu_backward_(dh, gate, up, want_h=True, activation=activation)
    assert torch.equal(gate, ours[1]) and torch.equal(up, ours[2])
    assert h is not None and (h != ours[0]).float().mean() <= 1e-4  # two kernels: the compiler may fuse differently


def _angles(T: int, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequencies = 500000.0 ** (-torch.arange(0, R, 2, device="cuda") / R)
    angles = torch.arange(T, device="cuda")[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(BF16), angles.sin().to(BF16)


@pytest.mark.parametrize("H, K, E", [(32, 8, 128), (14, 2, 64), (32, 32, 80), (12, 4, 96), (8, 4, 256), (3, 1, 6)])
def test_rope_error(H: int, K: int, E: int) -> None:
    T = 1021
    cos, sin = _angles(T, E)
    inputs = [_normal(T, H, E), _normal(T, K, E)]

    def eager(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = apply_rotary_pos_emb(q[None], k[None], cos[None].to(q.dtype), sin[None].to(q.dtype), unsqueeze_dim=2)
        return q[0], k[0]

    def packed(q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        qkv = torch.cat((q, k, k), dim=1)
        qkv = rope_packed_(qkv, H, K, cos, sin)
        return qkv[:, :H], qkv[:, H : H + K]

    upstream = [_normal(T, H, E), _normal(T, K, E)]
    exact = _with_gradients(eager, inputs, upstream, wide=True)
    _assert_no_worse(_with_gradients(packed, inputs, upstream), _with_gradients(eager, inputs, upstream), exact)


def test_same_bits_in_20_runs() -> None:
    """A race, in place or in the weight's gradient, would show as a difference between runs."""
    T = 4099
    x, residual, dy, weight = _normal(T, 4096), _normal(T, 4096), _normal(T, 4096), _normal(4096)
    gate, up, dh = _normal(T, 14336), _normal(T, 14336), _normal(T, 14336)
    heads = [(torch.randn(T, H + K, E, device="cuda").to(BF16), H, _angles(T, E)) for H, K, E in
             ((32, 8, 128), (32, 1, 64), (1, 1, 2), (14, 2, 64))]  # fmt: skip

    def run() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, weight, residual)]
        normed, total = rms_norm(leaves[0], leaves[1], 1e-5, leaves[2])
        torch.autograd.backward([normed, total], [dy, dy])
        found = [normed, total, *(leaf.grad for leaf in leaves)]
        g, u = gate.clone(), up.clone()
        found += [glu_backward_(dh, g, u, want_h=True), g, u]
        for qk, H, (cos, sin) in heads:
            turned = qk.clone()
            rotate_(turned[:, :H], turned[:, H:], cos, sin)
            found.append(turned)
        return [t.detach().view(torch.int16) for t in found]

    first = run()
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, run()))


def _needs(gib: int) -> None:
    if torch.cuda.mem_get_info()[0] < gib * 2**30:
        pytest.skip(f"needs {gib} GiB of free GPU memory")


def test_offsets_past_two_billion() -> None:
    """The last rows of tensors with more than 2^31 elements equal the same rows alone."""
    _needs(24)
    T, D = 2**19 + 5, 4096
    tail = slice(T - 3, T)
    x = torch.empty(T, D, device="cuda", dtype=BF16).normal_()
    weight = _normal(D)
    alone = rms_norm(x[tail].clone(), weight, 1e-5)
    assert torch.equal(rms_norm(x, weight, 1e-5)[tail], alone)
    cos, sin = _angles(3, 128)
    positions = torch.arange(T, device="cuda") % 3
    q, before = x.view(T, 32, 128), x[tail].view(3, 32, 128).clone()
    k = before[:, :8].clone()
    rotate_(q, q[:, :8].clone(), cos, sin, positions)
    rotate_(before, k, cos, sin, positions[tail])
    assert torch.equal(q[tail], before)
    del q, x
    gate, up, dh = (torch.empty(T, D, device="cuda", dtype=BF16).normal_() for _ in range(3))
    few = [t[tail].clone() for t in (dh, gate, up)]
    h, h_few = glu_backward_(dh, gate, up, True), glu_backward_(*few, True)
    for ours, alone in ((h, h_few), (gate, few[1]), (up, few[2])):
        assert torch.equal(ours[tail], alone)


def _peak(function: Callable[[], object]) -> int:
    """Bytes allocated at the peak of ``function`` beyond what was allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def test_peak_memory() -> None:
    T, D, columns = 4096, 4096, 14336
    slack = 1 << 20
    x, residual, weight = _normal(T, D).requires_grad_(), _normal(T, D), _normal(D)
    assert _peak(lambda: rms_norm(x, weight, 1e-5)) <= x.nbytes + slack
    assert _peak(lambda: rms_norm(x, weight, 1e-5, residual)) <= 2 * x.nbytes + slack
    normed = rms_norm(x, weight, 1e-5)
    dy = torch.ones_like(normed)
    assert _peak(lambda: torch.autograd.grad(normed, x, dy)) <= x.nbytes + slack
    gate, up, dh = _normal(T, columns), _normal(T, columns), _normal(T, columns)
    assert _peak(lambda: glu_backward_(dh, gate, up)) <= slack
    assert _peak(lambda: glu_backward_(dh, gate, up, want_h=True)) <= gate.nbytes + slack
    gate, up = (t.requires_grad_() * 1 for t in (gate, up))
    h = glu(gate, up)
    assert _peak(lambda: torch.autograd.grad(h, (gate, up), dh)) <= slack
    q, k = _normal(T, 32, 128), _normal(T, 8, 128)
    cos, sin = _angles(T, 128)
    assert _peak(lambda: rotate_(q, k, cos, sin)) <= slack
    leaf = _normal(T, 48 * 128).requires_grad_()
    turned = rope_packed_(leaf * 1, 32, 8, cos, sin, head_dim=128, gradient_in_place=True)
    gradient = torch.ones_like(turned)
    # The product's own gradient is the one allocation.
    assert _peak(lambda: torch.autograd.grad(turned, leaf, gradient)) <= leaf.nbytes + slack
