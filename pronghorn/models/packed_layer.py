"""Which way a decoder layer runs over packed tokens: fused where it trains and can be, else by its own sub-modules."""

from __future__ import annotations

from typing import Any

import torch

from . import checkpointing
from .attention import Attention
from .fused_block import Keep, fused_block
from .registry import spec_for


def run_layer(
    layer: Any, hidden_TD: torch.Tensor, rope_TE: tuple[torch.Tensor, torch.Tensor], attention: Attention
) -> torch.Tensor:
    """One decoder layer over packed tokens, ``[T, D]`` to ``[T, D]``.

    Where gradients are wanted the layer is one fused node, unless something on it needs its own sub-modules called
    (dropout, DoRA, hooks, trained norms or base weights): that slower way is said in one line, with the reason.
    """
    spec = spec_for(layer.self_attn.config)
    if torch.is_grad_enabled():
        parts = spec.read_parts(layer)
        if not isinstance(parts, str):
            keep = Keep.INPUT if checkpointing.should_recompute(layer) else Keep.ALL
            return fused_block(parts, hidden_TD, rope_TE, attention, keep)
        _say_once(layer, parts)
    return checkpointing.run(layer, spec.block, layer, hidden_TD, rope_TE, attention)


def _say_once(layer: Any, reason: str) -> None:
    if getattr(layer, "pronghorn_unfused", None) != reason:
        layer.pronghorn_unfused = reason
        if layer.self_attn.layer_idx == 0:
            print(f"Pronghorn: layers train by their own modules, slower than fused, because of {reason}", flush=True)
