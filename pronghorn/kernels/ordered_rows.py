"""Which queries see which keys in ordered attention: rows of queries, and where each logical position's key lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from pronghorn.kernels.spans import on_device, pieces_on_device

TILE = 64
"""Keys of one tile: all their scores are taken before the next tile's."""

SEGMENT = 256
"""Keys of one segment, a multiple of ``TILE``: a softmax of its own, merged with those before it."""


@dataclass(frozen=True, eq=False)
class OrderedRows:
    """Rows of queries at consecutive logical positions; the query at position p sees its row's keys 0 to p.

    Attributes:
        starts: where each row's queries begin among the packed queries.
        counts: queries of each row, at least 1.
        firsts: logical position of each row's first query, which is how many keys lie before its own.
        offsets: where each row's keys begin in ``keys``.
        keys: int32 on the device: for each row, ``firsts + counts`` rows of the key and value tensors, by logical
            position.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    firsts: tuple[int, ...]
    offsets: tuple[int, ...]
    keys: torch.Tensor
    _tiles: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def packed(
        cls, lengths: Sequence[int], device: torch.device, prefix: Sequence[int | None] | None = None
    ) -> OrderedRows:
        """Rows one after another; ``prefix`` names for a row the one whose tokens come before its own, or None."""
        starts = [0]
        for n in lengths:
            starts.append(starts[-1] + n)
        above = list(prefix) if prefix is not None else [None] * len(lengths)
        if not any(row is not None for row in above):
            keys = torch.arange(starts[-1], dtype=torch.int32, device=device)
            return cls(tuple(starts[:-1]), tuple(lengths), (0,) * len(lengths), tuple(starts[:-1]), keys)
        pieces: list[tuple[int, int]] = []
        firsts, offsets, at = [], [], 0
        for row, (n, before) in enumerate(zip(lengths, above)):
            first = 0
            if before is not None:
                first = lengths[before]
                pieces.append((starts[before], starts[before + 1]))
            pieces.append((starts[row], starts[row + 1]))
            firsts.append(first)
            offsets.append(at)
            at += first + n
        keys = pieces_on_device(pieces, device).to(torch.int32)
        return cls(tuple(starts[:-1]), tuple(lengths), tuple(firsts), tuple(offsets), keys)

    @classmethod
    def gathered(cls, counts: Sequence[int], keys: Sequence[torch.Tensor], device: torch.device) -> OrderedRows:
        """Row i's queries are the last ``counts[i]`` of the positions whose keys lie at ``keys[i]`` (on the host)."""
        starts, offsets, firsts = [], [], []
        start = offset = 0
        for n, row in zip(counts, keys, strict=True):
            starts.append(start)
            offsets.append(offset)
            firsts.append(len(row) - n)
            start, offset = start + n, offset + len(row)
        index = on_device(torch.cat(list(keys)), torch.int32, device)
        return cls(tuple(starts), tuple(counts), tuple(firsts), tuple(offsets), index)

    @cached_property
    def longest(self) -> int:
        """Keys of the row that has most."""
        return max((first + count for first, count in zip(self.firsts, self.counts)), default=0)

    def tiles(self, queries: int) -> torch.Tensor:
        """int32 ``[N, 4]``: start, count, first position and offset of pieces of at most ``queries`` queries.

        Those with the most keys come first, so that the last programs to start are short.
        """
        found = self._tiles.get(queries)
        if found is None:
            rows_N4 = torch.tensor([self.starts, self.counts, self.firsts, self.offsets], dtype=torch.int64).t()
            pieces_N = (rows_N4[:, 1] + queries - 1) // queries
            row_M = torch.arange(len(pieces_N)).repeat_interleave(pieces_N)
            begin_M = (torch.arange(len(row_M)) - (pieces_N.cumsum(0) - pieces_N)[row_M]) * queries
            tiles_M4 = rows_N4[row_M]
            tiles_M4[:, 0] += begin_M
            tiles_M4[:, 1] = (tiles_M4[:, 1] - begin_M).clamp(max=queries)
            tiles_M4[:, 2] += begin_M
            order_M = (tiles_M4[:, 1] + tiles_M4[:, 2]).argsort(descending=True, stable=True)
            found = self._tiles[queries] = on_device(tiles_M4[order_M], torch.int32, self.keys.device)
        return found
