"""Which KV blocks are whose: reference counts, sharing, copy on write. No torch here."""

from __future__ import annotations

from collections.abc import Iterable


class OutOfBlocks(RuntimeError):
    """No free block is left; the scheduler preempts a sequence and tries again."""


def blocks_for(tokens: int, block_size: int) -> int:
    """How many blocks hold ``tokens`` tokens."""
    return -(-tokens // block_size)


class BlockManager:
    """Hands out block numbers ``0 .. num_blocks - 1`` and counts their holders.

    A table is a list of block numbers: position p of a sequence lives in slot ``p % block_size`` of block
    ``table[p // block_size]``. A block with more than one holder is only read.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.holders = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack: the lowest numbers first, then the last returned

    @property
    def available(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one holder each.

        Raises:
            OutOfBlocks: fewer are free; nothing is taken then.
        """
        if count > len(self._free):
            raise OutOfBlocks(f"{count} KV blocks asked for, {len(self._free)} of {self.num_blocks} free")
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self.holders[block] = 1
        return taken

    def share(self, blocks: Iterable[int]) -> list[int]:
        """The same blocks for one more holder."""
        shared = list(blocks)
        for block in shared:
            if self.holders[block] < 1:
                raise ValueError(f"block {block} has no holder and cannot be shared")
            self.holders[block] += 1
        return shared

    def free(self, table: list[int]) -> None:
        """Give every block of ``table`` back and empty it. Called with an emptied table it does nothing."""
        for block in reversed(table):
            if self.holders[block] < 1:
                raise ValueError(f"block {block} has no holder and cannot be freed")
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self._free.append(block)
        table.clear()

    def takes(self, table: list[int], position: int) -> bool:
        """Whether :meth:`make_writable` takes a block."""
        index = position // self.block_size
        return index == len(table) or self.holders[table[index]] > 1

    def make_writable(self, table: list[int], position: int) -> tuple[int, int] | None:
        """Make room in ``table`` for the token at ``position``, which is at most one past the last block's end.

        Returns ``(source, target)`` when the block was shared and has to be copied first, else None.

        Raises:
            OutOfBlocks: a new block is needed and none is free; ``table`` is as it was.
        """
        index = position // self.block_size
        if index > len(table):
            raise ValueError(f"position {position} leaves a gap after the {len(table)} blocks of its table")
        if index == len(table):
            table.extend(self.allocate(1))
            return None
        source = table[index]
        if self.holders[source] == 1:
            return None
        target = self.allocate(1)[0]
        table[index] = target
        self.holders[source] -= 1
        return source, target
