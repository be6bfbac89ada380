"""Rotary embedding of one token a row, and the write of its keys and values into a paged cache, in one launch.

What :func:`pronghorn.kernels.rope.rotate_` and :func:`pronghorn.kernels.decode_attention.write_kv` do one after the
other, to the bit: the rotation's arithmetic is the same helper. A decode step is hundreds of small launches, and here
one takes the place of three (gathering cos and sin by position is the third).
"""

from __future__ import annotations

from types import ModuleType

import torch

from pronghorn.kernels.decode_attention import check_cache, check_counts
from pronghorn.kernels.reference import rope_kv as reference


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return reference
    from pronghorn.kernels import rope_kv_triton

    return rope_kv_triton


def rope_and_write_kv(
    q_BHE: torch.Tensor,
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    cos_PE: torch.Tensor,
    sin_PE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    places: torch.Tensor,
    positions_B: torch.Tensor,
) -> None:
    """Rotate q and k in place and store k and v at their row's position in the blocks of its table, or in its slot.

    Args:
        q_BHE, k_BKE, v_BKE: float32, float16 or bfloat16 (float64 in plain PyTorch), of the caches' dtype, heads dense,
            rows at any stride: views of one projection's output. H divisible by K.
        cos_PE, sin_PE: tables ``[P, R]`` of any float dtype, one row a position, R <= E rotary dimensions whose two
            halves are equal, as in :func:`pronghorn.kernels.rope.rotate_`.
        k_cache, v_cache: see :func:`pronghorn.kernels.decode_attention.decode_attention`.
        places: that function's ``block_table_BN``; or int32 ``[B]``, each row's slot among all the blocks' tokens.
        positions_B: int32, from 0; a row of position -1 (padding) is left as it is. A position beyond the table of
            blocks or of angles is a caller's error: a GPU leaves the row as it is, a CPU raises.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit; or, on a CPU, a position beyond a table.
    """
    check_rows(q_BHE, k_BKE, v_BKE, cos_PE, sin_PE, k_cache, v_cache, places, positions_B)
    _path(k_cache).rope_and_write_kv(q_BHE, k_BKE, v_BKE, cos_PE, sin_PE, k_cache, v_cache, places, positions_B)


def check_rows(
    q_BHE: torch.Tensor,
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    cos_PE: torch.Tensor,
    sin_PE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    places: torch.Tensor,
    positions_B: torch.Tensor,
) -> None:
    """Raise where one token a row, the angles, the caches and where it belongs in them do not fit together."""
    B, H, E = q_BHE.shape
    K = k_cache.shape[2]
    if k_BKE.shape != (B, K, E) or v_BKE.shape != k_BKE.shape or H % K:
        raise ValueError(
            f"k is {tuple(k_BKE.shape)} and v {tuple(v_BKE.shape)} for q {(B, H, E)} and a cache of {K} heads; "
            f"give both as [{B}, {K}, {E}], with {K} a divisor of q's heads"
        )
    for name, x in (("q", q_BHE), ("k", k_BKE), ("v", v_BKE)):
        check_cache(x, name, k_cache, v_cache, places if places.ndim == 2 else None)
    if places.ndim == 1:
        check_counts("slots", places, B)
    R = cos_PE.shape[-1]
    if cos_PE.ndim != 2 or sin_PE.shape != cos_PE.shape or R % 2 or not 0 < R <= E:
        raise ValueError(
            f"cos is {tuple(cos_PE.shape)} and sin {tuple(sin_PE.shape)}; give both as tables [positions, R] with R "
            f"even and at most {E}"
        )
    if cos_PE.stride(1) != 1 or sin_PE.stride(1) != 1:
        raise ValueError("cos and sin need unit stride in the last dimension; give them .contiguous()")
    check_counts("positions", positions_B, B)
