"""Tokens through the whole model in a rollout: the trainer's kernels in the trainer's order, launched one by one.

Every operation here gives the bits that the trainer's forward gives for the same token: the same element-wise kernels,
products that sum in the same order, attention in the same order. A decode step has products for few rows; nothing of it
is decided on the host, so a CUDA graph can hold it. A prefill has the trainer's products, on the weights in 16 bits
that decoding keeps, where it does; the last layer's is done for the rows alone that are asked for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from ...kernels.glu import glu_forward
from ...kernels.head import head_logits
from ...kernels.launch import before_a_start, chained
from ...kernels.nf4_matmul import MAX_ROWS
from ...kernels.rms_norm import add_norm_forward, norm_forward
from ...lora.held import HeldWeights
from ...lora.projection import hooked
from ...models.forward import Head, head
from ...models.parts import Groups, Parts
from ...models.tree import unwrap
from .dense import TrainerProduct
from .products import HeldProduct, Product, Tables, product_of


class _Layer(NamedTuple):
    parts: Parts
    qkv: Product
    o: Product
    gate_up: Product
    down: Product


class RotatedAttention(Protocol):
    """Attention that rotates: of a decode step, or of a prefill."""

    def rotate_and_attend(
        self,
        layer_idx: int,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        cos_PE: torch.Tensor,
        sin_PE: torch.Tensor,
        scale: float,
        out_THE: torch.Tensor | None,
        /,
    ) -> torch.Tensor: ...


class _Walk:
    """The layers of a prepared model. It holds no weights: products read the modules' own, and the adapters as
    ``prepared`` rounds them, in place.
    """

    def __init__(self, model: nn.Module, layers: list[_Layer], cos_PE: torch.Tensor, sin_PE: torch.Tensor) -> None:
        self.base = unwrap(model)
        self.layers, self.cos_PE, self.sin_PE = layers, cos_PE, sin_PE
        self.head: Head = head(model)

    def refresh(self) -> None:
        """The adapters were rounded anew."""
        for layer in self.layers:
            for product in layer[1:]:
                product.refresh()

    def _walk(
        self, tokens_T: torch.Tensor, attention: RotatedAttention, asked_L: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Hidden states after the last norm, ``[T, D]``; of the tokens ``asked_L`` alone, where that is given."""
        stack, T = self.base.model, tokens_T.shape[0]
        hidden_TD = F.embedding(tokens_T, stack.embed_tokens.weight)
        added_TD: torch.Tensor | None = None
        for parts, qkv, o, gate_up, down in self.layers:
            normed_TD, hidden_TD = _norm(added_TD, hidden_TD, parts.norm1_D, parts.eps, qkv)
            H, K = parts.heads
            heads_THE = qkv(normed_TD).view(T, H + 2 * K, parts.head_dim)
            q, k, v = heads_THE[:, :H], heads_THE[:, H : H + K], heads_THE[:, H + K :]
            asked = asked_L if parts is self.layers[-1].parts else None
            place = o.place(T) if asked is None else None
            out = None if place is None else place.unflatten(1, (H, parts.head_dim))
            rotated = (self.cos_PE, self.sin_PE, parts.scale)
            with _before(o, T):
                attended_TD = attention.rotate_and_attend(parts.layer_idx, q, k, v, *rotated, out).flatten(1)
            if asked is not None:
                attended_TD, hidden_TD = attended_TD.index_select(0, asked), hidden_TD.index_select(0, asked)
                if not len(hidden_TD):
                    return hidden_TD
            normed_TD, hidden_TD = _norm(o(attended_TD), hidden_TD, parts.norm2_D, parts.eps, gate_up)
            gate_TI, up_TI = gate_up(normed_TD).chunk(2, dim=1)
            rows = gate_TI.shape[0]
            with _before(down, rows):
                h_TI = glu_forward(gate_TI, up_TI, parts.activation, down.place(rows))
            added_TD = down(h_TI)
        norm = stack.norm
        return _norm(added_TD, hidden_TD, norm.weight, float(norm.variance_epsilon))[0]


class DecodeWalk(_Walk):
    """One token a row, for up to ``rows`` rows.

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
        stack = unwrap(model).model
        weight_VD = stack.embed_tokens.weight
        most, tables = few_rows(hold), Tables() if hold else None
        layers = [
            _Layer(parts, *(product_of(group, weight_VD.dtype, rows, most, tables) for group in groups))
            for parts, groups in found
        ]
        positions_1P = torch.arange(max_positions, device=weight_VD.device).unsqueeze(0)
        cos_1PE, sin_1PE = stack.rotary_emb(weight_VD[:1], position_ids=positions_1P)
        super().__init__(model, layers, cos_1PE[0].contiguous(), sin_1PE[0].contiguous())

    def __call__(self, tokens_B: torch.Tensor, attention: RotatedAttention) -> torch.Tensor:
        """The head's products ``[B, V]``, float32, for the token after each of ``tokens_B``, which go to the cache."""
        with chained():
            normed_BD = self._walk(tokens_B, attention)
        return head_logits(normed_BD, self.head.weight_VD, None)


class PrefillWalk(_Walk):
    """Packed chunks of prompts, over the same weights, adapters and angles as ``decode``.

    Args:
        model: the model.
        found: its layers, as ``decode`` was given them.
        dtype: of hidden states.
        decode: a decode step of the same model; weights that it keeps in 16 bits are read here too.
    """

    def __init__(
        self, model: nn.Module, found: list[tuple[Parts, Groups]], dtype: torch.dtype, decode: DecodeWalk
    ) -> None:
        layers = [
            _Layer(parts, *(TrainerProduct(g, dtype, _held(product)) for g, product in zip(groups, layer[1:])))
            for (parts, groups), layer in zip(found, decode.layers)
        ]
        super().__init__(model, layers, decode.cos_PE, decode.sin_PE)

    @torch.no_grad()
    def __call__(self, tokens_T: torch.Tensor, attention: RotatedAttention, asked_L: torch.Tensor) -> torch.Tensor:
        """Hidden states after the last norm, ``[L, D]``, of the tokens ``asked_L`` among ``tokens_T``."""
        with chained():
            return self._walk(tokens_T, attention, asked_L)


def _held(product: Product) -> HeldWeights | None:
    """What a prefill can read too. Adapters of other ranks the trainer adds to the rounded product of the base."""
    return product.held if isinstance(product, HeldProduct) and product.group.rank % 8 == 0 else None


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
    at some 20 (``benchmarks/results``; where outputs are many, see ``products.py``); where they have to be made for
    each product, it is slower up to 64.
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
    with _before(reader, hidden_BD.shape[0]):
        if added_BD is None:
            return norm_forward(hidden_BD, weight_D, eps, place)[0], hidden_BD
        normed_BD, summed_BD, _ = add_norm_forward(added_BD, hidden_BD, weight_D, eps, place)
    return normed_BD, summed_BD


def _before(reader: Product | None, rows: int) -> AbstractContextManager[None]:
    """Around the launch whose outputs ``reader`` reads next."""
    return before_a_start(reader is not None and reader.makes_a_start(rows))
