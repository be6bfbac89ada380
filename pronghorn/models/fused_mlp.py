r"""The second half of a decoder layer by hand: norm, gate and up, :math:`\phi(g) u`, down, residual.

Each token's result needs that token alone, so a long sequence goes through in tiles of rows: the widest activations
there are then exist for one tile at a time. A tile's gradients add onto those of the tiles before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..kernels.glu import glu_backward_, glu_forward
from ..kernels.rms_norm import norm_backward, norm_forward
from ..lora.fused import Gradients, Input, adapter_gradients, input_gradient, project
from ..lora.held import HeldWeights
from .parts import Groups, Held, Parts


class Lows:
    """``x A^T`` of a layer's four groups, side by side in one ``[T, R]``: small, and dear to make again."""

    def __init__(self, groups: Groups, table_TR: torch.Tensor) -> None:
        self.table_TR = table_TR
        views: list[torch.Tensor | None] = []
        at = 0
        for group in groups:
            views.append(table_TR[:, at : at + group.rank] if group.rank else None)
            at += group.rank
        self.qkv, self.o, self.gate_up, self.down = views

    @classmethod
    def empty(cls, groups: Groups, like_TD: torch.Tensor) -> Lows:
        return cls(groups, like_TD.new_empty(like_TD.shape[0], sum(group.rank for group in groups)))


@dataclass(frozen=True)
class Middle:
    """h' and its norm, where that was made along with it: ``normed`` and ``rstd_T`` are None in tiles."""

    sum_TD: torch.Tensor
    normed: Input | None = None
    rstd_T: torch.Tensor | None = None


def _tiles(T: int, rows: int | None) -> Iterator[slice]:
    step = T if rows is None else rows
    return (slice(start, min(start + step, T)) for start in range(0, T, max(step, 1)))


def _some(low_TR: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if low_TR is None else low_TR[rows]


def _halves(groups: Groups, gate_up_TI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = groups.gate_up.columns
    return gate_up_TI[:, gate], gate_up_TI[:, up]


def _normed(
    parts: Parts, groups: Groups, held: Held, middle: Middle, rows: slice, ordered: bool = False
) -> tuple[Input, torch.Tensor]:
    if middle.normed is not None and middle.rstd_T is not None:
        return middle.normed, middle.rstd_T
    sum_TD = middle.sum_TD[rows]
    normed = Input(groups.gate_up, held.gate_up, rows=sum_TD.shape[0], like=sum_TD, ordered=ordered)
    _, rstd_T = norm_forward(sum_TD, parts.norm2_D, parts.eps, normed.x_TI)
    return normed, rstd_T


def _held(held: Held, groups: Groups, dtype: torch.dtype, tiles: int) -> Held:
    """With several tiles 4-bit weights are dequantized once for all of them."""
    if tiles == 1 or held.gate_up is not None or any(p.nf4 is None for p in groups.gate_up.members):
        return held
    return held._replace(gate_up=HeldWeights(groups.gate_up, dtype), down=HeldWeights(groups.down, dtype))


def mlp_forward(
    parts: Parts, groups: Groups, held: Held, middle: Middle, lows: Lows | None, rows: int | None, ordered: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``h' + down(act(gate) * up)``, ``[T, D]``; and gate and up side by side where there is one tile, else None.

    Gate and up have R columns to spare behind them, for backward.
    ``lows.gate_up`` and ``lows.down`` are filled in; None where no backward will ask for them.
    """
    T = middle.sum_TD.shape[0]
    tiles = list(_tiles(T, rows))
    held = _held(held, groups, middle.sum_TD.dtype, len(tiles))
    out_TD = torch.empty_like(middle.sum_TD) if len(tiles) > 1 else None
    gate_up_TI = None
    low_gate_up, low_down = (None, None) if lows is None else (lows.gate_up, lows.down)
    for tile in tiles:
        normed, _ = _normed(parts, groups, held, middle, tile, ordered)
        low_TR = normed.lower(groups.gate_up, _some(low_gate_up, tile), ordered)
        gate_up_TI = project(normed, groups.gate_up, low_TR, held.gate_up, spare=True, ordered=ordered)
        del normed
        product = Input(groups.down, held.down, rows=gate_up_TI.shape[0], like=gate_up_TI, ordered=ordered)
        glu_forward(*_halves(groups, gate_up_TI), parts.activation, product.x_TI)
        if out_TD is not None:
            gate_up_TI = None
        low_down_TR = product.lower(groups.down, _some(low_down, tile), ordered)
        down_TD = project(product, groups.down, low_down_TR, held.down, ordered=ordered)
        del product
        if out_TD is None:
            return down_TD.add_(middle.sum_TD), gate_up_TI
        torch.add(down_TD, middle.sum_TD[tile], out=out_TD[tile])
    assert out_TD is not None
    return out_TD, None


def mlp_backward(
    parts: Parts,
    groups: Groups,
    held: Held,
    middle: Middle,
    dout_TD: torch.Tensor,
    lows: Lows,
    gate_up_TI: torch.Tensor | None,
    rows: int | None,
) -> tuple[torch.Tensor, Gradients, Gradients]:
    """Gradient of h', and of the adapters of gate, up and down; overwrites ``gate_up_TI`` where it was kept."""
    T = middle.sum_TD.shape[0]
    tiles = list(_tiles(T, rows if gate_up_TI is None else None))
    held = _held(held, groups, dout_TD.dtype, len(tiles))
    dmiddle_TD = torch.empty_like(dout_TD) if len(tiles) > 1 else None
    d_gate_up: Gradients | None = None
    d_down: Gradients | None = None
    for tile in tiles:
        normed, rstd_T = _normed(parts, groups, held, middle, tile)
        low_TR, low_down_TR, dtile_TD = _some(lows.gate_up, tile), _some(lows.down, tile), dout_TD[tile]
        both_TI = gate_up_TI
        if both_TI is None:
            normed.restore(low_TR)
            both_TI = project(normed, groups.gate_up, low_TR, held.gate_up, spare=True)
        dproduct_TI, g_down = input_gradient(dtile_TD, groups.down, held.down)
        assert dproduct_TI is not None
        product_TI = glu_backward_(
            dproduct_TI, *_halves(groups, both_TI), want_h=True, activation=parts.activation, over_dh=True
        )
        assert product_TI is not None
        del dproduct_TI
        d_down = adapter_gradients(dtile_TD, g_down, product_TI, low_down_TR, groups.down, d_down)
        del product_TI
        dnormed_TD, g_gate_up = input_gradient(both_TI, groups.gate_up, held.gate_up)
        assert dnormed_TD is not None
        d_gate_up = adapter_gradients(both_TI, g_gate_up, normed.x_TI, low_TR, groups.gate_up, d_gate_up)
        del both_TI
        dx_TD = norm_backward(dnormed_TD, dtile_TD, middle.sum_TD[tile], parts.norm2_D, rstd_T)
        if dmiddle_TD is None:
            dmiddle_TD = dx_TD
        else:
            dmiddle_TD[tile] = dx_TD
    assert dmiddle_TD is not None and d_gate_up is not None and d_down is not None
    return dmiddle_TD, d_gate_up, d_down
