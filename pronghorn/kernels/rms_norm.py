r"""RMSNorm (arXiv:1910.07467), forward and backward, with the residual addition before it in the same pass.

With :math:`r = (\operatorname{mean}(x^2) + \epsilon)^{-1/2}`, :math:`n = r x` and :math:`s = w + \text{offset}`, the
result is :math:`y = s \odot n`. Backward: let :math:`g = s \odot dy`, the gradient of n. From
:math:`\partial r / \partial x_j = -r^3 x_j / D = -r^2 n_j / D`,

.. math:: dx_j = r g_j + \sum_i g_i x_i \, \partial r / \partial x_j = r \, (g_j - n_j \operatorname{mean}(g \odot n)),

:math:`dw = \sum_T dy \odot n`. Where x is itself ``x + residual``, and that sum goes on as the residual stream, its own
gradient is added to dx, and the total is the gradient of both addends. So x (or the sum, which lives on anyway) and one
float32 a row are all that is saved.

``dw`` is summed in two stages, a fixed set of rows per program and then the programs: the same bits in every run.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pronghorn.kernels.reference import rms_norm as reference

MAX_HIDDEN = 16384
"""Largest D: one program holds a whole row in registers."""


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda:
        return reference
    from pronghorn.kernels import rms_norm_triton

    return rms_norm_triton


def _check(x_TD: torch.Tensor, weight_D: torch.Tensor, residual_TD: torch.Tensor | None) -> None:
    D = x_TD.shape[-1]
    if weight_D.shape != (D,) or not weight_D.is_contiguous():
        raise ValueError(
            f"weight has shape {tuple(weight_D.shape)}; x of shape {tuple(x_TD.shape)} needs a dense [{D}]"
        )
    if residual_TD is not None and (residual_TD.shape != x_TD.shape or residual_TD.dtype != x_TD.dtype):
        raise ValueError(
            f"residual is {tuple(residual_TD.shape)} {residual_TD.dtype} and x {tuple(x_TD.shape)} {x_TD.dtype}; "
            "give both one shape and one dtype"
        )
    if x_TD.is_cuda and (D > MAX_HIDDEN or torch.float64 in (x_TD.dtype, weight_D.dtype)):
        raise ValueError(
            f"the RMSNorm kernel takes up to {MAX_HIDDEN} columns of at most 32 bits, not {D} of {x_TD.dtype} with "
            f"a {weight_D.dtype} weight; use pronghorn.kernels.reference.rms_norm"
        )


def _check_out(out_TD: torch.Tensor | None, x_TD: torch.Tensor, weight_D: torch.Tensor) -> None:
    if out_TD is None:
        return
    dtype = reference.normed_dtype(x_TD.dtype, weight_D.dtype, True)
    if x_TD.dim() != 2 or out_TD.shape != x_TD.shape or out_TD.dtype != dtype or out_TD.stride(1) != 1:
        raise ValueError(
            f"out is {tuple(out_TD.shape)} {out_TD.dtype} with strides {out_TD.stride()}; expected "
            f"{tuple(x_TD.shape)} {dtype}, two dimensions, unit stride in the last"
        )


def norm_forward(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out_TD: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(normed_TD, rstd_T)`` without autograd, for a caller that writes its own backward; see :func:`rms_norm`.

    ``normed_TD`` is written to ``out_TD`` where given: the left part of a wider tensor, say.
    """
    _check(x_TD, weight_D, None)
    _check_out(out_TD, x_TD, weight_D)
    normed_TD, _, rstd_T = _path(x_TD).rms_norm_forward(x_TD, weight_D, eps, None, 0.0, True, out_TD)
    return normed_TD, rstd_T


