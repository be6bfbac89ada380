"""Merging two partial attentions by their log-sum-exps, and adding rows to rows, in place.

Both parts come rounded to o's dtype; eager PyTorch would take each to float32 and back in a pass of its own, where one
pass reads both and writes one.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pronghorn.kernels.reference import attention_merge as reference


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


def add_rows_(x_THE: torch.Tensor, part_NHE: torch.Tensor, index_N: torch.Tensor) -> None:
    """``x[index[n]] += part[n]``: the sum is made in float32 and rounded once; no index may come twice.

    Args:
        x_THE, part_NHE: of one dtype; made contiguous by whoever made them.
        index_N: int64 rows of x.

    Raises:
        ValueError: shapes or layouts do not fit.
    """
    if part_NHE.shape != (index_N.shape[0], *x_THE.shape[1:]):
        raise ValueError(f"part is {tuple(part_NHE.shape)} for {index_N.shape[0]} rows of {tuple(x_THE.shape)}")
    for name, tensor in (("x", x_THE), ("part", part_NHE)):
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; make it contiguous")
    _path(x_THE).add_rows_(x_THE, part_NHE, index_N)
