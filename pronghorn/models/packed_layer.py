"""Which way a decoder layer runs over packed tokens: fused where it can be, else by its own sub-modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config.errors import ConfigError
from . import checkpointing
from .attention import Attention, PackedAttention
from .fused_block import Saving, fused_block, layer_forward
from .offload import host_store
from .parts import Groups, Held, Parts, held_weights
from .registry import spec_for
from .state import ATTRIBUTE
from .tree import layers, unwrap

PREPARED = "pronghorn_prepared"
"""Attribute of a layer while :func:`prepared` holds: its parts and its adapters in the compute dtype."""

HELD = "pronghorn_held"
"""Attribute of a layer whose dequantized weights stay in memory, as the plan may have it: their key, and they."""


def run_layer(
    layer: Any, hidden_TD: torch.Tensor, rope_TE: tuple[torch.Tensor, torch.Tensor], attention: Attention
) -> torch.Tensor:
    """One decoder layer over packed tokens, ``[T, D]`` to ``[T, D]``.

    The layer is one fused node, unless something on it needs its own sub-modules called (dropout, DoRA, hooks, trained
    norms or base weights): that slower way is said in one line, with the reason.
    """
    ready: tuple[Parts, Groups] | None = layer.__dict__.get(PREPARED)
    if ready is not None and not torch.is_grad_enabled():
        return layer_forward(*ready, hidden_TD, rope_TE, attention)
    spec = spec_for(layer.self_attn.config)
    parts = spec.read_parts(layer)
    if isinstance(parts, str):
        _say_once(layer, parts)
        return checkpointing.run(layer, spec.block, layer, hidden_TD, rope_TE, attention)
    if not torch.is_grad_enabled():
        return layer_forward(parts, parts.rounded(hidden_TD.dtype), hidden_TD, rope_TE, attention)
    if not isinstance(attention, PackedAttention):
        raise ConfigError(
            f"attention={type(attention).__name__} has no backward pass: train with PackedAttention, or run this walk "
            "under torch.no_grad()"
        )
    return fused_block(parts, hidden_TD, rope_TE, attention, _saving(layer, parts, hidden_TD))


def _saving(layer: Any, parts: Parts, hidden_TD: torch.Tensor) -> Saving:
    """What the plan says for this layer, now."""
    own, step = checkpointing.plan_for(layer), checkpointing.step_plan_for(layer)
    store = host_store(hidden_TD.device.index) if own.host and hidden_TD.is_cuda else None
    if step is None or not step.cached_weights:
        layer.__dict__.pop(HELD, None)
        return Saving(own.keep, store, None if step is None else step.mlp_rows)
    return Saving(own.keep, store, step.mlp_rows, _held(layer, parts, hidden_TD.dtype))


class _HeldWeights:
    """Dequantized weights of one layer and what they were made from; a deep copy of the model makes its own."""

    def __init__(self, key: object, weights: Held) -> None:
        self.key, self.weights = key, weights

    def __deepcopy__(self, memo: dict[int, Any]) -> _HeldWeights:
        return _HeldWeights(None, Held())


def _held(layer: Any, parts: Parts, dtype: torch.dtype) -> Held:
    """The layer's weights in ``dtype``, made once, and again if something wrote to the 4-bit ones."""
    key = (dtype, *((id(p.base.weight), p.base.weight._version) for p in parts.projections))
    found: _HeldWeights | None = layer.__dict__.get(HELD)
    if found is None or found.key != key:
        layer.__dict__.pop(HELD, None)
        found = layer.__dict__[HELD] = _HeldWeights(key, held_weights(parts.rounded(dtype), dtype))
    return found.weights


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Read every layer once and round its adapters once, for many forwards without gradients under one policy.

    Weights, active adapter, training flags and hooks must not change inside. The rounded adapters (2 bytes a parameter)
    are gone afterwards, so the next optimizer step shows in the next rollout.
    """
    state = getattr(unwrap(model), ATTRIBUTE, None)
    found = []
    try:
        for layer in layers(model):
            parts = spec_for(unwrap(model).config).read_parts(layer)
            if state is not None and not isinstance(parts, str):
                layer.__dict__[PREPARED] = (parts, parts.rounded(state.compute_dtype))
                found.append(layer)
        yield
    finally:
        for layer in found:
            layer.__dict__.pop(PREPARED, None)


def _say_once(layer: Any, reason: str) -> None:
    if getattr(layer, "pronghorn_unfused", None) != reason:
        layer.pronghorn_unfused = reason
        if layer.self_attn.layer_idx == 0:
            print(f"Pronghorn: layers run by their own modules, slower than fused, because of {reason}", flush=True)
