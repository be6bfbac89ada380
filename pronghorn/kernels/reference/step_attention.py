"""A decode step's attention in plain PyTorch: rotation and cache write, then attention."""

from __future__ import annotations

import torch

from pronghorn.kernels.reference.decode_attention import decode_attention
from pronghorn.kernels.reference.rope_kv import rope_and_write_kv


def step_attention(
    q_BHE: torch.Tensor,
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    cos_PE: torch.Tensor,
    sin_PE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_BN: torch.Tensor,
    positions_B: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    workspace: torch.Tensor | None = None,
    out_BHE: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`pronghorn.kernels.step_attention.step_attention`; no workspace is used."""
    q_BHE, k_BKE = q_BHE.clone(), k_BKE.clone()
    caches = k_cache, v_cache
    rope_and_write_kv(q_BHE, k_BKE, v_BKE, cos_PE, sin_PE, *caches, block_table_BN, positions_B)
    return decode_attention(q_BHE, *caches, block_table_BN, lengths_B, scale, None, out_BHE)
