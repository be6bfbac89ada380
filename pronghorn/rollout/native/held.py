"""Decode attention for the CPU: keys and values kept gathered, the shared prompt read once for its samples.

A CPU decode step is bound by reading keys and values, so gathering them from the blocks in every step would triple its
cost. Here they are gathered when the set of rows changes, and each step appends to them. Rows that share their prompt's
blocks form groups: one matrix product over the prompt for the whole group, one over each row's own tokens, and a
softmax over both (the split of Hydragen, Juravsky et al., 2024, arXiv:2402.05099, with exact sums).

Rows sit in slots: group p, place j is slot ``p * width + j``. All copies and sums are float32.
"""

from __future__ import annotations

import math

import torch

from .kv_cache import KVCache
from .request import Sequence

_ROOM = 64  # new tokens that fit behind the longest row before everything is gathered again
_REFILL = 0.75  # gather again when fewer of the slots than this are alive


class Buffers:
    """Memory that outlives one gathering: fresh pages from the system cost more than the copy into them.

    What was there before stays behind the new content; it is finite, and masked.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, int], torch.Tensor] = {}

    def take(self, use: str, layer: int, size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """A contiguous tensor of ``size``; the last one taken for the same use and layer is void."""
        count = math.prod(size)
        flat = self._flat.get((use, layer))
        if flat is None or flat.numel() < count or flat.dtype != dtype:
            self._flat.pop((use, layer), None)
            del flat
            flat = self._flat[use, layer] = torch.zeros(count + count // 8, dtype=dtype)
        return flat[:count].view(size)


class HeldDecode:
    """Decode attention over a fixed set of rows; rows may leave, none may join.

    Args:
        cache: the paged cache, which stays the truth: every new token is written there too.
        rows: sequences with block tables that hold all but their newest token.
        buffers: memory to gather into; only the newest HeldDecode on it is valid.
    """

    def __init__(self, cache: KVCache, rows: list[Sequence], buffers: Buffers) -> None:
        self.cache = cache
        self.buffers = buffers
        size = cache.block_size
        self.width, groups = _choose_groups(rows, size)
        self.groups = len(groups)
        slots = self.groups * self.width
        self.slot_of = {id(row): p * self.width + j for p, group in enumerate(groups) for j, row in enumerate(group)}
        self.members = {id(row): (row, row.preemptions) for row in rows}
        shared = [_shared_blocks(group, size) if self.width > 1 else 0 for group in groups]
        self.prefix = torch.zeros(slots, dtype=torch.int64)  # tokens of each slot's row that live in the group's part
        tables: list[list[int]] = [[] for _ in range(slots)]
        for p, group in enumerate(groups):
            for j, row in enumerate(group):
                self.prefix[p * self.width + j] = shared[p] * size
                tables[p * self.width + j] = row.table[shared[p] :]
        longest = max(len(row) - int(self.prefix[self.slot_of[id(row)]]) for row in rows)
        self.room = -(-(longest + _ROOM) // size) * size
        self.prefix_room = max(shared) * size
        group_tables = [group[0].table[:n] for group, n in zip(groups, shared)]
        self.prefix_keys, self.prefix_values = self._collect("prefix", group_tables, self.prefix_room)
        self.own_keys, self.own_values = self._collect("own", tables, self.room)

    def _collect(self, use: str, tables: list[list[int]], room: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Per layer, keys and values ``[len(tables), K, room, E]`` of the blocks in ``tables``."""
        size = self.cache.block_size
        used = min(max(len(table) for table in tables), room // size)
        blocks = torch.tensor([[*table[:used], *[0] * (used - len(table))] for table in tables], dtype=torch.int64)
        out: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for name, pages, held in (("keys", self.cache.keys, out[0]), ("values", self.cache.values, out[1])):
            for index, layer in enumerate(pages):
                _, _, K, E = layer.shape
                copy = self.buffers.take(f"{use} {name}", index, (len(tables), K, room, E))
                if used:
                    found = self.buffers.take("scratch", 0, (blocks.numel(), size, K, E), layer.dtype)
                    torch.index_select(layer, 0, blocks.flatten(), out=found)
                    copy[:, :, : used * size] = found.view(len(tables), used * size, K, E).transpose(1, 2)
                held.append(copy)
        return out

    def serves(self, rows: list[Sequence]) -> bool:
        """Whether the next step of ``rows`` can run on what is held."""
        if len(rows) < _REFILL * len(self.members):
            return False
        for row in rows:
            known = self.members.get(id(row))
            if known is None or known[0] is not row or known[1] != row.preemptions:
                return False
        return True

    def prepare(self, rows: list[Sequence]) -> bool:
        """Plan the step in which each of ``rows`` computes its newest token; False when there is no room left."""
        size = self.cache.block_size
        at = [len(row) - 1 for row in rows]
        slots_B = torch.tensor([self.slot_of[id(row)] for row in rows])
        positions_B = torch.tensor(at)
        own_B = positions_B - self.prefix[slots_B]
        longest = int(own_B.max()) + 1
        if longest > self.room:
            return False
        self.cache_slots_B = torch.tensor([row.table[p // size] * size + p % size for row, p in zip(rows, at)])
        total = self.groups * self.width
        self.slots_B: torch.Tensor | None = slots_B
        self.longest = longest
        heads = torch.arange(self.cache.shape.kv_heads)
        # Where the new token's heads go, in rows of E of the held ``[slots, K, room, E]``.
        self.own_rows_BK = ((slots_B.unsqueeze(1) * len(heads) + heads) * self.room + own_B.unsqueeze(1)).flatten()
        if len(rows) == total and torch.equal(slots_B, torch.arange(total)):
            self.slots_B = None
        self.bias = self._bias(slots_B, own_B, longest)
        return True

    def _bias(self, slots_B: torch.Tensor, own_B: torch.Tensor, longest: int) -> torch.Tensor:
        """0 where a slot's token is visible, -inf where not: ``[P, 1, width, 1, prefix_room + longest]``."""
        total = self.groups * self.width
        lengths = torch.ones(total, dtype=torch.int64)  # a slot without a row sees one token: no NaN, no use
        lengths[slots_B] = own_B + 1
        hidden_prefix = torch.arange(self.prefix_room) >= self.prefix.unsqueeze(1)
        hidden_own = torch.arange(longest) >= lengths.unsqueeze(1)
        hidden = torch.cat((hidden_prefix, hidden_own), dim=1)
        bias = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        return bias.view(self.groups, 1, self.width, 1, -1)

    def __call__(
        self, layer_idx: int, q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store the B new tokens' keys and values, then attend: ``[B, H, E]``."""
        B, H, E = q_THE.shape
        P, W, K, L = self.groups, self.width, k_TKE.shape[1], self.longest
        R = H // K
        self.cache.write(layer_idx, self.cache_slots_B, k_TKE, v_TKE)
        own_keys, own_values = self.own_keys[layer_idx], self.own_values[layer_idx]
        own_keys.view(-1, E).index_copy_(0, self.own_rows_BK, k_TKE.float().reshape(B * K, E))
        own_values.view(-1, E).index_copy_(0, self.own_rows_BK, v_TKE.float().reshape(B * K, E))
        q = q_THE.float() * scale
        if self.slots_B is not None:
            q = q.new_zeros(P * W, H, E).index_copy_(0, self.slots_B, q)
        keys, values = own_keys[:, :, :L].flatten(0, 1), own_values[:, :, :L].flatten(0, 1)
        scores = torch.bmm(q.view(P * W * K, R, E), keys.transpose(1, 2))
        if self.prefix_room == 0:
            probs = scores.view(P, W, K, R, L).add_(self.bias.transpose(1, 2)).softmax(-1)
            o = torch.bmm(probs.view(P * W * K, R, L), values)
        else:
            o = self._with_prefix(layer_idx, q, scores, values, (P, W, K, R, L, E))
        o = o.view(P * W, H, E).to(q_THE.dtype)
        return o if self.slots_B is None else o.index_select(0, self.slots_B)

    def _with_prefix(
        self,
        layer_idx: int,
        q: torch.Tensor,
        own_scores: torch.Tensor,
        own_values: torch.Tensor,
        sizes: tuple[int, int, int, int, int, int],
    ) -> torch.Tensor:
        """One softmax over the group's prompt and the row's own tokens; returns ``[P, W, K, R, E]``."""
        P, W, K, R, L, E = sizes
        S = self.prefix_room
        q_group = q.view(P, W, K, R, E).transpose(1, 2).reshape(P * K, W * R, E)
        prefix_scores = torch.bmm(q_group, self.prefix_keys[layer_idx].flatten(0, 1).transpose(1, 2))
        scores = q.new_empty(P, K, W, R, S + L)
        torch.add(prefix_scores.view(P, K, W, R, S), self.bias[..., :S], out=scores[..., :S])
        torch.add(own_scores.view(P, W, K, R, L).transpose(1, 2), self.bias[..., S:], out=scores[..., S:])
        probs = scores.softmax(-1)
        o_prefix = torch.bmm(probs[..., :S].reshape(P * K, W * R, S), self.prefix_values[layer_idx].flatten(0, 1))
        o_own = torch.bmm(probs[..., S:].transpose(1, 2).reshape(P * W * K, R, L), own_values)
        return o_own.view(P, W, K, R, E) + o_prefix.view(P, K, W, R, E).transpose(1, 2)


def _shared_blocks(group: list[Sequence], size: int) -> int:
    """Leading whole prompt blocks that all rows of ``group`` have in common."""
    most = len(group[0].prompt) // size
    first = group[0].table
    for row in group[1:]:
        most = next((i for i in range(most) if row.table[i] != first[i]), most)
    return most


def _choose_groups(rows: list[Sequence], size: int) -> tuple[int, list[list[Sequence]]]:
    """Group rows that share their prompt's first block, at most ``width`` to a group, with the width that reads least.

    A group of fewer rows than ``width`` leaves slots empty, whose tokens are read all the same.
    """
    families: dict[int, list[Sequence]] = {}
    for row in rows:
        key = row.table[0] if len(row.prompt) >= size else -1 - id(row)
        families.setdefault(key, []).append(row)
    own = sum(len(row) - len(row.prompt) // size * size + _ROOM // 2 for row in rows) / len(rows)
    prefix = sum(len(row.prompt) // size * size for row in rows) / len(rows)

    def cost(width: int) -> float:
        groups = sum(-(-len(family) // width) for family in families.values())
        return groups * (prefix + width * own)

    widest = max(len(family) for family in families.values())
    width = min({*(w for w in (1, 2, 3, 4, 6, 8, 16, 32) if w < widest), widest}, key=cost)
    return width, [family[i : i + width] for family in families.values() for i in range(0, len(family), width)]
