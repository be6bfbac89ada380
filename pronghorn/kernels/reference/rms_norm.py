"""RMSNorm (arXiv:1910.07467) in plain PyTorch, with transformers' rounding; derived in ``kernels/rms_norm.py``."""

from __future__ import annotations

import torch


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None = None,
    offset: float = 0.0,
    cast_before_scale: bool = True,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Arguments and result are those of :func:`pronghorn.kernels.rms_norm.rms_norm`; autograd is PyTorch's own."""
    normed_TD, summed_TD, _ = rms_norm_forward(x_TD, weight_D, eps, residual_TD, offset, cast_before_scale)
    return normed_TD if residual_TD is None else (normed_TD, summed_TD)


def rms_norm_forward(
    x_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    residual_TD: torch.Tensor | None,
    offset: float,
    cast_before_scale: bool,
    out_TD: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(normed_TD, summed_TD, rstd_T)``; ``summed_TD`` is ``x_TD`` itself where there is no residual.

    ``normed_TD`` is ``out_TD``, where that is given: rows with any stride.
    """
    summed_TD = x_TD if residual_TD is None else x_TD + residual_TD
    wide_TD = summed_TD.to(_wide(summed_TD.dtype))
    rstd_T1 = torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + eps)
    unit_TD = wide_TD * rstd_T1
    if cast_before_scale:
        unit_TD = unit_TD.to(summed_TD.dtype)
    # Llama multiplies in the input's dtype (T5's way); Gemma adds its 1 to the weight in float32 and casts last.
    plain = cast_before_scale and offset == 0
    scale_D = weight_D if plain else weight_D.to(wide_TD.dtype) + offset
    normed_TD = (scale_D * unit_TD).to(normed_dtype(summed_TD.dtype, weight_D.dtype, cast_before_scale))
    return normed_TD if out_TD is None else out_TD.copy_(normed_TD), summed_TD, rstd_T1.squeeze(-1)


def normed_dtype(x: torch.dtype, weight: torch.dtype, cast_before_scale: bool) -> torch.dtype:
    """Llama's product promotes to the wider of input and weight; Gemma's result is cast to the input's dtype."""
    return torch.promote_types(x, weight) if cast_before_scale else x


def rms_norm_backward(
    dnormed_TD: torch.Tensor,
    dsummed_TD: torch.Tensor | None,
    summed_TD: torch.Tensor,
    weight_D: torch.Tensor,
    rstd_T: torch.Tensor,
    offset: float,
    cast_before_scale: bool,
    weight_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(dx_TD, dweight_D or None)``, computed in float32 (float64 for float64) and rounded once."""
    wide = rstd_T.dtype
    unit_TD = summed_TD.to(wide) * rstd_T.unsqueeze(-1)
    dnormed_wide_TD = dnormed_TD.to(wide)
    dunit_TD = dnormed_wide_TD * (weight_D.to(wide) + offset)
    mean_T1 = (dunit_TD * unit_TD).mean(-1, keepdim=True)
    dx_TD = rstd_T.unsqueeze(-1) * (dunit_TD - unit_TD * mean_T1)
    if dsummed_TD is not None:
        dx_TD = dx_TD + dsummed_TD
    dweight_D = None
    if weight_gradient:
        scaled_TD = unit_TD.to(summed_TD.dtype) if cast_before_scale else unit_TD
        dweight_D = (dnormed_wide_TD * scaled_TD).flatten(0, -2).sum(0).to(weight_D.dtype)
    return dx_TD.to(summed_TD.dtype), dweight_D
