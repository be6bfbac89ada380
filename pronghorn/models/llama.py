"""Llama: RMSNorm before each half, rotary positions, grouped-query attention, SwiGLU (arXiv:2407.21783)."""

from __future__ import annotations

from typing import Any

import torch

from .attention import Attention
from .fused_block import Parts, read_parts
from .rope import apply_rope
from .spec import ModelSpec, RopeTE


def block(layer: Any, hidden_TD: torch.Tensor, rope_TE: RopeTE, attention: Attention) -> torch.Tensor:
    """One decoder layer over packed tokens.

    It calls the layer's own sub-modules, so adapters, ``disable_adapter``, dropout and forward hooks on them act as
    they do in transformers; only the attention core and the token layout are Pronghorn's.

    Args:
        layer: a ``LlamaDecoderLayer``.
        hidden_TD: residual stream of T packed tokens.
        rope_TE: rotary cos and sin of each token.
        attention: the attention core, which knows which tokens see which.
    """
    attn = layer.self_attn
    T = hidden_TD.shape[0]
    normed_TD = layer.input_layernorm(hidden_TD)
    q_THE = attn.q_proj(normed_TD).view(T, -1, attn.head_dim)
    k_TKE = attn.k_proj(normed_TD).view(T, -1, attn.head_dim)
    v_TKE = attn.v_proj(normed_TD).view(T, -1, attn.head_dim)
    q_THE, k_TKE = apply_rope(q_THE, k_TKE, rope_TE)
    o_THE = attention(attn.layer_idx, q_THE, k_TKE, v_TKE, attn.scaling)
    hidden_TD = hidden_TD + attn.o_proj(o_THE.reshape(T, -1))
    return hidden_TD + layer.mlp(layer.post_attention_layernorm(hidden_TD))


def parts(layer: Any) -> Parts | str:
    """The layer's pieces for the fused path, or why it cannot take it."""
    return read_parts(layer, layer.self_attn.config.hidden_act)


SPEC = ModelSpec(
    family="Llama",
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    projections=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    block=block,
    read_parts=parts,
)
