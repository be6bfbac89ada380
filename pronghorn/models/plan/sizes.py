"""Bytes: what a layer keeps at each level, and the widest moments of its forward, its backward and the head.

The moments are read off ``fused_block.py`` and ``fused_mlp.py``, tensor by tensor. x stands for ``[T, D]``, q and k for
``[T, H*E]`` and ``[T, K*E]``, i for ``[T, I]``; ' marks the rows of one tile; w is the largest dequantized weight.
Beside gate and up lies room (spare) for what backward puts there.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...lora.projection import row_columns
from ..keep import Keep
from .constants import (
    ATTENTION_WORKSPACE_BYTES,
    HEAD_CHUNK_ELEMENTS,
    HEAD_HIDDEN,
    UNFUSED_HIDDEN,
    UNFUSED_INNER,
    UNFUSED_KEY,
    UNFUSED_QUERY,
    WEIGHT_BUFFERS,
)
from .shape import GROUPS, ModelShape


@dataclass(frozen=True)
class Sizes:
    """Bytes of one layer and of the head, at T tokens and a tile of the MLP.

    Attributes:
        kept: what a layer keeps from forward to backward, its input included.
        forward: widest moment of a layer's forward by level, what it will keep included.
        backward: widest moment of its backward by level, what it kept included.
        head: from the last layer's output to its gradient.
        step: what lives throughout a step: ids, positions, rotary cos and sin, the adapters in the compute dtype.
    """

    kept: dict[Keep, int]
    forward: dict[Keep, int]
    backward: dict[Keep, int]
    head: int
    step: int


@dataclass(frozen=True)
class _Units:
    """Bytes of the tensors that everything is made of."""

    x: int
    q: int
    k: int
    i: int
    lse: int
    low: int
    spare: int

    @classmethod
    def of(cls, shape: ModelShape, tokens: int) -> _Units:
        unit = tokens * shape.compute_bytes
        return cls(
            unit * shape.hidden,
            unit * shape.heads * shape.head_dim,
            unit * shape.kv_heads * shape.head_dim,
            unit * shape.inner,
            4 * tokens * shape.heads,
            unit * sum(shape.ranks),
            unit * (row_columns(2 * shape.inner + sum(shape.ranks[4:6])) - 2 * shape.inner),
        )

    @property
    def qkv(self) -> int:
        return self.q + 2 * self.k


def kept_bytes(shape: ModelShape, tokens: int) -> dict[Keep, int]:
    """Bytes that one layer keeps at each level (see :class:`Keep`), with its input and ``x A^T`` of its adapters."""
    u = _Units.of(shape, tokens)
    if not shape.fused:
        whole = UNFUSED_HIDDEN * u.x + UNFUSED_QUERY * u.q + UNFUSED_KEY * u.k + UNFUSED_INNER * u.i + u.lse
        return {Keep.INPUT: u.x, Keep.ALL: whole}
    own = u.x + u.low
    core = own + u.q + u.lse
    attention = core + u.qkv + u.x
    return {Keep.INPUT: own, Keep.CORE: core, Keep.ATTENTION: attention, Keep.ALL: attention + 2 * u.i + u.spare}


def layer_sizes(shape: ModelShape, tokens: int, mlp_rows: int | None, cached: bool) -> Sizes:
    """The sizes of one layer and of the head.

    Args:
        tokens: T, packed.
        mlp_rows: rows of an MLP tile, None for all at once. A layer that keeps gate and up has no tiles.
        cached: the 4-bit base lies on the GPU in 16 bits too, so that no weight is dequantized.
    """
    u = _Units.of(shape, tokens)
    kept = kept_bytes(shape, tokens)
    forward, backward = {}, {}
    for level in kept:
        if shape.fused:
            rows = None if level is Keep.ALL or mlp_rows is None or mlp_rows >= tokens else mlp_rows
            forward[level] = _forward(shape, u, tokens, level, rows, cached)
            backward[level] = _backward(shape, u, tokens, rows, cached)
        else:  # autograd walks it back, with the widest gradients beside
            forward[level] = kept[Keep.ALL] + u.i
            backward[level] = kept[Keep.ALL] + 2 * u.i + 2 * u.x
    rows = min(tokens, max(HEAD_CHUNK_ELEMENTS // shape.vocab // 128, 1) * 128)
    head = HEAD_HIDDEN * u.x + 4 * rows * shape.vocab
    step = tokens * (2 * shape.head_dim * shape.compute_bytes + 8 * 4)
    if shape.fused:
        step += shape.compute_bytes * shape.adapter_weights
    return Sizes(kept, forward, backward, head, step)


def _forward(shape: ModelShape, u: _Units, tokens: int, level: Keep, rows: int | None, cached: bool) -> int:
    """Of the MLP, where it is widest, beside what attention keeps.

    In one piece: x, h', its norm, gate and up and their product; then the output and the weight beside them. In tiles:
    x, h', the output and a tile, with the three weights held for all of them.
    """
    weight = _weight(shape, cached)
    if rows is None:
        mlp = 3 * u.x + max(3 * u.i + u.x + weight, 2 * u.i + WEIGHT_BUFFERS * weight)
    else:
        mlp = 3 * u.x + 3 * u.i * rows // tokens + _tile_weights(shape, cached)
    kept_of_attention = {Keep.INPUT: 0, Keep.CORE: u.q + u.lse}.get(level, u.qkv + u.q + u.lse)
    return mlp + u.low + kept_of_attention


def _backward(shape: ModelShape, u: _Units, tokens: int, rows: int | None, cached: bool) -> int:
    """Of the MLP's backward or of attention's, whichever is wider; the same at every level, as all is made by then.

    Both have x, its norm, the gradient of the output, q, k, v, o and the log-sum-exps. The MLP in one piece: h', its
    norm, gate, up, the product's gradient and the product; or gate, up, a gradient of the norm and two weights.
    Attention: the gradients of h', o, q, k and v, and either a workspace or q, k and v's gradients side by side.
    """
    weight = _weight(shape, cached)
    common = 3 * u.x + u.qkv + u.q + u.lse + u.low
    if rows is None:
        mlp = 2 * u.x + max(4 * u.i, 2 * u.i + u.x + WEIGHT_BUFFERS * weight)
    else:
        mlp = 2 * u.x + (4 * u.i + u.x) * rows // tokens + _tile_weights(shape, cached)
    workspace = ATTENTION_WORKSPACE_BYTES * tokens * shape.heads * shape.head_dim
    attention = u.x + u.q + u.qkv + max(u.qkv, workspace)
    return common + max(mlp, attention)


def _weight(shape: ModelShape, cached: bool) -> int:
    """The largest dequantized weight; 0 where none is dequantized."""
    if shape.quant != "nf4" or cached:
        return 0
    return shape.compute_bytes * max(o * i for o, i in shape.sizes)


def _tile_weights(shape: ModelShape, cached: bool) -> int:
    """Gate, up and down, held for all tiles of a layer."""
    if shape.quant != "nf4" or cached:
        return 0
    return shape.compute_bytes * shape.held_weights(GROUPS[2:])
