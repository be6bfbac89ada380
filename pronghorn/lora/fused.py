r"""Several LoRA projections of one input, forward and backward by hand, saving the input and ``x A^T`` only.

Forward, for projection p of :math:`x` ``[T, I]``: :math:`y_p = x W_p^T + s_p (x A_p^T) B_p^T`. With
:math:`l_p = x A_p^T` ``[T, r]`` and :math:`g_p = s_p\, dy_p B_p` ``[T, r]``:

.. math:: dx = \sum_p dy_p W_p + g_p A_p, \qquad dA_p = g_p^T x, \qquad dB_p = s_p\, dy_p^T l_p.

W is never trained here and its dequantized copy never outlives the product that reads it. The A of all projections are
one matrix product, and so are their gradients. Masters are rounded to the compute dtype, as ``LoraLinear`` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .projection import Group


@torch.no_grad()
def project(x_TI: torch.Tensor, group: Group) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """``([y_TO for each projection], low_TR)`` in x's dtype; ``low_TR`` is ``x A^T`` of all, None without adapters."""
    low_TR = None if group.a_RI is None else x_TI @ group.a_RI.T
    outputs = []
    for p, b_Or, span in zip(group.members, group.bs_Or, group.spans):
        bias = None if p.base.bias is None else p.base.bias.to(x_TI.dtype)
        y_TO = F.linear(x_TI, p.weight(x_TI.dtype), bias)
        if b_Or is not None and low_TR is not None:
            y_TO.addmm_(low_TR[:, span], b_Or.T, alpha=p.scaling)
        outputs.append(y_TO)
    return outputs, low_TR


@torch.no_grad()
def input_gradient(
    dys_TO: Sequence[torch.Tensor], group: Group, need_dx: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """``(dx_TI, g_TR)``: the gradient of the common input, and :math:`s\\, dy B` of every adapter.

    It needs nothing that forward saved. ``dx_TI`` is None unless ``need_dx``, ``g_TR`` is None without adapters.
    """
    g_TR = dys_TO[0].new_empty(dys_TO[0].shape[0], group.rank) if group.a_RI is not None else None
    dx_TI = None
    for p, b_Or, span, dy_TO in zip(group.members, group.bs_Or, group.spans, dys_TO):
        if b_Or is not None and g_TR is not None:
            torch.mm(dy_TO, b_Or * p.scaling, out=g_TR[:, span])
        if need_dx:
            weight_OI = p.weight(dy_TO.dtype)
            dx_TI = dy_TO @ weight_OI if dx_TI is None else dx_TI.addmm_(dy_TO, weight_OI)
    if dx_TI is not None and g_TR is not None and group.a_RI is not None:
        dx_TI.addmm_(g_TR, group.a_RI)
    return dx_TI, g_TR


@torch.no_grad()
def adapter_gradients(
    dys_TO: Sequence[torch.Tensor],
    g_TR: torch.Tensor | None,
    x_TI: torch.Tensor,
    low_TR: torch.Tensor | None,
    group: Group,
) -> list[torch.Tensor | None]:
    """``[dA, dB of each projection]`` in the masters' dtype, None without an adapter.

    ``g_TR`` is from :func:`input_gradient`; ``low_TR`` is forward's, or None to make ``x A^T`` again.
    """
    gradients: list[torch.Tensor | None] = [None] * (2 * len(group.members))
    if g_TR is None or group.a_RI is None:
        return gradients
    if low_TR is None:
        low_TR = x_TI @ group.a_RI.T
    da_RI = _outer(g_TR, x_TI)
    for i, (p, span, dy_TO) in enumerate(zip(group.members, group.spans, dys_TO)):
        if p.a_rI is not None and p.b_Or is not None:
            gradients[2 * i] = da_RI[span].to(p.a_rI.dtype)
            gradients[2 * i + 1] = _outer(dy_TO, low_TR[:, span]).mul_(p.scaling).to(p.b_Or.dtype)
    return gradients


def project_backward(
    dys_TO: Sequence[torch.Tensor],
    x_TI: torch.Tensor,
    low_TR: torch.Tensor | None,
    group: Group,
    need_dx: bool = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
    """:func:`input_gradient` and :func:`adapter_gradients` together: ``(dx_TI, [dA, dB of each projection])``."""
    dx_TI, g_TR = input_gradient(dys_TO, group, need_dx)
    return dx_TI, adapter_gradients(dys_TO, g_TR, x_TI, low_TR, group)


def _outer(left_TM: torch.Tensor, right_TN: torch.Tensor) -> torch.Tensor:
    """``left^T @ right``, a sum over tokens, in float32 (float64 for float64): a GPU hands its accumulator out."""
    dtype = torch.promote_types(left_TM.dtype, torch.float32)
    if left_TM.is_cuda and left_TM.dtype != dtype:
        return torch.mm(left_TM.T, right_TN, out_dtype=dtype)
    return (left_TM.T @ right_TN).to(dtype)
