r"""Several LoRA projections of one input, forward and backward by hand, saving the input and ``x A^T`` only.

Forward, for projection p of :math:`x` ``[T, I]``: :math:`y_p = x W_p^T + s_p (x A_p^T) B_p^T`. With
:math:`l_p = x A_p^T` ``[T, r]`` and :math:`g_p = s_p\, dy_p B_p` ``[T, r]``:

.. math:: dx = \sum_p dy_p W_p + g_p A_p, \qquad dA_p = g_p^T x, \qquad dB_p = s_p\, dy_p^T l_p.

W is never trained here. The A of all projections are one matrix product, and so are their gradients; outputs lie side
by side in one ``[T, O]``. The adapter's term is written first and the base's product adds onto it where it is written
anyway, so the adapter costs no pass over the output of its own. Masters are rounded to the compute dtype, as
``LoraLinear`` does.
"""

from __future__ import annotations

import torch

from .projection import Group, Weights, weights


def _product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """``out = factor * left @ right``; what ``out`` held is not read."""
    if factor == 1.0:
        return torch.mm(left, right, out=out)
    return torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


@torch.no_grad()
def lower(x_TI: torch.Tensor, group: Group, out_TR: torch.Tensor | None = None) -> torch.Tensor | None:
    """``x A^T`` of all the group's adapters, ``[T, R]`` (written to ``out_TR`` where given); None without adapters."""
    return None if group.a_RI is None else torch.mm(x_TI, group.a_RI.T, out=out_TR)


@torch.no_grad()
def project(x_TI: torch.Tensor, group: Group, low_TR: torch.Tensor | None, held: Weights | None = None) -> torch.Tensor:
    """Outputs ``y_TO`` side by side, in x's dtype.

    Args:
        x_TI: the common input.
        group: the projections.
        low_TR: :func:`lower` of x; None without adapters.
        held: the group's weights where they stay in memory; None to make them for this product.
    """
    y_TO = x_TI.new_empty(x_TI.shape[0], group.outputs)
    first = low_TR is not None and all(b_Or is not None for b_Or in group.bs_Or)
    if first:
        _add_adapters(y_TO, low_TR, group, beta=0.0)
    for columns, weight_OI in weights(group, x_TI.dtype) if held is None else held:
        out = y_TO[:, columns]
        if first:
            out.addmm_(x_TI, weight_OI.T)
        else:
            torch.mm(x_TI, weight_OI.T, out=out)
    if not first:
        _add_adapters(y_TO, low_TR, group, beta=1.0)
    for p, columns in zip(group.members, group.columns):
        if p.base.bias is not None:
            y_TO[:, columns] += p.base.bias.to(y_TO.dtype)
    return y_TO


def _add_adapters(y_TO: torch.Tensor, low_TR: torch.Tensor | None, group: Group, beta: float) -> None:
    """``y = beta * y + s low B^T`` in the columns of every projection that has an adapter."""
    if low_TR is None:
        return
    for p, b_Or, span, columns in zip(group.members, group.bs_Or, group.spans, group.columns):
        if b_Or is None:
            continue
        if beta == 0.0:
            _product(y_TO[:, columns], low_TR[:, span], b_Or.T, p.scaling)
        else:
            y_TO[:, columns].addmm_(low_TR[:, span], b_Or.T, alpha=p.scaling)


@torch.no_grad()
def input_gradient(
    dy_TO: torch.Tensor, group: Group, held: Weights | None = None, need_dx: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``(dx_TI, g_TR)``: the gradient of the common input, and :math:`s\\, dy B` of every adapter.

    It needs nothing that forward saved. ``dx_TI`` is None unless ``need_dx``, ``g_TR`` is None without adapters.
    """
    T = dy_TO.shape[0]
    g_TR = dx_TI = None
    if group.a_RI is not None:
        g_TR = dy_TO.new_empty(T, group.rank)
        for p, b_Or, span, columns in zip(group.members, group.bs_Or, group.spans, group.columns):
            if b_Or is not None:
                _product(g_TR[:, span], dy_TO[:, columns], b_Or, p.scaling)
        if need_dx:
            dx_TI = g_TR @ group.a_RI
    if need_dx:
        for columns, weight_OI in weights(group, dy_TO.dtype) if held is None else held:
            if dx_TI is None:
                dx_TI = dy_TO[:, columns] @ weight_OI
            else:
                dx_TI.addmm_(dy_TO[:, columns], weight_OI)
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

    ``g_TR`` is from :func:`input_gradient`; ``low_TR`` from :func:`lower`.
    """
    gradients: Gradients = [None] * (2 * len(group.members))
    if g_TR is None or group.a_RI is None:
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


@torch.no_grad()
def project_backward(
    dy_TO: torch.Tensor,
    x_TI: torch.Tensor,
    low_TR: torch.Tensor | None,
    group: Group,
    held: Weights | None = None,
    need_dx: bool = True,
) -> tuple[torch.Tensor | None, Gradients]:
    """:func:`input_gradient` and :func:`adapter_gradients` together: ``(dx_TI, [dA, dB of each projection])``."""
    dx_TI, g_TR = input_gradient(dy_TO, group, held, need_dx)
    return dx_TI, adapter_gradients(dy_TO, g_TR, x_TI, low_TR, group)


def _outer(left_TM: torch.Tensor, right_TN: torch.Tensor) -> torch.Tensor:
    """``left^T @ right``, a sum over tokens, in float32 (float64 for float64): a GPU hands its accumulator out."""
    dtype = torch.promote_types(left_TM.dtype, torch.float32)
    if left_TM.is_cuda and left_TM.dtype != dtype:
        return torch.mm(left_TM.T, right_TN, out_dtype=dtype)
    return (left_TM.T @ right_TN).to(dtype)
