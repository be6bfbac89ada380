"""Rotary position embedding (arXiv:2104.09864) in plain PyTorch. ``kernels/rope.py`` has the formulas."""

from __future__ import annotations

import torch


def rope(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    positions_T: torch.Tensor | None = None,
    transpose: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated copies of q and k, computed in float32 (float64 for float64) and rounded once; autograd is PyTorch's."""
    if positions_T is not None:
        cos_TE, sin_TE = cos_TE[positions_T], sin_TE[positions_T]
    if transpose:
        sin_TE = -sin_TE
    return _rotated(q_THE, cos_TE, sin_TE), _rotated(k_TKE, cos_TE, sin_TE)


def _rotated(x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(x_THE.dtype, torch.float32)
    half = cos_TE.shape[-1] // 2
    cos, sin = (table[:, None, :half].to(wide) for table in (cos_TE, sin_TE))
    first, second = x_THE[..., :half].to(wide), x_THE[..., half : 2 * half].to(wide)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_THE.dtype)
    return torch.cat((turned, x_THE[..., 2 * half :]), dim=-1)


def rotate_(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    positions_T: torch.Tensor | None,
    transpose: bool,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """:func:`rope` written over q and k, or to ``out``, outside autograd."""
    with torch.no_grad():
        targets = (q_THE, k_TKE) if out is None else out
        for x_THE, rotated_THE in zip(targets, rope(q_THE, k_TKE, cos_TE, sin_TE, positions_T, transpose)):
            x_THE.copy_(rotated_THE)