def add_norm_forward(
    x_TD: torch.Tensor,
    residual_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(normed_TD, summed_TD, rstd_T)`` of ``x + residual`` without autograd; see :func:`norm_forward`."""
    _check(x_TD, weight_D, residual_TD)
    _check_out(out_TD, x_TD, weight_D)
    normed_TD, summed_TD, rstd_T = _path(x_TD).rms_norm_forward(x_TD, weight_D, eps, residual_TD, 0.0, True, out_TD)
    return normed_TD, summed_TD, rstd_T


def norm_backward(
    dnormed_TD: torch.Tensor,
    dresidual_TD: torch.Tensor | None,
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
    offset: float = 0.0,
    cast_before_scale: bool = True,
) -> torch.Tensor:
    """Gradient of x: through the norm, plus ``dresidual_TD``, the gradient that x got elsewhere. No weight gradient."""
    dx_TD: torch.Tensor
    dx_TD, _ = _path(x_TD).rms_norm_backward(
        dnormed_TD, dresidual_TD, x_TD, weight_D, rstd_T, offset, cast_before_scale, False
    )
    return dx_TD


class RMSNorm(torch.autograd.Function):
    """Saves x (or the sum), the weight and one float32 a row; gives gradients to x, the residual and the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        weight_D: torch.Tensor,
        residual_TD: torch.Tensor | None,
        eps: float,
        offset: float,
        cast_before_scale: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        normed_TD, summed_TD, rstd_T = _path(x_TD).rms_norm_forward(
            x_TD, weight_D, eps, residual_TD, offset, cast_before_scale
        )
        ctx.save_for_backward(summed_TD, weight_D, rstd_T)
        ctx.offset, ctx.cast_before_scale, ctx.has_residual = offset, cast_before_scale, residual_TD is not None
        ctx.set_materialize_grads(False)
        return normed_TD if residual_TD is None else (normed_TD, summed_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dnormed_TD: torch.Tensor | None, dsummed_TD: torch.Tensor | None = None) -> Any:
        dweight_D = None
        if dnormed_TD is None:  # only the residual stream was used
            dx_TD = dsummed_TD
        else:
            summed_TD, weight_D, rstd_T = ctx.saved_tensors
            dx_TD, dweight_D = _path(summed_TD).rms_norm_backward(
                dnormed_TD, dsummed_TD, summed_TD, weight_D, rstd_T, ctx.offset, ctx.cast_before_scale,
                ctx.needs_input_grad[1],
            )  # fmt: skip
        return dx_TD, dweight_D, dx_TD if ctx.has_residual else None, None, None, None


def rms_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None = None,
    offset: float = 0.0,
    cast_before_scale: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Root-mean-square norm over the last dimension, after adding a residual where one is given.

    The rounding is transformers', so that bfloat16 results are its bits up to the order of the sum: normalise in
    float32; Llama (the default) rounds to the input's dtype and multiplies by the weight there; Gemma
    (``offset=1.0, cast_before_scale=False``) multiplies by ``1 + weight`` in float32 and rounds last. Gradients are
    computed in float32 and rounded once, where eager PyTorch rounds at each step.

    Args:
        x_TD: ``[..., D]``, float32, float16 or bfloat16; rows with any stride.
        weight_D: ``[D]``; its gradient is computed only if it requires one.
        eps: added to the mean of squares.
        residual_TD: same shape and dtype as ``x_TD``; ``x_TD + residual_TD``, rounded to their dtype, is normalised.
        offset: added to the weight.
        cast_before_scale: round the normalised rows to the input's dtype before the multiplication by the weight.

    Returns:
        ``normed_TD``, or ``(normed_TD, new_residual_TD)`` where a residual was given. ``normed_TD`` has the wider dtype
        of input and weight if ``cast_before_scale``, else the input's.

    Raises:
        ValueError: shapes or dtypes do not fit, or D exceeds :data:`MAX_HIDDEN` on a GPU.
    """
    _check(x_TD, weight_D, residual_TD)
    result: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = RMSNorm.apply(
        x_TD, weight_D, residual_TD, eps, offset, cast_before_scale
    )
    return result
