"""Merging two partial attentions by their log-sum-exps, adding rows to rows, and adding up copies of rows.

Both parts come rounded to o's dtype; eager PyTorch would take each to float32 and back in a pass of its own, where one
pass reads both and writes one.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pronghorn.kernels.reference import attention_merge as reference
from pronghorn.kernels.reference.attention_merge import Copies, Sum

__all__ = ["Copies", "Sum", "add_rows_", "merge_", "sum_copies"]


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return reference
    from pronghorn.kernels import attention_merge_triton

    return attention_merge_triton


def merge_(
    o_THE: torch.Tensor, lse_HT: torch.Tensor, part_NHE: torch.Tensor, lse_HN: torch.Tensor, index_N: torch.Tensor
) -> None:
    """Merge attention over other keys into rows of o and lse; :mod:`pronghorn.kernels.shared_prefix` has the formula.

    Args:
        o_THE: contiguous, float32, float16 or bfloat16 (float64 in plain PyTorch); rows ``index_N`` are overwritten.
        lse_HT: contiguous float32 (float64 with float64) log-sum-exps in nats, finite; overwritten likewise.
        part_NHE: o over the other keys, in o's shape and dtype for these N rows, contiguous.
        lse_HN: its log-sum-exps, contiguous; -inf where a query saw no key.
        index_N: int64 rows of o, none twice.

    Raises:
        ValueError: shapes or layouts do not fit.
    """
    (T, H, E), N = o_THE.shape, index_N.shape[0]
    wanted = {"lse": (lse_HT, (H, T)), "part": (part_NHE, (N, H, E)), "part's lse": (lse_HN, (H, N))}
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} is {tuple(tensor.shape)} where o is {(T, H, E)} and {N} rows merge; give {shape}")
    for name, tensor in (("o", o_THE), *((name, tensor) for name, (tensor, _) in wanted.items())):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous")
    _path(o_THE).merge_(o_THE, lse_HT, part_NHE, lse_HN, index_N)


def add_rows_(*sums: Sum) -> None:
    """``x[index[n]] += part[n]`` for each ``(x, part, index)``, by one launch, in float32 and rounded once.

    Args:
        sums: one to three. x ``[T, H, E]`` and part ``[N, H, E]`` of one dtype, the same in all; made contiguous by
            whoever made them. index: int64 rows of x; none may come twice.

    Raises:
        ValueError: shapes or layouts do not fit, or there are more sums.
    """
    if not 1 <= len(sums) <= 3:
        raise ValueError(f"{len(sums)} sums; give one to three")
    for x_THE, part_NHE, index_N in sums:
        if part_NHE.shape != (index_N.shape[0], *x_THE.shape[1:]):
            raise ValueError(f"part is {tuple(part_NHE.shape)} for {index_N.shape[0]} rows of {tuple(x_THE.shape)}")
        for name, tensor in (("x", x_THE), ("part", part_NHE)):
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous")
    _path(sums[0][0]).add_rows_(sums)


def sum_copies(dk_UKE: torch.Tensor, dv_UKE: torch.Tensor, copies: Copies) -> tuple[torch.Tensor, torch.Tensor]:
    """``(dk_TKE, dv_TKE)``: of each token the sum over its copies, in their order, in float32 and rounded once.

    Args:
        dk_UKE, dv_UKE: of one shape and dtype; made contiguous by whoever made them.
        copies: which token each of the U rows is a copy of.

    Raises:
        ValueError: shapes or layouts do not fit.
    """
    if dk_UKE.shape != dv_UKE.shape or dk_UKE.dtype != dv_UKE.dtype or len(dk_UKE) != len(copies.tokens_U):
        raise ValueError(
            f"dk is {tuple(dk_UKE.shape)}, dv {tuple(dv_UKE.shape)} for {len(copies.tokens_U)} copies; give each a row"
        )
    if not (dk_UKE.is_contiguous() and dv_UKE.is_contiguous()):
        raise ValueError(f"dk and dv have strides {dk_UKE.stride()} and {dv_UKE.stride()}; make them contiguous")
    found: tuple[torch.Tensor, torch.Tensor] = _path(dk_UKE).sum_copies(dk_UKE, dv_UKE, copies)
    return found
