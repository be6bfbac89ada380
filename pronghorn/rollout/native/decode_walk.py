"""One token a row through the whole model: the trainer's kernels in the trainer's order, with products for few rows.

Every operation here gives the bits that the trainer's forward gives for the same token: the same element-wise kernels,
products that sum in the same order, attention in the same order. Nothing is decided on the host, so a CUDA graph can
hold it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ...kernels.glu import glu_forward
from ...kernels.rms_norm import add_norm_forward, norm_forward
from ...models.forward import logits
from ...models.packed_layer import prepared_layers
from ...models.parts import Groups, Parts
from ...models.tree import unwrap
from .paged import PagedDecode
from .products import Product, product_of


class _Layer(NamedTuple):
    parts: Parts
    qkv: Product
    o: Product
    gate_up: Product
    down: Product


class DecodeWalk:
    """The layers of a prepared model for up to ``rows`` rows.

    It holds no weights: products read the modules' own, and the adapters as ``prepared`` rounds them, in place.

    Args:
        model: the model, inside :func:`pronghorn.models.packed_layer.prepared`.
        rows: most rows of a step.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.model, self.base = model, unwrap(model)
        found = prepared_layers(model)
        if found is None:
            raise ValueError("a layer runs by its own modules; decode it step by step")
        self.made_of = [id(groups) for _, groups in found]
        dtype = self.base.model.embed_tokens.weight.dtype
        self.layers = [
            _Layer(parts, *(product_of(group, dtype, rows) for group in groups)) for parts, groups in found
        ]

    def serves(self, found: list[tuple[Parts, Groups]] | None) -> bool:
        """Whether these are still the layers that it was made of."""
        return found is not None and [id(groups) for _, groups in found] == self.made_of

    def refresh(self) -> None:
        """The adapters were rounded anew."""
        for layer in self.layers:
            for product in layer[1:]:
                product.refresh()

    def logits(self, tokens_B: torch.Tensor, attention: PagedDecode) -> torch.Tensor:
        """``[B, V]`` float32 for the token after each of ``tokens_B``, which are written to the cache."""
        stack = self.base.model
        hidden_BD = F.embedding(tokens_B, stack.embed_tokens.weight)
        added_BD: torch.Tensor | None = None
        for parts, qkv, o, gate_up, down in self.layers:
            normed_BD, hidden_BD = _norm(added_BD, hidden_BD, parts.norm1_D, parts.eps)
            heads_BHE = qkv(normed_BD).view(tokens_B.shape[0], -1, parts.head_dim)
            H, K = parts.heads
            q, k, v = heads_BHE.split((H, K, K), dim=1)
            attended_BHE = attention.step(parts.layer_idx, q, k, v, parts.scale)
            normed_BD, hidden_BD = _norm(o(attended_BHE.flatten(1)), hidden_BD, parts.norm2_D, parts.eps)
            gate_BI, up_BI = gate_up(normed_BD).chunk(2, dim=1)
            added_BD = down(glu_forward(gate_BI, up_BI, parts.activation))
        norm = stack.norm
        normed_BD, _ = _norm(added_BD, hidden_BD, norm.weight, float(norm.variance_epsilon))
        return logits(self.model, normed_BD)


def _norm(
    added_BD: torch.Tensor | None, hidden_BD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``added + hidden``, and that sum."""
    if added_BD is None:
        return norm_forward(hidden_BD, weight_D, eps)[0], hidden_BD
    normed_BD, summed_BD, _ = add_norm_forward(added_BD, hidden_BD, weight_D, eps)
    return normed_BD, summed_BD
