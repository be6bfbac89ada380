"""Rotary position embedding over packed tokens, in transformers' half-split layout (RoFormer, arXiv:2104.09864)."""

from __future__ import annotations

import torch


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    """``[..., E]`` to ``[-x2, x1]`` of its halves."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rope(
    q_THE: torch.Tensor, k_TKE: torch.Tensor, rope_TE: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries ``[T, H, E]`` and keys ``[T, K, E]`` by cos and sin ``[T, E]``, in their own dtype."""
    cos_T1E, sin_T1E = rope_TE[0].unsqueeze(1), rope_TE[1].unsqueeze(1)
    return (
        q_THE * cos_T1E + _rotate_half(q_THE) * sin_T1E,
        k_TKE * cos_T1E + _rotate_half(k_TKE) * sin_T1E,
    )
