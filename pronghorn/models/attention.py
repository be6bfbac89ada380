"""The attention core that a block calls, and the one that training uses: causal within each packed row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F


class Attention(Protocol):
    """What a decoder block asks for: ``attention(layer_idx, q_THE, k_TKE, v_TKE, scale) -> o_THE``.

    H query heads share K key/value heads (H divisible by K). The implementation decides which tokens see which, and
    whether keys and values are kept.
    """

    def __call__(
        self, layer_idx: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> torch.Tensor: ...


class PackedAttention:
    """Causal attention over rows that lie one after another without padding; no row sees another.

    Rows are spread to ``[B, S]`` with the padding on the right, where a causal mask alone keeps every real token from
    seeing it, so no mask tensor is needed and every SDPA backend applies. Rows of equal length need no spreading.

    Args:
        row_lengths: tokens of each row, in order; their sum is T.
        device: where the tokens are.
    """

    def __init__(self, row_lengths: Sequence[int], device: torch.device | str) -> None:
        self.row_lengths = [int(n) for n in row_lengths]
        self.rows = len(self.row_lengths)
        self.longest = max(self.row_lengths)
        self.tokens = sum(self.row_lengths)
        self.slots: torch.Tensor | None = None
        if self.tokens != self.rows * self.longest:
            slots = [
                torch.arange(n) + row * self.longest for row, n in enumerate(self.row_lengths)
            ]  # token t lives in slot slots[t] of the padded [B * S]
            self.slots = torch.cat(slots).to(device, non_blocking=True)

    def _spread(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, H, E]`` to ``[B, H, S, E]``."""
        heads, dim = x.shape[1:]
        if self.slots is not None:
            x = x.new_zeros(self.rows * self.longest, heads, dim).index_copy(0, self.slots, x)
        return x.view(self.rows, self.longest, heads, dim).transpose(1, 2)

    def __call__(
        self, layer_idx: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend within each row; see :class:`Attention`."""
        o_BHSE = F.scaled_dot_product_attention(
            self._spread(q_THE),
            self._spread(k_TKE),
            self._spread(v_TKE),
            is_causal=True,
            scale=scale,
            enable_gqa=q_THE.shape[1] != k_TKE.shape[1],
        )
        o_SHE = o_BHSE.transpose(1, 2).reshape(self.rows * self.longest, *q_THE.shape[1:])
        return o_SHE if self.slots is None else o_SHE.index_select(0, self.slots)
