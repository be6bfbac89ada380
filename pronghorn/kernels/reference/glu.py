"""Gated linear units (arXiv:2002.05202) in plain PyTorch. ``kernels/glu.py`` has the formulas."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def glu_forward(
    gate_TI: torch.Tensor, up_TI: torch.Tensor, activation: str = "silu", out_TI: torch.Tensor | None = None
) -> torch.Tensor:
    """``activation(gate) * up`` in float32 (float64 for float64), rounded once; autograd is PyTorch's own.

    It is written to ``out_TI`` where given: rows with any stride, outside of autograd.
    """
    wide = torch.promote_types(gate_TI.dtype, torch.float32)
    gate, up = gate_TI.to(wide), up_TI.to(wide)
    if activation == "silu":
        activated = F.silu(gate)
    else:
        activated = F.gelu(gate, approximate="tanh" if activation == "gelu_pytorch_tanh" else "none")
    h_TI = (activated * up).to(gate_TI.dtype)
    return h_TI if out_TI is None else out_TI.copy_(h_TI)


def _value_and_slope(gate: torch.Tensor, activation: str) -> tuple[torch.Tensor, torch.Tensor]:
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        return gate * sigmoid, sigmoid * (1 + gate * (1 - sigmoid))
    if activation == "gelu_pytorch_tanh":
        square = gate * gate
        sigmoid = torch.sigmoid(2 * _SQRT_2_OVER_PI * gate * (1 + 0.044715 * square))
        inner = 2 * _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * square)
        return gate * sigmoid, sigmoid + gate * sigmoid * (1 - sigmoid) * inner
    cdf = 0.5 * (1 + torch.erf(gate * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    return gate * cdf, cdf + gate * pdf


def glu_backward(
    dh_TI: torch.Tensor,
    gate_TI: torch.Tensor,
    up_TI: torch.Tensor,
    dgate_TI: torch.Tensor,
    dup_TI: torch.Tensor,
    h_TI: torch.Tensor | None,
    activation: str,
) -> None:
    """Write :func:`glu_forward`'s gradients to ``dgate_TI`` and ``dup_TI``, which may be ``gate_TI`` and ``up_TI``.

    ``h_TI``, where given, receives the forward's result again; it may be ``dh_TI``.
    """
    wide = torch.promote_types(gate_TI.dtype, torch.float32)
    gate, up, dh = gate_TI.to(wide), up_TI.to(wide), dh_TI.to(wide)
    value, slope = _value_and_slope(gate, activation)
    h = value * up
    dgate, dup = dh * up * slope, dh * value  # all before any is written: for float32 the inputs are not copies
    dgate_TI.copy_(dgate)
    dup_TI.copy_(dup)
    if h_TI is not None:
        h_TI.copy_(h)
