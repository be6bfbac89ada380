"""Log-probabilities of chosen tokens straight from hidden states: logits exist one chunk of rows at a time.

With ``z = softcap(scale * (h W^T + b)) / temperature`` (``softcap(x) = c tanh(x / c)``), the log-probability of token
``t`` is ``z_t - logsumexp(z)``, and its gradient to ``h`` needs only ``W_t - softmax(z) W``: that row of D numbers is
made in the forward pass, while the chunk's logits are at hand, so backward to ``h`` is a product of ``[N, D]`` by
``[N]``. Only a head that trains has its logits computed again. Peak memory is a few chunks, never N x V.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

CHUNK_ELEMENTS = 1 << 25
"""Logits alive at once (rows x V): 128 MiB in float32."""


def chosen_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of ``targets_N`` under the head's distribution, with gradient.

    Args:
        hidden_ND: hidden states that predict the targets, in the head's dtype.
        weight_VD: output projection. Gradients flow to it, and to ``bias_V``, where they require it.
        targets_N: int64 token ids in [0, V).
        temperature: divides the logits, as the sampler's does.
        softcap: bound of the logits (Gemma 2), None for none.
        scale: multiplies the logits before the softcap.
        chunk: rows whose logits exist at once; by default as many as hold :data:`CHUNK_ELEMENTS` logits.
        with_entropy: also return the entropy of each distribution.

    Returns:
        ``(logps_N, entropy_N)`` in nats: float32 (float64 for float64 input); ``entropy_N`` carries no gradient and is
        None unless asked for.

    Raises:
        ValueError: ``temperature`` is not positive, or the shapes do not fit.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} cannot divide logits; give a positive number (1.0 for greedy)")
    if hidden_ND.dim() != 2 or targets_N.shape != hidden_ND.shape[:1] or weight_VD.shape[1] != hidden_ND.shape[1]:
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)}, "
            f"targets {tuple(targets_N.shape)}; expected [N, D], [V, D], [N]"
        )
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // weight_VD.shape[0])
    logps_N, entropy_N = _ChosenLogprobs.apply(
        hidden_ND, weight_VD, targets_N, bias_V, temperature, softcap, scale, chunk, with_entropy
    )
    return logps_N, entropy_N if with_entropy else None


def head_logits(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """``hidden @ weight^T + bias``, ``[N, V]`` in float32 (float64 for float64), not rounded to 16 bits on the way.

    A bfloat16 logit of 8 is off by up to 0.016, and so would be every log-probability; a GPU's matrix product hands out
    its float32 accumulator as it is. Trainer and sampler both come through here.
    """
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    if hidden_ND.is_cuda and hidden_ND.dtype != dtype:
        z_NV = torch.mm(hidden_ND, weight_VD.to(hidden_ND.dtype).T, out_dtype=dtype)
    else:
        z_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype)).to(dtype)
    return z_NV if bias_V is None else z_NV.add_(bias_V.to(dtype))


def _scaled_logits(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    temperature: float,
    softcap: float | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``z_CV`` in float32 or float64, and ``dz/dlogit`` where it is not the constant ``scale / temperature``."""
    z_CV = head_logits(hidden_CD, weight_VD, bias_V)
    if scale != 1.0:
        z_CV = z_CV * scale
    slope_CV = None
    if softcap is not None:
        bounded_CV = torch.tanh(z_CV / softcap)
        slope_CV = 1 - bounded_CV.square()
        z_CV = bounded_CV * softcap
    return (z_CV if temperature == 1.0 else z_CV / temperature), slope_CV


class _ChosenLogprobs(torch.autograd.Function):
    """See the module's docstring; ``U_ND`` below is the gradient of each log-probability to its hidden state."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        bias_V: torch.Tensor | None,
        temperature: float,
        softcap: float | None,
        scale: float,
        chunk: int,
        with_entropy: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        N = hidden_ND.shape[0]
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        logps_N = hidden_ND.new_empty(N, dtype=dtype)
        entropy_N = hidden_ND.new_empty(N if with_entropy else 0, dtype=dtype)
        U_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            targets_C1 = targets_N[rows].unsqueeze(1)
            z_CV, slope_CV = _scaled_logits(hidden_ND[rows], weight_VD, bias_V, temperature, softcap, scale)
            lse_C1 = z_CV.logsumexp(dim=1, keepdim=True)
            logps_N[rows] = (z_CV.gather(1, targets_C1) - lse_C1).squeeze(1)
            if U_ND is None and not with_entropy:
                continue
            p_CV = torch.exp(z_CV - lse_C1)
            if with_entropy:
                entropy_N[rows] = lse_C1.squeeze(1) - torch.linalg.vecdot(p_CV, z_CV)
            if U_ND is not None:
                d_CV = _logit_gradient(p_CV, targets_C1, slope_CV, scale / temperature)
                U_ND[rows] = d_CV.to(weight_VD.dtype) @ weight_VD
        ctx.mark_non_differentiable(entropy_N)
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(U_ND, *((hidden_ND, weight_VD, targets_N, bias_V) if trains_head else ()))
        ctx.settings = (temperature, softcap, scale, chunk)
        return logps_N, entropy_N

    @staticmethod
    def backward(ctx: Any, g_N: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        U_ND, *head = ctx.saved_tensors
        hidden_grad = None if U_ND is None else (U_ND * g_N.unsqueeze(1)).to(U_ND.dtype)
        weight_grad = bias_grad = None
        if head:
            weight_grad, bias_grad = _head_gradients(head, g_N, ctx.settings, ctx.needs_input_grad[3])
            weight_grad = weight_grad if ctx.needs_input_grad[1] else None
        return hidden_grad, weight_grad, None, bias_grad, None, None, None, None, None


def _logit_gradient(
    p_CV: torch.Tensor, targets_C1: torch.Tensor, slope_CV: torch.Tensor | None, factor: float
) -> torch.Tensor:
    """``d logp / d logit``: ``(onehot - p) * slope * factor``; overwrites ``p_CV``."""
    d_CV = p_CV.neg_().scatter_add_(1, targets_C1, torch.ones_like(targets_C1, dtype=p_CV.dtype))
    if slope_CV is not None:
        d_CV.mul_(slope_CV)
    return d_CV if factor == 1.0 else d_CV.mul_(factor)


def _head_gradients(
    saved: list[torch.Tensor],
    g_N: torch.Tensor,
    settings: tuple[float, float | None, float, int],
    wants_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of weight and bias, summed over chunks in float32 or wider."""
    hidden_ND, weight_VD, targets_N, bias_V = saved
    temperature, softcap, scale, chunk = settings
    weight_grad = torch.zeros_like(weight_VD, dtype=g_N.dtype)
    bias_grad = torch.zeros_like(bias_V, dtype=g_N.dtype) if wants_bias and bias_V is not None else None
    for start in range(0, hidden_ND.shape[0], chunk):
        rows = slice(start, start + chunk)
        targets_C1 = targets_N[rows].unsqueeze(1)
        z_CV, slope_CV = _scaled_logits(hidden_ND[rows], weight_VD, bias_V, temperature, softcap, scale)
        d_CV = _logit_gradient(z_CV.softmax(dim=1), targets_C1, slope_CV, scale / temperature) * g_N[rows].unsqueeze(1)
        weight_grad += d_CV.to(weight_VD.dtype).T @ hidden_ND[rows]
        if bias_grad is not None:
            bias_grad += d_CV.sum(0)
    bias_out = None if bias_grad is None or bias_V is None else bias_grad.to(bias_V.dtype)
    return weight_grad.to(weight_VD.dtype), bias_out
