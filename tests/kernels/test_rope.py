"""Rotary embedding: the kernel against the reference and transformers, in place, through packed views and tables."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from pronghorn.kernels import rope as module
from pronghorn.kernels import rope_triton
from pronghorn.kernels.reference import rope as reference
from pronghorn.kernels.rope import rope_, rope_packed_, rotate_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-4}  # one rounding


@pytest.fixture(params=["triton", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both paths, whatever the device."""
    backend = rope_triton if request.param == "triton" else reference
    monkeypatch.setattr(module, "_path", lambda tensor: backend)
    return request.param


def _error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact.double()).norm() / exact.double().norm()).item()


def _angles(positions_T: torch.Tensor, R: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin as transformers makes them."""
    embedding = LlamaRotaryEmbedding(LlamaConfig(head_dim=R, hidden_size=4 * R, num_attention_heads=4))
    cos, sin = embedding(torch.zeros((), dtype=dtype), positions_T[None])
    return cos[0].to(DEVICE), sin[0].to(DEVICE)


def _transformers(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    """transformers' own function on one tensor, in float64."""
    R = cos_TE.shape[-1]
    x, cos, sin = (t.double() for t in (x_THE[..., :R], cos_TE, sin_TE))
    turned, _ = apply_rotary_pos_emb(x[None], x[None], cos[None], sin[None], unsqueeze_dim=2)
    return torch.cat((turned[0], x_THE[..., R:].double()), dim=-1)


PACKED_T = torch.tensor([0, 1, 2, 3, 0, 1, 0, 500, 501, 4095, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "H, K, E, R", [(4, 2, 64, 64), (3, 1, 80, 80), (1, 1, 96, 24), (7, 7, 6, 2), (40, 8, 128, 128), (5, 2, 256, 256)]
)
def test_equals_transformers(path: str, H: int, K: int, E: int, R: int, dtype: torch.dtype) -> None:
    T = len(PACKED_T)
    q, k = (torch.randn(T, heads, E).to(DEVICE, dtype) for heads in (H, K))
    cos, sin = _angles(PACKED_T, R)
    q_true, k_true = _transformers(q, cos, sin), _transformers(k, cos, sin)
    q_new, k_new = q.clone(), k.clone()
    rotate_(q_new, k_new, cos, sin)
    assert _error(q_new, q_true) <= TOLERANCE[dtype] and _error(k_new, k_true) <= TOLERANCE[dtype]
    assert torch.equal(q_new[..., R:], q[..., R:]) and torch.equal(k_new[..., R:], k[..., R:])
    rotate_(q_new, k_new, cos, sin, transpose=True)  # and back
    assert _error(q_new, q) <= 2 * TOLERANCE[dtype] and _error(k_new, k) <= 2 * TOLERANCE[dtype]


def test_packed_views_and_a_table(path: str) -> None:
    """q and k inside one padded QKV tensor: the rest of it stays, and a table by position equals rows by token."""
    T, H, K, E = len(PACKED_T), 4, 2, 16
    cos, sin = _angles(torch.arange(4096), E, torch.float16)  # 16-bit tables, as a 16-bit model has them
    packed = torch.randn(T, (H + 2 * K) * E + 5, device=DEVICE)
    results = []
    for arguments in ((cos, sin, PACKED_T.to(DEVICE)), (cos[PACKED_T], sin[PACKED_T]), None):
        qkv = packed.clone()
        q, k = qkv[:, : H * E].view(T, H, E), qkv[:, H * E : (H + K) * E].view(T, K, E)
        if arguments is None:
            q.copy_(_transformers(q, cos[PACKED_T], sin[PACKED_T]))
            k.copy_(_transformers(k, cos[PACKED_T], sin[PACKED_T]))
        else:
            rotate_(q, k, *arguments)
        results.append(qkv)
    assert torch.equal(results[0], results[1]) and _error(results[0], results[2]) <= 1e-6
    assert torch.equal(results[0][:, (H + K) * E :], packed[:, (H + K) * E :])


@pytest.mark.parametrize("gradient_in_place", [False, True])
def test_gradients_are_transformers(path: str, gradient_in_place: bool) -> None:
    """Through linear layers, as in a model: two outputs, and one packed; YaRN's scale included."""
    T, D, H, K, E = len(PACKED_T), 12, 4, 2, 8
    cos, sin = (1.2 * table for table in _angles(PACKED_T, E))
    x0 = torch.randn(T, D)
    weight = torch.randn((H + 2 * K) * E, D, device=DEVICE)
    upstream = torch.randn(T, H + 2 * K, E, device=DEVICE)

    def run(kind: str) -> list[torch.Tensor]:
        x, w = x0.to(DEVICE).requires_grad_(), weight.clone().requires_grad_()
        if kind == "pair":
            sizes = [H * E, K * E, K * E]
            q, k, v = (torch.nn.functional.linear(x, part) for part in w.split(sizes))
            q, k = rope_(q, k, cos, sin, head_dim=E, gradient_in_place=gradient_in_place)
            out = torch.cat((q, k, v), dim=1).view(T, -1, E)
        else:
            qkv = torch.nn.functional.linear(x, w)
            if kind == "packed":
                out = rope_packed_(qkv, H, K, cos, sin, head_dim=E, gradient_in_place=gradient_in_place).view(T, -1, E)
            else:
                q, k, v = qkv.view(1, T, -1, E).split([H, K, K], dim=2)
                q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None], unsqueeze_dim=2)
                out = torch.cat((q, k, v), dim=2)[0]
        out.backward(upstream.clone())
        return [out.detach(), x.grad, w.grad]

    truth = run("transformers")
    for kind in ("pair", "packed"):
        for ours, theirs in zip(run(kind), truth):
            assert _error(ours, theirs) <= 1e-6, kind


