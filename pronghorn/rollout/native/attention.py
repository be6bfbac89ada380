"""Attention over the paged cache in plain PyTorch: prefill of packed chunks, and decode of one token a row.

Both implement ``models.attention.Attention``: the model's blocks call them with the keys and values of the step, which
they store in the cache before they attend. The index tensors are made once a step and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
import torch.nn.functional as F

from ...models.attention import PackedAttention
from .kv_cache import KVCache
from .scheduler import Chunk


def slots_of(table: Seq[int], start: int, stop: int, block_size: int) -> list[int]:
    """Cache slots of positions ``start`` to ``stop`` of the sequence with this block table."""
    return [table[p // block_size] * block_size + p % block_size for p in range(start, stop)]


def padded_slots(tables: Seq[Seq[int]], block_size: int, device: torch.device) -> torch.Tensor:
    """Slots ``[B, S]`` of every position of B tables, S the longest's; short tables repeat their first block."""
    longest = max(len(table) for table in tables)
    blocks = torch.tensor([[*table, *[table[0]] * (longest - len(table))] for table in tables], dtype=torch.int64)
    slots_BNs = blocks.unsqueeze(-1) * block_size + torch.arange(block_size)
    return slots_BNs.flatten(1).to(device, non_blocking=True)


class PrefillAttention:
    """Causal attention of packed chunks, each over its own sequence from position 0.

    Chunks that all begin at position 0 need nothing from the cache and run as training rows do. Otherwise keys and
    values are gathered from the cache, which by then holds those of this step as well.
    """

    def __init__(self, cache: KVCache, chunks: Seq[Chunk]) -> None:
        self.cache = cache
        size, device = cache.block_size, cache.shape.device
        slots = [s for c in chunks for s in slots_of(c.sequence.table, c.start, c.stop, size)]
        self.slots_T = torch.tensor(slots, dtype=torch.int64).to(device, non_blocking=True)
        lengths = [c.stop - c.start for c in chunks]
        self.packed = PackedAttention(lengths, device)
        self.from_start = all(c.start == 0 for c in chunks)
        if self.from_start:
            return
        self.rows, self.longest = len(chunks), max(lengths)
        tables = [c.sequence.table[: -(-c.stop // size)] for c in chunks]
        self.slots_BS = padded_slots(tables, size, device)
        rows = torch.tensor([b for b, n in enumerate(lengths) for _ in range(n)])
        columns = torch.cat([torch.arange(n) for n in lengths])
        self.spread_T = (rows * self.longest + columns).to(device)
        starts_B1 = torch.tensor([[c.start] for c in chunks])
        query_positions_BQ = starts_B1 + torch.arange(self.longest)
        # Padded queries see whatever lies before their position: finite, and dropped afterwards.
        mask_BQS = torch.arange(self.slots_BS.shape[1]) <= query_positions_BQ.unsqueeze(-1)
        self.mask_B1QS = mask_BQS.unsqueeze(1).to(device)

    def __call__(
        self, layer_idx: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store this step's keys and values, then attend: ``[T, H, E]``."""
        self.cache.write(layer_idx, self.slots_T, k_TKE, v_TKE)
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


class GatheredDecode:
    """Decode by gathering each row's keys and values from the cache in every layer: the reference on a GPU.

    The R = H / K query heads that share a kv head are laid out as R query positions, so keys are not repeated.

    Args:
        cache: where keys and values are.
        tables: block table of each of the B rows, with room for the new token.
        lengths: tokens of each row, the new one included.
    """

    def __init__(self, cache: KVCache, tables: Seq[Seq[int]], lengths: Seq[int]) -> None:
        self.cache = cache
        size, device = cache.block_size, cache.shape.device
        new = [table[(n - 1) // size] * size + (n - 1) % size for table, n in zip(tables, lengths)]
        self.slots_B = torch.tensor(new, dtype=torch.int64).to(device, non_blocking=True)
        self.slots_BS = padded_slots(tables, size, device)
        lengths_B1 = torch.tensor(lengths).unsqueeze(1)
        hidden_BS = torch.arange(self.slots_BS.shape[1]) >= lengths_B1
        bias_BS = torch.zeros(hidden_BS.shape, dtype=cache.shape.dtype).masked_fill_(hidden_BS, float("-inf"))
        self.bias_B11S = bias_BS[:, None, None].to(device, non_blocking=True)

    def __call__(
        self, layer_idx: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store the B new tokens' keys and values, then attend: ``[B, H, E]``."""
        self.cache.write(layer_idx, self.slots_B, k_TKE, v_TKE)
        B, H, E = q_THE.shape
        K = k_TKE.shape[1]
        keys, values = (_gather(t[layer_idx], self.slots_BS) for t in (self.cache.keys, self.cache.values))
        bias = self.bias_B11S.expand(B, K, H // K, -1)
        o_BKRE = F.scaled_dot_product_attention(q_THE.view(B, K, H // K, E), keys, values, attn_mask=bias, scale=scale)
        return o_BKRE.reshape(B, H, E)


def _gather(pages: torch.Tensor, slots_BS: torch.Tensor) -> torch.Tensor:
    """``[num_blocks, block_size, K, E]`` at slots ``[B, S]`` to ``[B, K, S, E]``."""
    B, S = slots_BS.shape
    tokens = pages.flatten(0, 1).index_select(0, slots_BS.flatten())
    return tokens.view(B, S, *pages.shape[2:]).transpose(1, 2)
