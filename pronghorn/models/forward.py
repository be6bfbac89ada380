"""The walk over packed tokens that the trainer and the sampler share: embeddings, blocks, norm, head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..kernels.head import head_logits
from ..lora.dora import row_norm
from .attention import Attention
from .checkpointing import ensure_plan
from .modules import norm
from .packed_layer import prepared
from .registry import spec_for
from .tree import unwrap


@dataclass(frozen=True)
class Head:
    """The output projection: ``softcap(scale * (hidden @ weight_VD^T + bias_V))``.

    ``weight_VD`` carries gradient where the head trains. ``softcap`` is None where a family has none.
    """

    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float = 1.0
    softcap: float | None = None


def hidden_states(
    model: nn.Module, input_ids_T: torch.Tensor, positions_T: torch.Tensor, attention: Attention
) -> torch.Tensor:
    """Hidden states after the final norm, ``[T, D]`` in the compute dtype.

    Args:
        model: a Pronghorn model, with or without PEFT around it. Adapters act as they stand.
        input_ids_T: int64 ids of T packed tokens.
        positions_T: int64 position of each token in its row (rotary position).
        attention: which tokens see which.

    A training step begins here: what its layers keep for backward is planned first. A walk without gradients keeps
    nothing and plans nothing.
    """
    if torch.is_grad_enabled():
        ensure_plan(model, getattr(attention, "row_lengths", None) or [input_ids_T.shape[0]])
    stack = unwrap(model).model
    hidden_TD = stack.embed_tokens(input_ids_T)
    cos_1TE, sin_1TE = stack.rotary_emb(hidden_TD, position_ids=positions_T.unsqueeze(0))
    rope_TE = (cos_1TE[0], sin_1TE[0])
    with prepared(model):
        for layer in stack.layers:
            hidden_TD = layer(hidden_TD, position_embeddings=rope_TE, packed_attention=attention)
    return norm(stack.norm, hidden_TD)


def head(model: nn.Module) -> Head:
    """The output projection of ``model`` as tensors, with what PEFT may have put on it.

    Raises:
        NotImplementedError: the head carries an adapter of a kind other than LoRA or ``modules_to_save``.
    """
    base = unwrap(model)
    lm_head = base.lm_head
    spec = spec_for(base.config)
    if hasattr(lm_head, "modules_to_save"):
        chosen = lm_head.original_module
        if not lm_head.disable_adapters and lm_head.active_adapters:
            chosen = lm_head.modules_to_save[lm_head.active_adapters[0]]
        return Head(chosen.weight, chosen.bias, spec.logit_scale, spec.logit_softcap)
    if hasattr(lm_head, "lora_A"):
        return Head(*_lora_head(lm_head), spec.logit_scale, spec.logit_softcap)
    if not isinstance(lm_head, nn.Linear):
        raise NotImplementedError(f"lm_head={type(lm_head).__name__}: use LoRA or modules_to_save on the head")
    return Head(lm_head.weight, lm_head.bias, spec.logit_scale, spec.logit_softcap)


def _lora_head(lm_head: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a head under LoRA, differentiable: ``W + scaling * B @ A``, with DoRA times ``m / norm``."""
    base = lm_head.get_base_layer()
    weight_VD, bias_V = base.weight, base.bias
    active = [] if lm_head.disable_adapters or lm_head.merged else lm_head.active_adapters
    for name in active:
        if name not in lm_head.lora_A:
            continue
        if lm_head.training and getattr(lm_head.lora_dropout[name], "p", 0.0) > 0:
            raise NotImplementedError("lora_dropout on lm_head: set it to 0, or leave lm_head out of target_modules")
        a_rD, b_Vr = lm_head.lora_A[name].weight, lm_head.lora_B[name].weight
        dtype = weight_VD.dtype
        if lm_head.lora_variant.get(name) is None:
            weight_VD = torch.addmm(weight_VD, b_Vr.to(dtype), a_rD.to(dtype), alpha=lm_head.scaling[name])
        else:  # in the masters' dtype up to the end: rounding the sum and the product would be twice the error
            size_V1 = (lm_head.lora_magnitude_vector[name].weight / row_norm(lm_head, name)).unsqueeze(1)
            summed_VD = torch.addmm(weight_VD.to(a_rD.dtype), b_Vr, a_rD, alpha=lm_head.scaling[name])
            weight_VD = (summed_VD * size_V1).to(dtype)
        extra_V = lm_head.lora_B[name].bias
        if extra_V is not None:
            extra_V = extra_V.to(weight_VD.dtype) * lm_head.scaling[name]
            bias_V = extra_V if bias_V is None else bias_V + extra_V
    return weight_VD, bias_V


def logits(model: nn.Module, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits ``[N, V]`` of the given hidden states in float32 (float64 for float64), as the trainer computes them."""
    out = head(model)
    logits_NV = head_logits(hidden_ND, out.weight_VD, out.bias_V)
    if out.scale != 1.0:
        logits_NV = logits_NV * out.scale
    if out.softcap is not None:
        logits_NV = torch.tanh(logits_NV / out.softcap) * out.softcap
    return logits_NV
