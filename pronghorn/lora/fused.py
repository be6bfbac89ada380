r"""Several LoRA projections of one input, forward and backward by hand, saving the input and ``x A^T`` only.

Forward, for projection p of :math:`x` ``[T, I]``: :math:`y_p = x W_p^T + s_p (x A_p^T) B_p^T`. With
:math:`l_p = x A_p^T` ``[T, r]`` and :math:`g_p = s_p\, dy_p B_p` ``[T, r]``:

.. math:: dx = \sum_p dy_p W_p + g_p A_p, \qquad dA_p = g_p^T x, \qquad dB_p = s_p\, dy_p^T l_p.

W is never trained here. Outputs lie side by side in one ``[T, O]``; the A of all projections are one matrix product,
and so are their gradients. An adapter's term is a product over r numbers for each of O outputs: by itself it would read
and write all of y for almost no arithmetic. So it rides on the base's product: where a weight is made from 4 bits
anyway, it is made with B beside it, and ``[x | x A^T] [W | s B]^T`` is all of y; likewise ``[dy | g] [W; A]`` is all of
dx. Where W is a parameter that lies as it lies, the adapter's term is written first and the base's product adds onto
it; a bias always is. Masters are rounded to the compute dtype, as ``LoraLinear`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from ..kernels.low_rank import low_rank
from .held import HeldWeights
from .projection import Group, Piece, pieces, table, widens

ORDERED_ROWS = 384
"""cuBLAS sums in order, 16 products at a time, from so many rows on: measured on an H200 for the projections of an 8B
Llama, the most demanding of which (14,336 inputs, 4,096 outputs) it splits at 256 rows."""


class Input:
    """A group's input x ``[T, I]`` with room beside it for ``x A^T`` ``[T, R]``, where the group's product takes that.

    Args:
        group: the projections.
        held: their weights, where they are kept.
        x_TI: the input where it lies in a tensor of its own; the product is then the narrow one.
        rows, like: else, make a new one of so many rows, in ``like``'s dtype and on its device.
        ordered: the product is to be an ordered one, so that rows without meaning lie below few ones.
    """

    def __init__(
        self,
        group: Group,
        held: HeldWeights | None = None,
        x_TI: torch.Tensor | None = None,
        rows: int = 0,
        like: torch.Tensor | None = None,
        ordered: bool = False,
    ) -> None:
        self.inputs = group.members[0].base.in_features
        self.wide = x_TI is None and group.rank > 0 and (held is not None or widens(group))
        if x_TI is None:
            assert like is not None
            made = max(rows, ORDERED_ROWS) if ordered and like.is_cuda else rows
            self.all_TK = table(made, self.inputs + (group.rank if self.wide else 0), like.dtype, like.device)
        else:
            self.all_TK = x_TI
        self.table_TK = self.all_TK if x_TI is not None or made == rows else self.all_TK[:rows]

    @property
    def x_TI(self) -> torch.Tensor:
        return self.table_TK[:, : self.inputs]

    def lower(self, group: Group, out_TR: torch.Tensor | None = None, ordered: bool = False) -> torch.Tensor | None:
        """``x A^T`` of all the group's adapters, ``[T, R]``, also written to ``out_TR``; None without adapters.

        ``ordered``: summed so that its bits do not depend on the number of rows.
        """
        if group.a_RI is None:
            return None
        place = self.table_TK[:, self.inputs :] if self.wide else out_TR
        twice = out_TR if self.wide else None
        if ordered:
            low_TR = low_rank(self.x_TI, group.a_RI, place, twice)
            return low_TR if twice is None else twice
        low_TR = torch.mm(self.x_TI, group.a_RI.T, out=place)
        return low_TR if twice is None else twice.copy_(low_TR)

    def padded(self) -> Input:
        """The same with at least :data:`ORDERED_ROWS` rows; those below the input's mean nothing."""
        twin = copy.copy(self)
        twin.table_TK = self.all_TK if self.all_TK.shape[0] >= ORDERED_ROWS else _pad(self.table_TK, ORDERED_ROWS)
        return twin

    def restore(self, low_TR: torch.Tensor | None) -> None:
        """Put an earlier :meth:`lower` of the same x in its place."""
        if self.wide and low_TR is not None:
            self.table_TK[:, self.inputs :].copy_(low_TR)


