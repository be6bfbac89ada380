"""Llama: RMSNorm before each half, rotary positions, grouped-query attention, SwiGLU (arXiv:2407.21783)."""

from __future__ import annotations

from typing import Any

import torch

from ..config.errors import ConfigError
from ..lora.projection import hooked
from .attention import Attention
from .modules import add_and_norm, gated_mlp, norm, rotated
from .parts import Parts, read_parts
from .spec import ModelSpec, RopeTE


def block(layer: Any, hidden_TD: torch.Tensor, rope_TE: RopeTE, attention: Attention) -> torch.Tensor:
    """One decoder layer over packed tokens, projection by projection: what runs where the layer cannot be one node.

    The projections are the layer's own modules, so adapters, ``disable_adapter``, dropout and hooks on them act as they
    do in transformers, and base weights train. Norms, rotation and the gate run Pronghorn's kernels on the layer's
    parameters, or the modules themselves where something hooks them.

    Args:
        layer: a ``LlamaDecoderLayer``.
        hidden_TD: residual stream of T packed tokens.
        rope_TE: rotary cos and sin of each token.
        attention: the attention core, which knows which tokens see which.

    Raises:
        ConfigError: a hook on the attention module, which would never run: packed tokens have no mask to call it with.
    """
    attn = layer.self_attn
    if hooked(attn):
        raise ConfigError(
            f"a hook on {type(attn).__name__} would not run: packed tokens pass it by; hook its projections or the "
            "decoder layer, or pronghorn.models.detach(model) first"
        )
    T = hidden_TD.shape[0]
    normed_TD = norm(layer.input_layernorm, hidden_TD)
    q_THE, k_TKE = rotated(attn, normed_TD, rope_TE)
    v_TKE = attn.v_proj(normed_TD).view(T, -1, attn.head_dim)
    o_THE = attention(attn.layer_idx, q_THE, k_TKE, v_TKE, attn.scaling)
    normed_TD, hidden_TD = add_and_norm(layer.post_attention_layernorm, attn.o_proj(o_THE.reshape(T, -1)), hidden_TD)
    return hidden_TD + gated_mlp(layer.mlp, normed_TD, attn.config.hidden_act)


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
    classifiers=("LlamaForSequenceClassification",),
)
