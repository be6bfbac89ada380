r"""Rotary position embedding (arXiv:2104.09864), in place, queries and keys together in one launch.

Layout: transformers' half split. With :math:`\theta` the token's angles and R rotary dimensions, the pair
:math:`(x_i, x_{i+R/2})` becomes

.. math:: x_i \cos\theta_i - x_{i+R/2} \sin\theta_i, \qquad x_{i+R/2} \cos\theta_i + x_i \sin\theta_i,

dimensions R and up stay. That is linear with an orthogonal matrix (times the scale that YaRN puts into cos and sin), so
its backward is its transpose: the rotation by :math:`-\theta`, times the same scale. Only cos and sin are saved.

Arithmetic is in float32 with one rounding at the store. transformers' eager code rounds each product and the sum in
bfloat16, so the results here differ from its results by its rounding error, and are the more exact ones.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from pronghorn.kernels.reference import rope as reference


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda:
        return reference
    from pronghorn.kernels import rope_triton

    return rope_triton


def _check(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    positions_T: torch.Tensor | None,
) -> None:
    T, R = q_THE.shape[0], cos_TE.shape[-1]
    for name, x in (("q", q_THE), ("k", k_TKE)):
        if x.dim() != 3 or x.shape[0] != T or x.shape[2] < R or x.stride(2) != 1 or x.dtype != q_THE.dtype:
            raise ValueError(
                f"{name} is {tuple(x.shape)} {x.dtype} with strides {x.stride()}; expected [{T}, heads, >= {R}] "
                f"in {q_THE.dtype} with unit stride in the last dimension"
            )
    rows = cos_TE.shape[0] if positions_T is not None else T
    if cos_TE.shape != (rows, R) or sin_TE.shape != cos_TE.shape or R % 2 or R == 0:
        raise ValueError(
            f"cos is {tuple(cos_TE.shape)} and sin {tuple(sin_TE.shape)}; give both one row a token ({T}), or a table "
            "and positions, over an even number of rotary dimensions"
        )
    if cos_TE.stride(1) != 1 or sin_TE.stride(1) != 1:
        raise ValueError("cos and sin need unit stride in the last dimension; give them .contiguous()")
    if positions_T is not None and (positions_T.shape != (T,) or positions_T.is_floating_point()):
        raise ValueError(f"positions is {tuple(positions_T.shape)} {positions_T.dtype}; expected [{T}] integers")
    if q_THE.dtype == torch.float64 and q_THE.is_cuda:
        raise ValueError(
            "q is float64 on a GPU, whose kernel computes in float32; use pronghorn.kernels.reference.rope"
        )


def rotate_(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    positions_T: torch.Tensor | None = None,
    transpose: bool = False,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Rotate q and k in place, or into ``out``, outside autograd: for inference and for hand-written backward passes.

    Args:
        q_THE: ``[T, H, E]``, float32, float16 or bfloat16; tokens and heads with any stride, so a view of a packed
            QKV tensor too.
        k_TKE: ``[T, K, E]``, same dtype.
        cos_TE: ``[T, R]``, one row a token, R <= E rotary dimensions whose two halves are equal (as transformers makes
            them; the first is read), any float dtype. With ``positions_T``: a table ``[P, R]``.
        sin_TE: same shape.
        positions_T: integer ``[T]``, each token's row of the tables, gathered in the kernel. Must lie in [0, P): a GPU
            does not check.
        transpose: rotate by the negative angle, which turns the result's gradient into the input's.
        out: where the rotated q and k go, q and k staying as they are; needs R = E, as nothing else is copied.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    _check(q_THE, k_TKE, cos_TE, sin_TE, positions_T)
    if out is not None:
        _check(*out, cos_TE, sin_TE, positions_T)
        if out[0].shape != q_THE.shape or out[1].shape != k_TKE.shape or cos_TE.shape[1] != q_THE.shape[2]:
            raise ValueError(
                f"out is {tuple(out[0].shape)} and {tuple(out[1].shape)} for q {tuple(q_THE.shape)}, k "
                f"{tuple(k_TKE.shape)} and {cos_TE.shape[1]} rotary dimensions; give q's and k's shapes, all rotary"
            )
    _path(q_THE).rotate_(q_THE, k_TKE, cos_TE, sin_TE, positions_T, transpose, out)


class Layout(NamedTuple):
    """Where q and k lie in the tensors that are rotated: two of them, or one packed QKV with ``heads`` set."""

    head_dim: int
    heads: tuple[int, int] | None = None

    def split(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Views ``[T, H, E]`` and ``[T, K, E]``."""
        views = [t if t.dim() == 3 else t.view(t.shape[0], -1, self.head_dim) for t in tensors]
        if self.heads is None:
            return views[0], views[1]
        H, K = self.heads
        return views[0][:, :H], views[0][:, H : H + K]