@torch.no_grad()
def project(
    given: Input,
    group: Group,
    low_TR: torch.Tensor | None,
    held: HeldWeights | None = None,
    spare: bool = False,
    ordered: bool = False,
) -> torch.Tensor:
    """Outputs side by side, in x's dtype: ``[T, O]``, or with ``spare`` ``[T, O + R]``, the last R columns unwritten.

    Args:
        given: the input; :meth:`Input.lower` or :meth:`Input.restore` came before.
        group: the projections.
        low_TR: ``x A^T``; None without adapters.
        held: the group's weights where they stay in memory; None to make them for this product.
        spare: leave room for :func:`input_gradient` to put g beside the gradient that overwrites the outputs.
        ordered: bits that do not depend on the number of rows: few rows are multiplied as :data:`ORDERED_ROWS`.
    """
    T = given.x_TI.shape[0]
    if ordered and given.x_TI.is_cuda and T < ORDERED_ROWS:
        given = given.padded()
        if low_TR is not None and not given.wide:
            low_TR = _pad(low_TR, ORDERED_ROWS)
    x_TI = given.x_TI
    if spare:
        y_TO = table(x_TI.shape[0], group.outputs + group.rank, x_TI.dtype, x_TI.device)
    else:
        y_TO = x_TI.new_empty(x_TI.shape[0], group.outputs)
    # What adds to the base's product is written first, where it can be, and the product adds onto it: then only the sum
    # is rounded at the size of an output.
    adapted, begun = low_TR is not None, _write_biases(y_TO, group)
    first = adapted and not given.wide and (begun or all(b_Or is not None for b_Or in group.bs_Or))
    if first:
        _add_adapters(y_TO, low_TR, group, beta=1.0 if begun else 0.0)
    for piece in _pieces(group, x_TI.dtype, held, given.wide):
        out = y_TO[:, piece.columns]
        left, right = x_TI, piece.weight_OI
        if given.wide and piece.wide_OK is not None:
            left, right = given.table_TK, piece.wide_OK
        if begun or first:
            out.addmm_(left, right.T)
        else:
            torch.mm(left, right.T, out=out)
        del piece, left, right  # before the next is made: two of these are the most that a layer takes
    if adapted and not first and not given.wide:
        _add_adapters(y_TO, low_TR, group, beta=1.0)
    return y_TO[:T]


def _pad(x_TI: torch.Tensor, rows: int) -> torch.Tensor:
    """``x`` with zero rows below it."""
    padded = table(rows, x_TI.shape[1], x_TI.dtype, x_TI.device)
    padded[: x_TI.shape[0]] = x_TI
    padded[x_TI.shape[0] :].zero_()
    return padded


def _write_biases(y_TO: torch.Tensor, group: Group) -> bool:
    """Every projection's bias into its columns, zeros where it has none; False, and nothing, if none has one."""
    if all(p.base.bias is None for p in group.members):
        return False
    for p, columns in zip(group.members, group.columns):
        if p.base.bias is None:
            y_TO[:, columns].zero_()
        else:
            y_TO[:, columns].copy_(p.base.bias)
    return True


def _pieces(group: Group, dtype: torch.dtype, held: HeldWeights | None, wide: bool) -> Iterator[Piece]:
    return pieces(group, dtype, wide) if held is None else iter((held.forward_piece,))


def _product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """``out = factor * left @ right``; what ``out`` held is not read."""
    if factor == 1.0:
        return torch.mm(left, right, out=out)
    return torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def _add_adapters(y_TO: torch.Tensor, low_TR: torch.Tensor | None, group: Group, beta: float) -> None:
    """``y = beta * y + s low B^T`` in the columns of every projection that has an adapter."""
    assert low_TR is not None
    for p, b_Or, span, columns in zip(group.members, group.bs_Or, group.spans, group.columns):
        if b_Or is None:
            continue
        if beta == 0.0:
            _product(y_TO[:, columns], low_TR[:, span], b_Or.T, p.scaling)
        else:
            y_TO[:, columns].addmm_(low_TR[:, span], b_Or.T, alpha=p.scaling)