def test_gradcheck() -> None:
    cos, sin = (t.cpu().double() for t in _angles(torch.tensor([0, 3, 1]), 4))
    q, k = (torch.randn(3, heads, 6, dtype=torch.float64, requires_grad=True) for heads in (3, 2))
    positions = torch.tensor([2, 0, 1])
    for function in (lambda q, k, *a: rope_(q * 1, k * 1, *a), reference.rope):
        assert torch.autograd.gradcheck(lambda q, k, f=function: f(q, k, cos, sin, positions), (q, k))


def test_in_place_and_nothing_of_q_or_k_is_saved(path: str) -> None:
    T, H, K, E = 5, 3, 1, 8
    cos, sin = _angles(torch.arange(T), E)
    x = torch.randn(T, H, E, device=DEVICE, requires_grad=True)
    q, k = x * 1, x[:, :K] * 1
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        q_new, k_new = rope_(q, k, cos, sin)
    assert q_new is q and k_new is k
    assert {t.data_ptr() for t in saved} == {cos.data_ptr(), sin.data_ptr()}


def test_gradients_are_copied_unless_vouched_for(path: str) -> None:
    """A gradient that two consumers share is written to only on request."""
    T, E = 3, 4
    cos, sin = _angles(torch.arange(T) + 1, E)
    for gradient_in_place in (False, True):
        leaves = [torch.randn(T, 1, E, device=DEVICE, requires_grad=True) for _ in range(2)]
        dq, dk = torch.randn(2, T, 1, E, device=DEVICE)
        before = dq.clone()
        q, k = rope_(leaves[0] * 1, leaves[1] * 1, cos, sin, gradient_in_place=gradient_in_place)
        torch.autograd.backward([q, k], [dq, dk])
        assert torch.equal(dq, before) != gradient_in_place
    q, k = rope_(leaves[0] * 1, leaves[1] * 1, cos, sin, gradient_in_place=True)
    leaves[0].grad = None
    (q.sum() + k.sum()).backward()  # expanded gradients: one element repeated, so a copy is due all the same
    exact = torch.ones(T, 1, E, device=DEVICE)
    rotate_(exact, exact.clone(), cos, sin, transpose=True)
    torch.testing.assert_close(leaves[0].grad, exact)


def test_overwriting_what_autograd_saved_raises(path: str) -> None:
    x = torch.randn(3, 1, 4, device=DEVICE, requires_grad=True)
    cos, sin = _angles(torch.arange(3), 4)
    q = x * 1
    loss = q.square().sum()  # saves q
    rotate_(q.detach(), torch.zeros(3, 1, 4, device=DEVICE), cos, sin)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_tokens(path: str) -> None:
    q = torch.empty(0, 2, 4, device=DEVICE)
    rotate_(q, q.clone(), torch.empty(0, 4, device=DEVICE), torch.empty(0, 4, device=DEVICE))


def test_bad_input() -> None:
    q, cos = torch.ones(3, 2, 4), torch.ones(3, 4)
    with pytest.raises(ValueError, match="k is"):
        rotate_(q, q[:2], cos, cos)
    with pytest.raises(ValueError, match="cos is"):
        rotate_(q, q.clone(), cos[:2], cos[:2])
    with pytest.raises(ValueError, match="cos is"):
        rotate_(q, q.clone(), cos[:, :3].contiguous(), cos[:, :3].contiguous())
    with pytest.raises(ValueError, match="q is"):
        rotate_(q.transpose(1, 2), q.clone(), cos[:, :2], cos[:, :2])
    with pytest.raises(ValueError, match="positions is"):
        rotate_(q, q.clone(), cos, cos, torch.zeros(3))
    with pytest.raises(ValueError, match="head_dim=None"):
        rope_(q.view(3, 8), q.view(3, 8), cos, cos)
    x = q.clone().requires_grad_() * 1
    with pytest.raises(ValueError, match="is a view that needs gradient"):
        rope_(x.view(3, 2, 4), q.clone(), cos, cos)
    with pytest.raises(ValueError, match="holds no 2 q and 1 k"):
        rope_packed_(q, 2, 1, cos, cos)


def test_into_other_tensors(path: str) -> None:
    T, H, K, E = 5, 3, 1, 16
    cos, sin = _angles(torch.arange(T), E, torch.float16)
    packed = torch.randn(T, H + 2 * K, E).to(DEVICE, torch.float16)
    q, k = packed[:, :H], packed[:, H : H + K]
    before = packed.clone()
    room = torch.full((T, (H + 2 * K) * E + 8), 7.0, dtype=torch.float16, device=DEVICE)
    heads = room[:, : (H + 2 * K) * E].view(T, H + 2 * K, E)
    rotate_(q, k, cos, sin, transpose=True, out=(heads[:, :H], heads[:, H : H + K]))
    assert torch.equal(packed, before)
    rotate_(q, k, cos, sin, transpose=True)
    assert torch.equal(heads[:, : H + K], packed[:, : H + K])
    assert bool((heads[:, H + K :] == 7).all()) and bool((room[:, (H + 2 * K) * E :] == 7).all())
    half = tuple(t[:, : E // 2] for t in (cos, sin))
    with pytest.raises(ValueError, match="all rotary"):
        rotate_(q, k, *half, out=(torch.empty_like(q), torch.empty_like(k)))
