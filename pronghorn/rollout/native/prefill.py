"""Prefill of few tokens by CUDA graphs: a prompt's launches keep the host for three times as long as the GPU works.

The trainer multiplies fewer than ``ORDERED_ROWS`` rows as so many (``lora/fused.py``), so a prefill of few tokens costs
the GPU the same with rows of padding, and then its shapes are always the same: a graph can hold it. Up to four times as
many tokens are a graph, too, where little of it would be padding, which costs the GPU time there. What changes from one
prefill to the next, which tokens, where they belong in the cache and which queries meet which keys, is one tensor of
integers that the host fills. Bits are those of the launches: no kernel here lets a row see how many others there are.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import torch

from ...kernels.ordered_attention import ordered_attention_forward, tile_queries
from ...kernels.ordered_rows import OrderedRows
from ...kernels.rope_kv import rope_and_write_kv
from ...kernels.spans import on_device
from ...lora.fused import ORDERED_ROWS
from ...models.attention import in_order
from .attention import PrefillAttention, slots_of
from .decode_walk import PrefillWalk
from .kv_cache import KVCache
from .scheduler import Chunk

SIZES = tuple(n * ORDERED_ROWS for n in (1, 2, 3, 4))
"""Tokens of a graph: a prefill takes the least that holds it."""

MOST_PADDING = 0.25
"""Share of a graph's tokens that may be padding, of all but the least."""

MOST_PROMPTS = 64
"""Prompts that share a graph's tokens."""


