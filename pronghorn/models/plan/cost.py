"""Seconds: a layer's forward, its backward, what each level computes again, the head, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass

from ..keep import Keep
from . import constants as c
from .card import Card
from .shape import GROUPS, ModelShape


@dataclass(frozen=True)
class Seconds:
    """Seconds of one layer, and of what belongs to the whole step.

    Attributes:
        forward: one layer.
        backward: one layer with nothing recomputed.
        again: what each level computes again in backward.
        head: norm, logits, loss and the gradient of the hidden states.
        rest: clipping, optimizer, and what belongs to no layer.
    """

    forward: float
    backward: float
    again: dict[Keep, float]
    head: float
    rest: float


def layer_seconds(
    shape: ModelShape, card: Card, tokens: int, length: float, mlp_rows: int | None, cached: bool
) -> Seconds:
    """The seconds of one layer and of the step around it.

    Args:
        tokens: T, packed.
        length: row length that matters to attention: sum of squared row lengths over their sum.
        mlp_rows: rows of an MLP tile, None for all at once.
        cached: nothing is dequantized.
    """
    work = _Work(shape, card, tokens, cached)
    q, k, v, o, gate, up, down = range(7)
    attend = attention_flops(shape, tokens, length)
    attended = attend / card.attention_rate(length) + c.ATTENTION_CALL_SECONDS[0]
    attended_back = c.ATTENTION_BACKWARD_FLOPS * attend / card.attention_rate(length, backward=True)
    attended_back += c.ATTENTION_CALL_SECONDS[1]
    qkv, gates = work.projections(q, k, v), work.projections(gate, up)
    first = qkv + work.elementwise(2 * work.D + 2 * (work.Q + work.K))  # norm, rotation
    second = work.projections(o) + work.elementwise(3 * work.D)  # residual
    third = gates + work.elementwise(2 * work.D)  # norm
    forward = first + attended + second + third
    forward += work.projections(down) + work.elementwise(3 * work.I + 3 * work.D)
    backward = attended_back + work.back(q, k, v, o, gate, up, down)
    backward += work.elementwise(6 * work.I + 2 * (work.Q + work.K) + 2 * 6 * work.D)  # GLU, rotation, norms
    if not shape.fused:
        again = {Keep.INPUT: forward, Keep.ALL: 0.0}
    else:
        again = {Keep.INPUT: first + attended + second + third, Keep.CORE: first + second + third,
                 Keep.ATTENTION: third, Keep.ALL: 0.0}  # fmt: skip
    tiles = 1 if mlp_rows is None else -(-tokens // mlp_rows)
    tiling = (tiles - 1) * c.TILE_LAUNCHES * c.LAUNCH_SECONDS
    launch = c.LAUNCH_SECONDS
    return Seconds(
        max(forward, c.FORWARD_LAUNCHES * launch) + tiling / 3,
        max(backward, c.BACKWARD_LAUNCHES * launch) + 2 * tiling / 3,
        again,
        _head(shape, card, tokens),
        c.STEP_SECONDS + _optimizer(shape, card),
    )


def attention_flops(shape: ModelShape, tokens: int, length: float) -> float:
    """FLOP of causal attention forward in one layer: two products of ``n^2 / 2`` pairs a row and head."""
    return 2.0 * shape.heads * shape.head_dim * tokens * length


class _Work:
    """Seconds of pieces of a layer at T tokens on a card."""

    def __init__(self, shape: ModelShape, card: Card, tokens: int, cached: bool) -> None:
        self.shape, self.card, self.tokens = shape, card, tokens
        self.dequantizes = shape.quant == "nf4" and not cached
        self.D, self.I = shape.hidden, shape.inner
        self.Q, self.K = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def elementwise(self, elements: float) -> float:
        """Seconds to move ``elements`` activations a token."""
        moved = elements * self.tokens * self.shape.compute_bytes
        return moved / (self.card.copy * c.ELEMENTWISE_SHARE)

    def product(self, index: int) -> float:
        """One matrix product with the weight of projection ``index``, which is dequantized first if it has to be."""
        out, into = self.shape.sizes[index]
        weights, width = out * into, self.shape.compute_bytes
        computing = 2.0 * self.tokens * weights / self.card.matrix
        reading = weights * width / (self.card.copy * c.WEIGHT_READ_SHARE)
        made = 0.0
        if self.dequantizes:
            made = c.DEQUANTIZE_EXPOSED * weights * (0.5 + width) / (self.card.copy * c.DEQUANTIZE_SHARE)
        return max(computing, reading) + made

    def projections(self, *indices: int) -> float:
        """The products of these projections with their LoRA; x is read once for adapters that share it."""
        seconds = sum(self.product(i) for i in indices)
        adapted = [self.shape.sizes[i] for i in indices if self.shape.ranks[i]]
        if not adapted:
            return seconds
        x_passes, y_passes = c.LORA_FORWARD_PASSES
        return seconds + self.elementwise(x_passes * adapted[0][1] + y_passes * sum(out for out, _ in adapted))

    def back(self, *indices: int) -> float:
        """Gradients of the inputs of these projections and of their adapters (or, where they train, their weights)."""
        x_passes, y_passes = c.LORA_BACKWARD_PASSES
        seconds = sum(self.product(i) for i in indices) * (2 if self.shape.trains_base else 1)
        for group in GROUPS:
            adapted = [self.shape.sizes[i] for i in group if i in indices and self.shape.ranks[i]]
            if adapted:
                seconds += self.elementwise(x_passes * adapted[0][1] + y_passes * sum(out for out, _ in adapted))
        return seconds


def _head(shape: ModelShape, card: Card, tokens: int) -> float:
    """Logits and the gradient of the hidden states: two products with the head, and passes over float32 logits."""
    logits = float(tokens) * shape.vocab
    products = 2 * 2.0 * logits * shape.hidden / card.matrix
    return products + c.HEAD_PASSES * 4 * logits / card.copy


def _optimizer(shape: ModelShape, card: Card) -> float:
    """Clipping and the optimizer: some time for each tensor; parameters, gradients and state pass memory once."""
    return (
        shape.trained_tensors * c.OPTIMIZER_TENSOR_SECONDS[shape.optimizer_kind] + 5.0 * shape.trained_bytes / card.copy
    )