@torch.no_grad()
def input_gradient(
    dy_TO: torch.Tensor, group: Group, held: HeldWeights | None = None, need_dx: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    r"""``(dx_TI, g_TR)``: the gradient of the common input, and :math:`s\, dy B` of every adapter.

    It needs nothing that forward saved. ``dx_TI`` is None unless ``need_dx``, ``g_TR`` is None without adapters.
    ``dy_TO`` may be R columns wider than the outputs: g is put there, and with held weights one product is all of dx.
    """
    O = group.outputs  # noqa: E741 - a shape letter
    spare = dy_TO.shape[1] > O
    g_TR = dx_TI = None
    if group.a_RI is not None:
        g_TR = dy_TO[:, O:] if spare else dy_TO.new_empty(dy_TO.shape[0], group.rank)
        if held is not None:
            torch.mm(dy_TO[:, :O], held.b_OR, out=g_TR)
        else:
            for p, b_Or, span, columns in zip(group.members, group.bs_Or, group.spans, group.columns):
                if b_Or is not None:
                    _product(g_TR[:, span], dy_TO[:, columns], b_Or, p.scaling)
        if need_dx and held is not None and spare:
            return dy_TO @ held.with_a, g_TR
        if need_dx:
            dx_TI = g_TR @ group.a_RI
    if need_dx:
        for piece in _pieces(group, dy_TO.dtype, held, wide=False):
            share = dy_TO[:, piece.columns]
            dx_TI = share @ piece.weight_OI if dx_TI is None else dx_TI.addmm_(share, piece.weight_OI)
            del piece  # before the next is made
    return dx_TI, g_TR


Gradients = list[torch.Tensor | None]
"""``[dA, dB of each projection]`` in the masters' dtype, None without an adapter."""


@torch.no_grad()
def adapter_gradients(
    dy_TO: torch.Tensor,
    g_TR: torch.Tensor | None,
    x_TI: torch.Tensor,
    low_TR: torch.Tensor | None,
    group: Group,
    onto: Gradients | None = None,
) -> Gradients:
    """Gradients of every A and B, added to those of ``onto`` (other tokens of the same pass) where given.

    ``g_TR`` is from :func:`input_gradient`; ``low_TR`` from :meth:`Input.lower`.
    """
    gradients: Gradients = [None] * (2 * len(group.members))
    if g_TR is None:
        return gradients
    assert low_TR is not None
    da_RI = _outer(g_TR, x_TI)
    for i, (p, span, columns) in enumerate(zip(group.members, group.spans, group.columns)):
        if p.a_rI is None or p.b_Or is None:
            continue
        db_Or = _outer(dy_TO[:, columns], low_TR[:, span])
        if p.scaling != 1.0:
            db_Or.mul_(p.scaling)
        gradients[2 * i] = da_RI[span].to(p.a_rI.dtype)
        gradients[2 * i + 1] = db_Or.to(p.b_Or.dtype)
    return gradients if onto is None else _sum(onto, gradients)


def _sum(onto: Gradients, gradients: Gradients) -> Gradients:
    for total, share in zip(onto, gradients):
        if total is not None and share is not None:
            total.add_(share)
    return onto


def _outer(left_TM: torch.Tensor, right_TN: torch.Tensor) -> torch.Tensor:
    """``left^T @ right``, a sum over tokens, in float32 (float64 for float64): a GPU hands its accumulator out."""
    dtype = torch.promote_types(left_TM.dtype, torch.float32)
    if left_TM.is_cuda and left_TM.dtype != dtype:
        return torch.mm(left_TM.T, right_TN, out_dtype=dtype)
    return (left_TM.T @ right_TN).to(dtype)
