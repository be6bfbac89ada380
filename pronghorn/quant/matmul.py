"""The product with an NF4 weight, and its gradient: the weight is dequantized for each and never kept."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from pronghorn.quant.nf4 import NF4Tensor


class _NF4Linear(torch.autograd.Function):
    """Saves nothing that depends on x: the backward pass dequantizes the weight again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, nf4: NF4Tensor) -> torch.Tensor:
        # An attribute, not save_for_backward: hooks that offload saved tensors would copy the weight out and back.
        ctx.nf4 = nf4
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, nf4.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.nf4.dequantize(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
        return grad_x, grad_bias, None


def nf4_linear(x: torch.Tensor, nf4: NF4Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ W^T + bias`` with W dequantized to x's dtype.

    Args:
        x: [..., in], any floating dtype; float64 apart, cast to autocast's dtype first under autocast, as
            ``F.linear`` casts it.
        nf4: the weight, of shape (out, in).
        bias: [out], any floating dtype, or None.

    Returns:
        [..., out] in x's dtype. Gradients reach x and bias.
    """
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _NF4Linear.apply(x, bias, nf4)
    return F.linear(x, nf4.dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