class Rope(torch.autograd.Function):
    """Rotates its tensors in place and marks them so; saves cos, sin and positions, nothing of q or k."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        cos_TE: torch.Tensor,
        sin_TE: torch.Tensor,
        positions_T: torch.Tensor | None,
        gradient_in_place: bool,
        *tensors: torch.Tensor,
    ) -> Any:
        rotate_(*layout.split(tensors), cos_TE, sin_TE, positions_T)
        ctx.mark_dirty(*tensors)
        ctx.save_for_backward(cos_TE, sin_TE, positions_T)
        ctx.layout, ctx.gradient_in_place = layout, gradient_in_place
        return tensors if len(tensors) > 1 else tensors[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        dtensors = tuple(
            g if ctx.gradient_in_place and g.is_contiguous() else g.clone(memory_format=torch.contiguous_format)
            for g in gradients
        )
        cos_TE, sin_TE, positions_T = ctx.saved_tensors
        q_THE, k_TKE = ctx.layout.split(dtensors)
        rotate_(q_THE, k_TKE, cos_TE, sin_TE, positions_T, transpose=True)
        return None, None, None, None, None, *dtensors


def rope_(
    q: torch.Tensor,
    k: torch.Tensor,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    positions_T: torch.Tensor | None = None,
    head_dim: int | None = None,
    gradient_in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate q and k in place, with gradient. Tables and positions as in :func:`rotate_`.

    Args:
        q: ``[T, H, E]``, or a linear layer's output ``[T, H * E]`` with ``head_dim``. Under autograd it may be no view:
            autograd cannot rebase two views that one function writes to.
        k: ``[T, K, E]`` or ``[T, K * E]``.
        cos_TE: one row a token, or a table with ``positions_T``.
        sin_TE: as ``cos_TE``.
        positions_T: rows of the table.
        head_dim: E; needed for two-dimensional q and k.
        gradient_in_place: backward rotates the gradients that it is handed, without a copy. Right only where nobody
            else holds them, as where they come fresh from the attention's backward; autograd gives no way to know.

    Returns:
        q and k, the same tensors.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or a view needs gradient.
    """
    if head_dim is None:
        if q.dim() != 3 or k.dim() != 3:
            raise ValueError(
                f"head_dim=None with q {tuple(q.shape)} and k {tuple(k.shape)}; two-dimensional ones need it"
            )
        head_dim = q.shape[-1]
    layout = Layout(head_dim)
    if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)):
        rotate_(*layout.split((q, k)), cos_TE, sin_TE, positions_T)
        return q, k
    if q._is_view() or k._is_view():
        raise ValueError(
            "q or k is a view that needs gradient; give the linear layer's own output [T, heads * E] with head_dim=, "
            "or rotate a packed QKV tensor with rope_packed_"
        )
    rotated: tuple[torch.Tensor, torch.Tensor] = Rope.apply(
        layout, cos_TE, sin_TE, positions_T, gradient_in_place, q, k
    )
    return rotated


def rope_packed_(
    qkv: torch.Tensor,
    q_heads: int,
    k_heads: int,
    cos_TE: torch.Tensor,
    sin_TE: torch.Tensor,
    positions_T: torch.Tensor | None = None,
    head_dim: int | None = None,
    gradient_in_place: bool = False,
) -> torch.Tensor:
    """Rotate the q and k heads of one packed tensor in place, with gradient; what follows them (v) stays.

    Args:
        qkv: ``[T, F, E]`` with heads in the order q, k, rest, or ``[T, F * E]`` with ``head_dim``.
        q_heads: H.
        k_heads: K.
        cos_TE: as in :func:`rope_`, like all arguments after it.
        sin_TE: see there.
        positions_T: see there.
        head_dim: see there.
        gradient_in_place: see there.

    Returns:
        qkv, the same tensor.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    if head_dim is None:
        if qkv.dim() != 3:
            raise ValueError(f"head_dim=None with qkv {tuple(qkv.shape)}; a two-dimensional one needs it")
        head_dim = qkv.shape[-1]
    layout = Layout(head_dim, (q_heads, k_heads))
    q_THE, k_TKE = layout.split((qkv,))
    if (q_THE.shape[1], k_TKE.shape[1]) != (q_heads, k_heads):
        raise ValueError(f"qkv {tuple(qkv.shape)} of head_dim {head_dim} holds no {q_heads} q and {k_heads} k heads")
    if not (torch.is_grad_enabled() and qkv.requires_grad):
        rotate_(q_THE, k_TKE, cos_TE, sin_TE, positions_T)
        return qkv
    rotated: torch.Tensor = Rope.apply(layout, cos_TE, sin_TE, positions_T, gradient_in_place, qkv)
    return rotated
