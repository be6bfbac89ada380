"""Decode attention on a GPU: one token a row against the paged cache, through block tables on the device."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from ...kernels.decode_attention import decode_attention, workspace_elements, write_kv
from ...kernels.spans import on_device
from ...kernels.step_attention import step_attention
from .kv_cache import KVCache


class PagedDecode:
    """Decode of one token a row: keys and values are read through block tables that lie on the device.

    On a GPU in 16 bits the bits are those of the trainer's forward (:mod:`pronghorn.kernels.ordered_attention`).
    Nothing here looks at the tensors' contents, so a CUDA graph captured over the calls serves every step for which
    somebody fills them anew. A call of B rows reads their first B rows.

    Args:
        cache: where keys and values are.
        block_table_BN: int32, of up to B rows and N blocks each, with room for the new token; the first columns of a
            wider table do. Where attention is not one launch for many rows, its work grows with
            N * block_size (a program for every 256 tokens, idle or not).
        positions_B: int32, the new token's position in its row; -1 for a row that is padding.
        lengths_B: int32, tokens of each row, the new one included: ``positions_B + 1``.
        query_heads: H, for memory that all calls and layers share; None: each call makes its own.
    """

    def __init__(
        self,
        cache: KVCache,
        block_table_BN: torch.Tensor,
        positions_B: torch.Tensor,
        lengths_B: torch.Tensor,
        query_heads: int | None = None,
    ) -> None:
        self.cache = cache
        self.block_table_BN, self.positions_B, self.lengths_B = block_table_BN, positions_B, lengths_B
        self.workspace: torch.Tensor | None = None
        if query_heads is not None:
            B, N = block_table_BN.shape
            count = workspace_elements(B, N * cache.block_size, query_heads, cache.shape.head_dim)
            self.workspace = torch.empty(count, dtype=torch.float32, device=cache.shape.device)

    @classmethod
    def of(cls, cache: KVCache, tables: Seq[Seq[int]], lengths: Seq[int]) -> PagedDecode:
        """For one step of rows that the host knows: their block tables, and their tokens with the new one."""
        device, width = cache.shape.device, max(len(table) for table in tables)
        padded = torch.tensor([[*table, *[0] * (width - len(table))] for table in tables])
        table_BN = on_device(padded, torch.int32, device)
        lengths_B = on_device(lengths, torch.int32, device)
        return cls(cache, table_BN, lengths_B - 1, lengths_B)

    def __call__(
        self, layer_idx: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store the B new tokens' keys (rotated) and values, then attend: ``[B, H, E]``."""
        B = q_THE.shape[0]
        pages = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        table_BN = self.block_table_BN[:B]
        write_kv(k_TKE, v_TKE, *pages, table_BN, self.positions_B[:B])
        return decode_attention(q_THE, *pages, table_BN, self.lengths_B[:B], scale, self.workspace)

    def rotate_and_attend(
        self,
        layer_idx: int,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        cos_PE: torch.Tensor,
        sin_PE: torch.Tensor,
        scale: float,
        out_BHE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same for q and k as they come from their projections, rotated by tables of angles (in place, or not: they
        are not to be read again); written to ``out_BHE`` where that is given.
        """
        B = q_THE.shape[0]
        pages = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        places = self.block_table_BN[:B], self.positions_B[:B], self.lengths_B[:B]
        rows = q_THE, k_TKE, v_TKE, cos_PE, sin_PE
        return step_attention(*rows, *pages, *places, scale, self.workspace, out_BHE)