class FixedAttention:
    """Attention of up to ``tokens`` packed tokens of up to ``prompts`` prompts, from tensors that stay where they are.

    Args:
        cache: where keys and values go.
        query_heads: H.
        tokens, prompts: most of them. Tokens that are not there have position -1: nothing of them is written, and what
            is attended for them means nothing.
    """

    def __init__(self, cache: KVCache, query_heads: int, tokens: int, prompts: int) -> None:
        self.cache, self.tokens, self.prompts = cache, tokens, prompts
        shape = cache.shape
        self.queries = tile_queries(query_heads, shape.kv_heads, shape.head_dim, shape.device)
        sizes = [tokens] * 4 + [prompts, 4 * (tokens // self.queries + prompts)]
        self._all = torch.zeros(sum(sizes), dtype=torch.int32, device=shape.device)
        self.ids_T, self.positions_T, self._places_T, self._keys_U, self.asked_L, tiles = self._all.split(sizes)
        self.positions_T.fill_(-1)
        self._tiles_N4 = tiles.view(-1, 4)
        self._rows = self._named((0,), (tokens,), (0,), (0,))

    def _named(self, starts: Seq[int], counts: Seq[int], firsts: Seq[int], offsets: Seq[int]) -> OrderedRows:
        """Rows whose keys and tiles, which a GPU reads, are the fixed ones; the rest is what the reference reads."""
        numbers = tuple(starts), tuple(counts), tuple(firsts), tuple(offsets)
        return OrderedRows(*numbers, self._keys_U, {self.queries: self._tiles_N4})

    def fill(self, ids: Seq[int], chunks: Seq[Chunk], asked: Seq[int]) -> None:
        """These tokens next: whole prompts one after another; hidden states of the tokens ``asked`` are wanted."""
        counts = [chunk.stop for chunk in chunks]
        slots = [slots_of(chunk.sequence.table, 0, chunk.stop, self.cache.block_size) for chunk in chunks]
        rows = OrderedRows.gathered(counts, slots, torch.device("cpu"))
        tiles = rows.tiles(self.queries).flatten()
        positions = torch.cat([torch.arange(n) for n in counts])
        places = torch.cat(slots)
        total = len(ids)
        host = torch.zeros(self._all.shape, dtype=torch.int32)
        begin = 0
        for part, values in (
            (self.ids_T, torch.tensor(ids)), (self.positions_T, positions), (self._places_T, places),
            (self._keys_U, places), (self.asked_L, torch.tensor(asked)), (self._tiles_N4, tiles),
        ):  # fmt: skip
            host[begin : begin + len(values)] = values
            begin += part.numel()
        host[self.tokens + total : 2 * self.tokens] = -1
        self._all.copy_(on_device(host, torch.int32, self._all.device))
        rest = [(total, self.tokens - total, 0, 0)] if total < self.tokens else []
        named = [*zip(rows.starts, rows.counts, rows.firsts, rows.offsets), *rest]
        self._rows = self._named(*zip(*named, strict=True))

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
        """As :meth:`pronghorn.rollout.native.attention.PrefillAttention.rotate_and_attend`."""
        pages = self.cache.keys[layer_idx], self.cache.values[layer_idx]
        rope_and_write_kv(q_THE, k_TKE, v_TKE, cos_PE, sin_PE, *pages, self._places_T, self.positions_T)
        k_UKE, v_UKE = (t.flatten(0, 1) for t in pages)
        return ordered_attention_forward(q_THE, k_UKE, v_UKE, self._rows, scale, out_THE)[0]


class Prefill:
    """Prompts for a decoder's rows: many tokens launched one kernel after another, few by a graph, from the second time
    on that its size is asked for.

    Args:
        walk: what computes prompts.
        cache: where keys and values go.
        query_heads: H.
        capture: what makes the decoder's graphs.
    """

    def __init__(
        self,
        walk: PrefillWalk,
        cache: KVCache,
        query_heads: int,
        capture: Callable[[Callable[[], torch.Tensor]], tuple[torch.cuda.CUDAGraph, torch.Tensor]],
    ) -> None:
        self.walk, self.cache, self.query_heads, self._capture = walk, cache, query_heads, capture
        shape = cache.shape
        self.fixed = shape.device.type == "cuda" and in_order(shape.device, shape.dtype, shape.head_dim)
        self.graphs: dict[int, Fixed] = {}
        self._asked: set[int] = set()

    def __call__(self, ids: Seq[int], chunks: Seq[Chunk], asked: Seq[int]) -> torch.Tensor:
        """Hidden states ``[L, D]`` of the tokens ``asked`` among ``ids``. Those that a graph gave are to be read before
        another graph of the decoder runs, as graphs share memory.
        """
        size = size_of(chunks) if self.fixed else None
        if size is not None:
            if size in self._asked:
                self._make(size)
            self._asked.add(size)
            if size in self.graphs:
                return self.graphs[size](ids, chunks, asked)
        device = self.cache.shape.device
        tokens_T, asked_L = (on_device(x, torch.int64, device) for x in (ids, asked))
        return self.walk(tokens_T, PrefillAttention(self.cache, chunks), asked_L)

    def capture_all(self) -> None:
        """Make every graph that can be asked for; the largest first, whose memory the others share."""
        for size in reversed(SIZES if self.fixed else ()):
            self._make(size)

    def _make(self, size: int) -> None:
        if size not in self.graphs:
            attention = FixedAttention(self.cache, self.query_heads, size, MOST_PROMPTS)
            graph, hidden_LD = self._capture(lambda: self.walk(attention.ids_T, attention, attention.asked_L))
            self.graphs[size] = Fixed(graph, attention, hidden_LD)


class Fixed(NamedTuple):
    """A graph, what it reads and what it gives."""

    graph: torch.cuda.CUDAGraph
    attention: FixedAttention
    hidden_LD: torch.Tensor

    def __call__(self, ids: Seq[int], chunks: Seq[Chunk], asked: Seq[int]) -> torch.Tensor:
        self.attention.fill(ids, chunks, asked)
        self.graph.replay()
        return self.hidden_LD[: len(asked)]


def size_of(chunks: Seq[Chunk]) -> int | None:
    """Which of :data:`SIZES` holds these chunks; None where none does well, or a chunk goes on with a prompt."""
    if len(chunks) > MOST_PROMPTS or any(chunk.start for chunk in chunks):
        return None
    tokens = sum(chunk.stop for chunk in chunks)
    size = next((size for size in SIZES if size >= tokens), None)
    if size is None or (size > SIZES[0] and size - tokens > MOST_PADDING * size):
        return None
    return size
