"""A block's own small modules through Pronghorn's kernels, or called as they are where something watches them.

The kernels read the modules' parameters and give them their gradients, so full fine-tuning trains norms through them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ..kernels.glu import ACTIVATIONS, glu
from ..kernels.reference.rope import rope
from ..kernels.rms_norm import MAX_HIDDEN, rms_norm
from ..kernels.rope import rope_
from ..lora.projection import hooked


def _plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module`` is ``kind`` itself, with nothing on it that wants its own ``forward`` called."""
    return type(module) is kind and not hooked(module) and "forward" not in module.__dict__


def _kernel_takes(x: torch.Tensor) -> bool:
    """The GPU kernels compute in float32; float64 there goes PyTorch's way."""
    return not (x.is_cuda and x.dtype == torch.float64)


def norm(module: Any, x_TD: torch.Tensor) -> torch.Tensor:
    """RMSNorm ``[T, D]``, with the weight's gradient where it trains."""
    if not (_plain(module, LlamaRMSNorm) and _kernel_takes(x_TD) and x_TD.shape[-1] <= MAX_HIDDEN):
        plain: torch.Tensor = module(x_TD)
        return plain
    normed = rms_norm(x_TD, module.weight, module.variance_epsilon)
    assert isinstance(normed, torch.Tensor)
    return normed


def add_and_norm(module: Any, x_TD: torch.Tensor, residual_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``(norm(x + residual), x + residual)``, in one pass where the kernel takes it."""
    if not (_plain(module, LlamaRMSNorm) and _kernel_takes(x_TD) and x_TD.shape[-1] <= MAX_HIDDEN):
        summed_TD = x_TD + residual_TD
        return module(summed_TD), summed_TD
    pair = rms_norm(x_TD, module.weight, module.variance_epsilon, residual_TD)
    assert isinstance(pair, tuple)
    return pair


def gated_mlp(module: Any, x_TD: torch.Tensor, activation: str) -> torch.Tensor:
    """``down(act(gate(x)) * up(x))``, ``[T, D]``."""
    if not (_plain(module, LlamaMLP) and activation in ACTIVATIONS and _kernel_takes(x_TD)):
        plain: torch.Tensor = module(x_TD)
        return plain
    gate_TI, up_TI = module.gate_proj(x_TD), module.up_proj(x_TD)
    # A hook may have kept what a projection gave it; its values must outlive the backward then.
    overwrite = not (hooked(module.gate_proj) or hooked(module.up_proj))
    out: torch.Tensor = module.down_proj(glu(gate_TI, up_TI, activation, overwrite))
    return out


def rotated(
    attn: Any, normed_TD: torch.Tensor, rope_TE: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[T, H, E]`` and keys ``[T, K, E]`` of an attention module, rotated to their positions."""
    T = normed_TD.shape[0]
    q_TO, k_TO = attn.q_proj(normed_TD), attn.k_proj(normed_TD)
    if hooked(attn.q_proj) or hooked(attn.k_proj) or not (q_TO.is_contiguous() and k_TO.is_contiguous()):
        q_TO, k_TO = q_TO.clone(), k_TO.clone()  # what a hook has kept stays unrotated
    q_TO, k_TO = (x.clone() if x._is_view() or (x.is_leaf and x.requires_grad) else x for x in (q_TO, k_TO))
    if not _kernel_takes(q_TO):
        return rope(q_TO.view(T, -1, attn.head_dim), k_TO.view(T, -1, attn.head_dim), *rope_TE)
    q_TO, k_TO = rope_(q_TO, k_TO, *rope_TE, head_dim=attn.head_dim)
    return q_TO.view(T, -1, attn.head_dim), k_TO.view(T, -1, attn.head_dim)
