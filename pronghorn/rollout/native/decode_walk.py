"""One token a row through the whole model: the trainer's kernels in the trainer's order, with products for few rows.

Every operation here gives the bits that the trainer's forward gives for the same token: the same element-wise kernels,
products that sum in the same order, attention in the same order. Nothing is decided on the host, so a CUDA graph can
hold it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from ...kernels.glu import glu_forward
from ...kernels.head import head_logits
from ...kernels.launch import chained
from ...kernels.nf4_matmul import MAX_ROWS
from ...kernels.rms_norm import add_norm_forward, norm_forward
from ...lora.projection import hooked
from ...models.forward import Head, head
from ...models.parts import Groups, Parts
from ...models.tree import unwrap
from .paged import PagedDecode
from .products import Product, Tables, product_of


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
        model: the model.
        found: its layers, from :func:`pronghorn.models.packed_layer.prepared_layers`.
        rows: most rows of a step.
        max_positions: tokens of the longest row; angles are made for so many.
        hold: whether there is memory to keep 4-bit weights in 16 bits too, where rows are many.
    """

    def __init__(
        self, model: nn.Module, found: list[tuple[Parts, Groups]], rows: int, max_positions: int, hold: bool = False
    ) -> None:
        self.base = unwrap(model)
        stack = self.base.model
        weight_VD = stack.embed_tokens.weight
        most, tables = few_rows(hold), Tables() if hold else None
        self.layers = [
            _Layer(parts, *(product_of(group, weight_VD.dtype, rows, most, tables) for group in groups))
            for parts, groups in found
        ]
        positions_1P = torch.arange(max_positions, device=weight_VD.device).unsqueeze(0)
        cos_1PE, sin_1PE = stack.rotary_emb(weight_VD[:1], position_ids=positions_1P)
        self.cos_PE, self.sin_PE = cos_1PE[0].contiguous(), sin_1PE[0].contiguous()
        self.head: Head = head(model)

    def refresh(self) -> None:
        """The adapters were rounded anew."""
        for layer in self.layers:
            for product in layer[1:]:
                product.refresh()

    def __call__(self, tokens_B: torch.Tensor, attention: PagedDecode) -> torch.Tensor:
        """The head's products ``[B, V]``, float32, for the token after each of ``tokens_B``, which go to the cache."""
        with chained():
            normed_BD = self._layers(tokens_B, attention)
        return head_logits(normed_BD, self.head.weight_VD, None)

    def _layers(self, tokens_B: torch.Tensor, attention: PagedDecode) -> torch.Tensor:
        """Hidden states after the last norm, ``[B, D]``."""
        stack = self.base.model
        hidden_BD = F.embedding(tokens_B, stack.embed_tokens.weight)
        added_BD: torch.Tensor | None = None
        for parts, qkv, o, gate_up, down in self.layers:
            normed_BD, hidden_BD = _norm(added_BD, hidden_BD, parts.norm1_D, parts.eps, qkv)
            H, K = parts.heads
            heads_BHE = qkv(normed_BD).view(tokens_B.shape[0], H + 2 * K, parts.head_dim)
            q, k, v = heads_BHE[:, :H], heads_BHE[:, H : H + K], heads_BHE[:, H + K :]
            rotated = (self.cos_PE, self.sin_PE, parts.scale)
            attended_BHE = attention.rotate_and_attend(parts.layer_idx, q, k, v, *rotated)
            normed_BD, hidden_BD = _norm(o(attended_BHE.flatten(1)), hidden_BD, parts.norm2_D, parts.eps, gate_up)
            gate_BI, up_BI = gate_up(normed_BD).chunk(2, dim=1)
            place = down.place(gate_BI.shape[0])
            added_BD = down(glu_forward(gate_BI, up_BI, parts.activation, place))
        norm = stack.norm
        return _norm(added_BD, hidden_BD, norm.weight, float(norm.variance_epsilon))[0]


def why_no_walk(model: nn.Module) -> str:
    """In words, why a model of fused layers cannot decode by :class:`DecodeWalk`; empty where it can."""
    base = unwrap(model)
    stack = base.model
    kind = type(base.lm_head)
    if kind is not nn.Linear or hooked(base.lm_head):
        return f"an output head that is a {kind.__name__}, or has hooks"
    if type(stack.embed_tokens) is not nn.Embedding or hooked(stack.embed_tokens):
        return f"an embedding that is a {type(stack.embed_tokens).__name__}, or has hooks"
    if hooked(stack.norm) or getattr(stack.norm, "variance_epsilon", None) is None:
        return f"a final norm that is a {type(stack.norm).__name__}, or has hooks"
    rope = getattr(stack.rotary_emb, "rope_type", "default")
    return "" if rope in STATIC_ROPE else f"rope_type={rope!r}, whose angles depend on the length"


STATIC_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Kinds of rotary embedding whose angles depend on the position alone."""


def few_rows(hold: bool) -> int:
    """Rows up to which the 4-bit kernel is the faster way: cuBLAS on weights in 16 bits, if these are there, is as fast
    at some 20 (``benchmarks/results``); where they have to be made for each product, it is slower up to 64.
    """
    return 16 if hold else MAX_ROWS


def _norm(
    added_BD: torch.Tensor | None,
    hidden_BD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    reader: Product | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of ``added + hidden``, written where ``reader`` reads it, and that sum."""
    place = None if reader is None else reader.place(hidden_BD.shape[0])
    if added_BD is None:
        return norm_forward(hidden_BD, weight_D, eps, place)[0], hidden_BD
    normed_BD, summed_BD, _ = add_norm_forward(added_BD, hidden_BD, weight_D, eps, place)
    return normed_BD, summed_BD
