"""Rotation and cache write of one token a row in plain PyTorch: the two operations one after the other."""

from __future__ import annotations

import torch

from pronghorn.kernels.reference.decode_attention import within, write_kv
from pronghorn.kernels.reference.rope import rope


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
    """See :func:`pronghorn.kernels.rope_kv.rope_and_write_kv`."""
    room = k_cache.shape[1] * places.shape[1] if places.ndim == 2 else cos_PE.shape[0]
    within("position", positions_B, min(room, cos_PE.shape[0]))
    with torch.no_grad():
        rows = (positions_B >= 0).nonzero().squeeze(1)
        turned = rope(q_BHE[rows], k_BKE[rows], cos_PE, sin_PE, positions_B[rows].long())
        for x, new in zip((q_BHE, k_BKE), turned):
            x[rows] = new
        if places.ndim == 2:
            write_kv(k_BKE, v_BKE, k_cache, v_cache, places, positions_B)
            return
        slots = places[rows].long()
        k_cache.flatten(0, 1).index_copy_(0, slots, k_BKE[rows])
        v_cache.flatten(0, 1).index_copy_(0, slots, v_BKE[rows])
