"""What the fused path reads of a decoder layer: its projections and norms as they stand, and its sizes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from ..kernels.glu import ACTIVATIONS
from ..lora.held import Beside, HeldWeights
from ..lora.projection import Group, Projection, hooked, read_projection
from ..lora.rounded import Rounded

HELD = "pronghorn_held"
"""Attribute of a layer whose dequantized weights stay in memory, as the plan may have it: a :class:`HeldOf`."""


class Groups(NamedTuple):
    """A layer's projections by their common input, at a compute dtype."""

    qkv: Group
    o: Group
    gate_up: Group
    down: Group


class Held(NamedTuple):
    """Weights of each group that stay in memory in the compute dtype; None where each product makes its own."""

    qkv: HeldWeights | None = None
    o: HeldWeights | None = None
    gate_up: HeldWeights | None = None
    down: HeldWeights | None = None


class HeldOf:
    """Dequantized weights of one layer and what they were made from; a deep copy of the model makes its own."""

    def __init__(self, key: object, weights: Held) -> None:
        self.key, self.weights = key, weights
        self._beside = Beside()

    def refresh(self, groups: Groups) -> None:
        """Write the adapters beside the weights anew: one launch for a layer."""
        held = zip(self.weights, groups)
        self._beside(groups, lambda: [b for own, group in held if own is not None for b in own.blocks(group)])

    def __deepcopy__(self, memo: dict[int, Any]) -> HeldOf:
        return HeldOf(None, Held())


def held_bytes(of: Iterable[nn.Module]) -> int:
    """Bytes of the dequantized weights that these layers hold now."""
    found: list[HeldOf] = [layer.__dict__[HELD] for layer in of if HELD in layer.__dict__]
    return sum(own.bytes for held in found for own in held.weights if own is not None)


def release_held(of: Iterable[nn.Module]) -> None:
    """Give the memory of the dequantized weights back; the next training step whose plan has them makes them again."""
    for layer in of:
        layer.__dict__.pop(HELD, None)


@dataclass(frozen=True)
class Parts:
    """A layer's pieces: its projections in the order q, k, v, o, gate, up, down, its norms and its sizes."""

    projections: tuple[Projection, ...]
    norm1_D: torch.Tensor
    norm2_D: torch.Tensor
    eps: float
    head_dim: int
    scale: float
    layer_idx: int
    activation: str

    @property
    def heads(self) -> tuple[int, int]:
        """Query heads and key/value heads."""
        q, k = self.projections[:2]
        return q.base.out_features // self.head_dim, k.base.out_features // self.head_dim

    def rounded(self, dtype: torch.dtype) -> Groups:
        """The projections by their common inputs, adapters rounded to ``dtype``."""
        return Groups(*Rounded(self.members, dtype).groups)

    @property
    def members(self) -> tuple[tuple[Projection, ...], ...]:
        """The projections by their common input, as :class:`Groups` has them."""
        p = self.projections
        return p[:3], p[3:4], p[4:6], p[6:]

    @property
    def key(self) -> tuple[object, ...]:
        """What the layer is made of; as long as it does not change, everything made of it holds."""
        return (
            *itertools.chain.from_iterable(p.key for p in self.projections),
            *(id(self.norm1_D), id(self.norm2_D), self.eps, self.activation),
        )

    def trainables(self) -> list[torch.Tensor | None]:
        """A and B of every projection, in order."""
        return [t for p in self.projections for t in (p.a_rI, p.b_Or)]


def held_weights(groups: Groups, dtype: torch.dtype) -> Held:
    """Every group's weights in ``dtype``, to keep."""
    return Held(*(HeldWeights(group, dtype) for group in groups))


def read_parts(layer: Any, activation: str) -> Parts | str:
    """``layer`` (Llama's names) as :class:`Parts`, or in words why its own sub-modules have to be called."""
    attn, mlp = layer.self_attn, layer.mlp
    if activation not in ACTIVATIONS:
        return f"hidden_act={activation!r}"
    for module in (attn, mlp, layer.input_layernorm, layer.post_attention_layernorm):
        if hooked(module):
            return f"a hook on {type(module).__name__}"
    norms = (layer.input_layernorm.weight, layer.post_attention_layernorm.weight)
    if any(w.requires_grad for w in norms):
        return "a norm that trains"
    found = []
    for module in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        projection = read_projection(module)
        if isinstance(projection, str):
            return projection
        found.append(projection)
    eps = float(layer.input_layernorm.variance_epsilon)
    return Parts(tuple(found), *norms, eps, attn.head_dim, attn.scaling, attn.layer_idx, activation)
