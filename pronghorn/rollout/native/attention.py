"""Attention of packed prefill chunks over the paged cache.

It implements ``models.attention.Attention``: the model's blocks call it with the keys and values of the step, which it
stores in the cache before it attends. The index tensors are made once a step and shared by all layers. On a GPU in 16
bits the bits are those of the trainer's forward (:mod:`pronghorn.kernels.ordered_attention`).
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
import torch.nn.functional as F

from ...kernels.ordered_attention import ordered_attention_forward
from ...kernels.ordered_rows import OrderedRows
from ...kernels.rope import rotate_
from ...kernels.rope_kv import rope_and_write_kv
from ...kernels.spans import on_device
from ...models.attention import PackedAttention, in_order
from .kv_cache import KVCache
from .scheduler import Chunk


def slots_of(table: Seq[int], start: int, stop: int, block_size: int) -> torch.Tensor:
    """int64 cache slots, on the host, of positions ``start`` to ``stop`` of the sequence with this block table."""
    blocks = torch.tensor(table[: -(-stop // block_size)], dtype=torch.int64)
    return (blocks.unsqueeze(1) * block_size + torch.arange(block_size)).flatten()[start:stop]


def padded_slots(tables: Seq[Seq[int]], block_size: int, device: torch.device) -> torch.Tensor:
    """Slots ``[B, S]`` of every position of B tables, S the longest's; short tables repeat their first block."""
    longest = max(len(table) for table in tables)
    blocks = torch.tensor([[*table, *[table[0]] * (longest - len(table))] for table in tables], dtype=torch.int64)
    slots_BNs = blocks.unsqueeze(-1) * block_size + torch.arange(block_size)
    return on_device(slots_BNs.flatten(1), torch.int64, device)


class PrefillAttention:
    """Causal attention of packed chunks, each over its own sequence from position 0.

    On a GPU in 16 bits keys and values are read where they lie in the cache, which by then holds those of this step as
    well. Elsewhere chunks that all begin at position 0 need nothing from the cache and run as training rows do, and
    others have their keys and values gathered.
    """

    def __init__(self, cache: KVCache, chunks: Seq[Chunk]) -> None:
        self.cache = cache
        size, shape = cache.block_size, cache.shape
        device = shape.device
        slots = [slots_of(c.sequence.table, 0, c.stop, size) for c in chunks]
        own = torch.cat([row[c.start :] for c, row in zip(chunks, slots)])
        self.slots_T = on_device(own, torch.int64, device)
        lengths = [c.stop - c.start for c in chunks]
        positions = torch.cat([torch.arange(c.start, c.stop) for c in chunks])
        self.positions_T = on_device(positions, torch.int32, device)
        self._places_T: torch.Tensor | None = None  # the slots in 32 bits, where a kernel writes to them
        self.ordered: OrderedRows | None = None
        if in_order(device, shape.dtype, shape.head_dim):
            self.ordered = OrderedRows.gathered(lengths, slots, device)
            return
        self.packed = PackedAttention(lengths, device)
        self.from_start = all(c.start == 0 for c in chunks)
        if self.from_start:
            return
        self.rows, self.longest = len(chunks), max(lengths)
        tables = [c.sequence.table[: -(-c.stop // size)] for c in chunks]
        self.slots_BS = padded_slots(tables, size, device)
        rows = torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)])
        columns = torch.cat([torch.arange(n) for n in lengths])
        self.spread_T = on_device(rows * self.longest + columns, torch.int64, device)
        starts_B1 = torch.tensor([[c.start] for c in chunks])
        query_positions_BQ = starts_B1 + torch.arange(self.longest)
        # Padded queries see whatever lies before their position: finite, and dropped afterwards.
        mask_BQS = torch.arange(self.slots_BS.shape[1]) <= query_positions_BQ.unsqueeze(-1)
        self.mask_B1QS = on_device(mask_BQS.unsqueeze(1), torch.bool, device)

    def __call__(
        self, layer_idx: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store this step's keys and values, then attend: ``[T, H, E]``."""
        self.cache.write(layer_idx, self.slots_T, k_TKE, v_TKE)
        if self.ordered is not None:
            return self._in_order(self.ordered, layer_idx, q_THE, scale)
        if self.from_start:
            return self.packed(layer_idx, q_THE, k_TKE, v_TKE, scale)
        _, H, E = q_THE.shape
        q = q_THE.new_zeros(self.rows * self.longest, H, E).index_copy_(0, self.spread_T, q_THE)
        keys, values = (_gather(t[layer_idx], self.slots_BS) for t in (self.cache.keys, self.cache.values))
        o_BHQE = F.scaled_dot_product_attention(
            q.view(self.rows, self.longest, H, E).transpose(1, 2),
            keys,
            values,
            attn_mask=self.mask_B1QS,
            scale=scale,
            enable_gqa=k_TKE.shape[1] != H,
        )
        return o_BHQE.transpose(1, 2).flatten(0, 1).index_select(0, self.spread_T)

    def rotate_and_attend(
        self,
        layer_idx: int,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        cos_PE: torch.Tensor,
        sin_PE: torch.Tensor,
        scale: float,
        out_THE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same for q and k as they come from their projections, rotated in place by tables of angles; written to
        ``out_THE`` where that is given.
        """
        if self.ordered is None:
            rotate_(q_THE, k_TKE, cos_PE, sin_PE, self.positions_T)
            o_THE = self(layer_idx, q_THE, k_TKE, v_TKE, scale)
            return o_THE if out_THE is None else out_THE.copy_(o_THE)
        if self._places_T is None:
            self._places_T = self.slots_T.to(torch.int32)
        pages = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        rope_and_write_kv(q_THE, k_TKE, v_TKE, cos_PE, sin_PE, *pages, self._places_T, self.positions_T)
        return self._in_order(self.ordered, layer_idx, q_THE, scale, out_THE)

    def _in_order(
        self,
        rows: OrderedRows,
        layer_idx: int,
        q_THE: torch.Tensor,
        scale: float,
        out_THE: torch.Tensor | None = None,
    ) -> torch.Tensor:
        k_UKE, v_UKE = (t[layer_idx].flatten(0, 1) for t in (self.cache.keys, self.cache.values))
        return ordered_attention_forward(q_THE, k_UKE, v_UKE, rows, scale, out_THE)[0]


def _gather(pages: torch.Tensor, slots_BS: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, block_size, K, E]`` at slots ``[B, S]`` to ``[B, K, S, E]``."""
    B, S = slots_BS.shape
    tokens = pages.flatten(0, 1).index_select(0, slots_BS.flatten())
    return tokens.view(B, S, *pages.shape[2:]).transpose(1, 2)
