"""Who runs next: admission in arrival order, continuous batching, chunked prefill, preemption. No torch here.

The policy is vLLM's (Kwon et al., 2023, arXiv:2309.06180, section 4.5): first come, first served; when blocks run out
the youngest sequence gives all of its blocks back and is computed again later.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

from ...config.errors import ConfigError
from .blocks import BlockManager, OutOfBlocks, blocks_for
from .request import Sequence


@dataclass(frozen=True)
class Chunk:
    """Positions ``start`` to ``stop`` of one sequence, to be computed in a prefill step.

    Where the chunk ends the sequence's tokens, the next token is drawn for it and for each of ``followers``: sequences
    of the same prompt that share its blocks from here on.
    """

    sequence: Sequence
    start: int
    stop: int
    followers: tuple[Sequence, ...] = ()

    @property
    def draws(self) -> bool:
        return self.stop == len(self.sequence)


@dataclass
class Step:
    """One step of the model: chunks to prefill, or else sequences to decode by one token. With neither, the host has
    to look at what was drawn before anything else can run.

    ``copies`` are blocks ``(source, target)`` to copy first, all sources read before any target is written. ``ahead``
    is how many tokens in a row every sequence of ``decode`` has room for: so many steps may run before the host looks.
    """

    prefill: list[Chunk] = field(default_factory=list)
    decode: list[Sequence] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    ahead: int = 1


class Scheduler:
    """Keeps the queue and the running set.

    Invariants (held by property tests): a waiting sequence holds no block; at most ``max_rows`` run; sequences are
    admitted in order; the oldest unfinished one is never preempted, so every sequence ends. A sequence with tokens that
    the host has not taken in runs on until it has; nobody is preempted while there is one.

    Args:
        blocks: the blocks to hand out.
        max_rows: most sequences that run at once.
        prefill_tokens: most prompt tokens that one prefill step computes.
        admit_together: once full, admit again only when so many rows are free (or all that wait fit): each admission
            interrupts decoding and, on the CPU, makes it gather its keys and values anew.
    """

    def __init__(self, blocks: BlockManager, max_rows: int, prefill_tokens: int, admit_together: int = 1) -> None:
        self.blocks = blocks
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.admit_together = admit_together
        self._filling = True
        self.waiting: list[Sequence] = []  # by order
        self.running: list[Sequence] = []  # by order
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
            ConfigError: the cache could not hold it even alone.
        """
        need = blocks_for(sequence.longest, self.blocks.block_size)
        if need > self.blocks.num_blocks:
            raise ConfigError(
                f"the KV cache holds {self.blocks.num_blocks * self.blocks.block_size} tokens, and one request may "
                f"come to {sequence.longest} ({len(sequence.prompt)} prompt + {sequence.max_new} new); lower "
                "max_tokens or max_seq_length, or raise gpu_memory_utilization"
            )
        bisect.insort(self.waiting, sequence, key=_order)

    def next_step(self, ahead: int = 1) -> Step | None:
        """What to run now, or None when nothing is left. Blocks are taken before it returns.

        A decode step may run up to ``ahead`` times over; nobody is preempted for more than the first.
        """
        step = Step()
        self._plan_prefill(step)
        if step.prefill or self._must_look():
            return step
        self._filling = self._filling and not self.waiting
        self._plan_decode(step)
        if step.decode:
            step.ahead = self._look_ahead(step.decode, ahead)
            for sequence in step.decode:
                sequence.computed += step.ahead - 1
            return step
        if left := len(self.waiting) + len(self.running):
            raise RuntimeError(f"{left} sequences are left and none can run: a fault of the scheduler")
        return None

    def finish(self, sequence: Sequence) -> None:
        """The sequence has ended: it leaves at once, and its blocks are free."""
        self.running.remove(sequence)
        self._evict(sequence)

    def abort(self) -> None:
        """Drop everything, whatever was under way; all blocks are free afterwards."""
        for sequence in [*self.running, *self.waiting]:
            self._evict(sequence)
        self.running.clear()
        self.waiting.clear()

    def _evict(self, sequence: Sequence) -> None:
        self.blocks.free(sequence.table)
        sequence.computed = sequence.unseen = 0
        if sequence in sequence.prompt.residents:
            sequence.prompt.residents.remove(sequence)

    # Prefill

    def _plan_prefill(self, step: Step) -> None:
        budget = self.prefill_tokens
        for sequence in [s for s in self.running if s.computed < len(s) - 1 or len(s) == len(s.prompt)]:
            budget -= self._chunk(step, sequence, budget)
        if self.running and self.waiting and not self._admits(self.max_rows - len(self.running)):
            return
        self._filling = True
        while budget > 0 and self.waiting:
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.pop(0)
            bisect.insort(self.running, sequence, key=_order)
            budget -= self._chunk(step, sequence, budget)

    def _admits(self, free: int) -> bool:
        """Whether so many free rows are enough to admit sequences, where some wait."""
        return bool(self.waiting) and (self._filling or free >= min(self.admit_together, len(self.waiting)))

    def _admit(self, sequence: Sequence) -> bool:
        """Take the blocks for all tokens of ``sequence``, those of its prompt shared where a resident lends them."""
        if len(self.running) >= self.max_rows:
            return False
        size = self.blocks.block_size
        lender = sequence.prompt.residents[0] if sequence.prompt.residents else None
        # Whole blocks only, and at least one token is left to compute: its logits are needed.
        shared = min(len(sequence.prompt), len(sequence) - 1) // size if lender else 0
        need = blocks_for(len(sequence), size) - shared
        # Each running sequence will want a block soon: admitting on the last ones would preempt, again and again.
        if self.running and need + len(self.running) + 1 > self.blocks.available:
            return False
        fresh = self.blocks.allocate(need)
        sequence.table = (self.blocks.share(lender.table[:shared]) if lender else []) + fresh
        sequence.computed = shared * size
        return True

    def _chunk(self, step: Step, sequence: Sequence, budget: int) -> int:
        """Plan the next chunk of an admitted sequence; returns how many tokens it takes."""
        start = sequence.computed
        stop = min(len(sequence), start + budget)
        if stop == start:
            return 0
        sequence.computed = stop
        followers: list[Sequence] = []
        if stop == len(sequence):
            sequence.prompt.residents.append(sequence)
            if not sequence.output:
                followers = self._pull_followers(sequence)
        step.prefill.append(Chunk(sequence, start, stop, tuple(followers)))
        return stop - start

    def _pull_followers(self, leader: Sequence) -> list[Sequence]:
        """Sequences at the head of the queue that start with the leader's prompt: they need no prefill of their own."""
        followers: list[Sequence] = []
        while self.waiting and len(self.running) < self.max_rows:
            sequence = self.waiting[0]
            if sequence.prompt is not leader.prompt or sequence.output:
                break
            if len(self.running) + 1 > self.blocks.available:
                break
            self.waiting.pop(0)
            sequence.table = self.blocks.share(leader.table)
            sequence.computed = len(leader)
            sequence.prompt.residents.append(sequence)
            bisect.insort(self.running, sequence, key=_order)
            followers.append(sequence)
        return followers

    # Decode

    def _must_look(self) -> bool:
        """Whether to decode only once the host knows what was drawn: all have ended for certain, by their length, or at
        least half of those who run, and make room for whoever waits; or blocks are so short that somebody would be
        preempted, for whom one that has ended may make room.

        Fewer make room one burst later: while that runs, the host launches the prefill of whoever gets their rows, for
        which the GPU would wait otherwise.
        """
        if not any(s.unseen for s in self.running):
            return False
        going = [s for s in self.running if not s.full]
        ended = len(self.running) - len(going)
        if ended >= len(going) and (not going or self._admits(self.max_rows - len(going))):
            return True
        if self.blocks.available >= len(going):
            return False
        return sum(self.blocks.takes(s.table, len(s) - 1) for s in going) > self.blocks.available

    def _plan_decode(self, step: Step) -> None:
        # Oldest first; whoever is preempted for it is the youngest, so it leaves from the end of the list.
        at = 0
        while at < len(self.running):
            sequence = self.running[at]
            if sequence.full:  # it has ended, and stays only until the host looks
                at += 1
            elif self._make_room(step, sequence):
                sequence.computed = len(sequence)
                step.decode.append(sequence)
                at += 1

    def _make_room(self, step: Step, sequence: Sequence) -> bool:
        """A writable slot for the newest token; False when the sequence itself had to go."""
        while True:
            try:
                copy = self.blocks.make_writable(sequence.table, len(sequence) - 1)
            except OutOfBlocks:
                victim = self.running[-1]
                self._preempt(victim)
                if victim is sequence:
                    return False
                continue
            if copy is not None:
                step.copies.append(copy)
            return True

    def _look_ahead(self, rows: list[Sequence], ahead: int) -> int:
        """Take blocks for up to ``ahead`` tokens a row, and say for how many there was room in every row."""
        size = self.blocks.block_size
        wanted = min(ahead, max(row.longest - len(row) for row in rows))
        first = [len(row.table) * size - len(row) + 1 for row in rows]  # steps until each has filled its blocks
        last = [min(wanted, row.longest - len(row) + 1) for row in rows]
        takes = sorted((more, i) for i in range(len(rows)) for more in range(first[i], last[i], size))
        for more, i in takes:
            try:
                self.blocks.make_writable(rows[i].table, len(rows[i]) - 1 + more)
            except OutOfBlocks:
                return more
        return wanted

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._evict(sequence)
        sequence.preemptions += 1
        self.preemptions += 1
        bisect.insort(self.waiting, sequence, key=_order)


def _order(sequence: Sequence) -> int:
    return sequence.order
