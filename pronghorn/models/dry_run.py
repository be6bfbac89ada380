"""A training step of one layer, walked for the kernels that it would launch: see ``kernels/warm.py``.

Layers of a family are alike, so one stands for all; so few tokens stand for all batches, since no kernel is compiled
for a number of tokens. What torch's own operations compute meanwhile means nothing and is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.adamw8bit import BLOCK, Slot, rule, table
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..kernels.linear_logprob import chosen_logprobs
from .attention import PackedAttention
from .forward import head
from .fused_block import Saving, fused_block
from .keep import Keep
from .modules import norm
from .packed_layer import prepared_layers
from .parts import Groups, Held, HeldOf, Parts, held_weights
from .state import ATTRIBUTE
from .tree import unwrap

_TOKENS = 16
_TILE = 4 * BLOCK  # elements of a program of the optimizer's kernel


def training_step(model: nn.Module) -> None:
    """Inside :func:`pronghorn.kernels.launch.recording` and :func:`pronghorn.models.packed_layer.prepared`: what a
    supervised step of ``model`` launches, its optimizer (8-bit AdamW) included. Nothing where layers do not run fused.
    """
    found = prepared_layers(model)
    if found is None:
        return
    layer_step(model, found[0], [_TOKENS])
    if all(p.nf4 is not None for p in found[0][0].projections):  # which a plan may have in 16 bits too
        dtype = unwrap(model).__dict__[ATTRIBUTE].compute_dtype
        held = HeldOf(None, held_weights(found[0][1], dtype))
        held.refresh(found[0][1])  # as every step but the first does
        layer_step(model, found[0], [_TOKENS], held=held.weights)
    head_step(model)
    _optimizer_step([p for p in model.parameters() if p.requires_grad])


def layer_step(
    model: nn.Module,
    layer: tuple[Parts, Groups],
    lengths: Sequence[int],
    prefix: Sequence[int | None] | None = None,
    ordered: bool = False,
    held: Held = Held(),  # noqa: B008 - immutable
) -> None:
    """Forward and backward of one layer that keeps nothing but its input, over rows of these lengths."""
    stack = unwrap(model).model
    hidden_TD = _zeros(model, sum(lengths))
    positions_1T = torch.arange(sum(lengths), device=hidden_TD.device).unsqueeze(0)
    cos_1TE, sin_1TE = stack.rotary_emb(hidden_TD, position_ids=positions_1T)
    attention = PackedAttention(lengths, hidden_TD.device, prefix, ordered=ordered)
    with torch.enable_grad():
        out_TD = fused_block(*layer, hidden_TD, (cos_1TE[0], sin_1TE[0]), attention, Saving(Keep.INPUT, held=held))
        torch.autograd.grad(out_TD, hidden_TD, torch.zeros_like(out_TD))


def head_step(model: nn.Module) -> None:
    """The final norm and the head's losses: cross-entropy, log-probabilities with and without gradient."""
    out = head(model)
    hidden_TD = _zeros(model, _TOKENS)
    targets_T = torch.zeros(_TOKENS, dtype=torch.int64, device=hidden_TD.device)
    given: dict[str, Any] = {"bias_V": out.bias_V, "softcap": out.softcap, "scale": out.scale}
    with torch.enable_grad():
        normed_TD = norm(unwrap(model).model.norm, hidden_TD)
        loss = linear_cross_entropy(normed_TD, out.weight_VD.detach(), targets_T, 1, **given)
        logps_T, _ = chosen_logprobs(normed_TD, out.weight_VD.detach(), targets_T, with_entropy=True, **given)
        torch.autograd.grad(loss + logps_T.sum(), hidden_TD)
    with torch.no_grad():
        chosen_logprobs(hidden_TD, out.weight_VD, targets_T, **given)


def _zeros(model: nn.Module, tokens: int) -> torch.Tensor:
    base = unwrap(model)
    weight_VD = base.model.embed_tokens.weight
    dtype = base.__dict__[ATTRIBUTE].compute_dtype
    return torch.zeros(tokens, weight_VD.shape[1], dtype=dtype, device=weight_VD.device, requires_grad=True)


def _optimizer_step(trained: list[nn.Parameter]) -> None:
    """One tensor of each kind: whole tiles of blocks, and not."""
    for dtype in {p.dtype for p in trained}:
        sizes = {p.numel() % _TILE == 0: p.numel() for p in trained if p.dtype == dtype}
        device = trained[0].device
        levels = torch.zeros(256, device=device)
        slots = []
        for size in sizes.values():
            param = torch.zeros(size, dtype=dtype, device=device)
            codes = torch.zeros(2, size, dtype=torch.uint8, device=device)
            scales = torch.zeros(2, -(-size // BLOCK), device=device)
            slots.append(Slot(param, codes[0].clone(), codes[1].clone(), scales[0].clone(), scales[1].clone()))
        steps = table(slots, levels, levels)
        steps.step([slot.param for slot in slots], [0] * len(slots), [rule(0.0, (0.9, 0.999), 1e-8, 0.0, 1)])
