"""Decoding on a GPU: rows in slots, a CUDA graph a batch size, and the host looking in every few steps.

All of it is queued on one stream, in order, and nothing here waits for the GPU: a slot, a block or a table's row that
changes hands while a burst of steps is in flight does so behind that burst. Only taking a look waits (``look.py``), and
capturing a graph.

Everything that a step reads or writes lies where it lies for as long as the graphs live: the slots' settings, counters
and outputs (``kernels/sample_state.py``), the block tables, the cache, the weights, the adapters (which the optimizer
writes in place, and ``prepared`` rounds in place). So a graph that was captured once says, after an optimizer step,
what the new policy says.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any, NamedTuple, Protocol

import torch

from ...kernels.adapted_matmul import coded_bytes
from ...kernels.sample import sample_step
from ...kernels.sample_state import RowSettings, SampleState, Variant
from ...kernels.spans import on_device
from ...lora.projection import row_columns
from ...models.forward import Head
from ...models.parts import Groups, Parts
from ...models.tree import unwrap
from .capture import Capture
from .decode_walk import DecodeWalk, PrefillWalk, few_rows
from .kv_cache import KVCache
from .look import Look
from .paged import PagedDecode
from .prefill import Prefill
from .products import HeldProduct, align_of, takes_nf4
from .random import stream_key
from .request import Sequence

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
"""Batch sizes that graphs are captured for: a batch runs in the least that holds it."""


class Replay(Protocol):
    """A decode step that can be run again and again."""

    def replay(self) -> None: ...


class Launched(NamedTuple):
    """A decode step whose kernels are launched anew each time: where there are no graphs."""

    step: Callable[[int], None]
    rows: int

    def replay(self) -> None:
        self.step(self.rows)


class Sizes(NamedTuple):
    """What a decoder is made for; one made for at least as much serves as well."""

    rows: int
    tokens: int
    positions: int
    stop_ids: int
    penalties: bool
    tallies: bool

    def holds(self, other: Sizes) -> bool:
        return all(own >= its for own, its in zip(self, other))


MOST_ROWS = BUCKETS[-1]


def bucket_of(rows: int) -> int:
    """The least batch size with a graph that holds so many rows, :data:`MOST_ROWS` at most."""
    return next(size for size in BUCKETS if size >= rows)


class Decoder:
    """Slots and graphs over one KV cache.

    Args:
        model: the model.
        found: its layers, prepared.
        cache: keys and values.
        sizes: most rows at once, most new tokens and most tokens of one row, most stop ids, whether any is penalised
            for repeating, or by how often it says a token.
        spare_bytes: memory that it may take to keep 4-bit weights in 16 bits, where batches are large.
        stream: what graphs are captured on; its own where None.
    """

    def __init__(
        self,
        model: Any,
        found: list[tuple[Parts, Groups]],
        cache: KVCache,
        sizes: Sizes,
        spare_bytes: int = 0,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.model, self.cache, self.sizes = model, cache, sizes
        self.hold = held_bytes_of(found, cache.shape.dtype) <= spare_bytes
        self.groups = [groups for _, groups in found]
        self._found = found
        self._made_of, self._kept = self._key(found)
        device, base = cache.shape.device, unwrap(model)
        rows = bucket_of(sizes.rows)
        self.state = SampleState(
            rows, base.config.vocab_size, sizes.tokens, sizes.stop_ids, device, sizes.penalties, sizes.tallies
        )
        self.width = -(-sizes.positions // cache.block_size)
        self.table_BN = torch.zeros(rows, self.width, dtype=torch.int32, device=device)
        self._table_host = torch.zeros(rows, self.width, dtype=torch.int32)
        self._table = self._table_host.numpy()
        self._written: dict[int, int] = {}  # entries of each slot's table that were written
        self.query_heads = base.config.num_attention_heads
        self._walks: dict[bool, DecodeWalk] = {}
        self._prefill: Prefill | None = None
        # Where no group takes the 4-bit kernel, one walk serves any number of rows: two would hold weights twice.
        self._few_in_nf4 = not self.hold or any(
            takes_nf4(group, cache.shape.dtype) for _, groups in found for group in groups
        )
        self._graphs: dict[tuple[int, Variant], Replay] = {}
        self._captures = Capture(device, stream)
        self.slots: list[Sequence | None] = [None] * rows
        self.slot_of: dict[int, int] = {}
        self.variant = Variant()

    def serves(self, found: list[tuple[Parts, Groups]], cache: KVCache, sizes: Sizes) -> bool:
        """Whether graphs and slots can be used again."""
        same = len(found) == len(self.groups) and all(own is its for own, (_, its) in zip(self.groups, found))
        return same and cache is self.cache and self.sizes.holds(sizes) and self._key(found)[0] == self._made_of

    def _key(self, found: list[tuple[Parts, Groups]]) -> tuple[object, list[torch.Tensor | None]]:
        """What graphs hold by address beside the layers, and the versions of what is kept in 16 bits; and the tensors
        themselves, so that no other takes their identity."""
        base = unwrap(self.model)
        stack, head = base.model, base.lm_head
        tensors = [stack.embed_tokens.weight, stack.norm.weight, head.weight, head.bias]
        places = [None if t is None else (id(t), t.data_ptr()) for t in tensors]
        versions = [p.base.weight._version for parts, _ in found for p in parts.projections] if self.hold else []
        return (places, versions, base.config.vocab_size), tensors

    @property
    def held_bytes(self) -> int:
        """Memory of the weights that it keeps in 16 bits."""
        products = [p for walk in self._walks.values() for layer in walk.layers for p in layer[1:]]
        return sum(p.bytes for p in products if isinstance(p, HeldProduct))

    def begin(self, sequences: Seq[Sequence]) -> None:
        """A rollout of these sequences begins: adapters were rounded anew, all slots are free."""
        for walk in self._walks.values():
            walk.refresh()
        self.variant = Variant.of([_settings(s) for s in sequences], self.state.vocab)
        self.clear()

    def clear(self) -> None:
        """Free every slot, also one that an interrupt left between two owners."""
        self.state.clear(range(len(self.slots)))
        self.slots = [None] * len(self.slots)
        self.slot_of.clear()
        self._written.clear()

    # Rows

    def admit(self, sequences: Seq[Sequence]) -> None:
        """Give each sequence a slot, with its settings and counters as they stand; the lowest free ones first."""
        if not sequences:
            return
        free = (i for i, owner in enumerate(self.slots) if owner is None)
        at = [next(free) for _ in sequences]
        for i, sequence in zip(at, sequences):
            self.slots[i] = sequence
            self.slot_of[id(sequence)] = i
        self._load(at, sequences)

    def _load(self, at: list[int], sequences: Seq[Sequence]) -> None:
        self.state.load(at, [_settings(s) for s in sequences])
        tokens_B = self.state.tokens_B
        index, last = (on_device(x, torch.int64, tokens_B.device) for x in (at, [s.last for s in sequences]))
        tokens_B.index_copy_(0, index, last)

    def release(self, sequences: Seq[Sequence]) -> None:
        """The slots of sequences that ended, or were preempted, are free."""
        at = [self.slot_of.pop(id(s)) for s in sequences if id(s) in self.slot_of]
        for i in at:
            self.slots[i] = None
            self._written.pop(i, None)
        self.state.clear(at)

    def forget_all_but(self, sequences: Seq[Sequence]) -> None:
        """Free the slots of sequences that no longer run: preempted ones come back through a prefill."""
        running = {id(s) for s in sequences}
        self.release([s for s in self.slots if s is not None and id(s) not in running])

    def without_slot(self, sequences: Seq[Sequence]) -> list[Sequence]:
        return [s for s in sequences if id(s) not in self.slot_of]

    def _compact(self) -> None:
        """Move rows down, where that lets a smaller graph serve. They move as they stand on the device: nobody need
        know what they drew, nor whether they have ended.
        """
        size = bucket_of(max(len(self.slot_of), 1))
        source = [i for i, owner in enumerate(self.slots) if owner is not None and i >= size]
        if not source:
            return
        target = [i for i, owner in enumerate(self.slots[:size]) if owner is None][: len(source)]
        self.state.move(source, target)
        for i, j in zip(source, target):
            self.slots[j], self.slots[i] = self.slots[i], None
            self.slot_of[id(self.slots[j])] = j
            self._written.pop(i, None)

    # Steps

    def draw(self, x_NV: torch.Tensor, sequences: Seq[Sequence]) -> None:
        """Draw the first tokens of sequences just admitted, from the head's products that a prefill made."""
        self._sample(x_NV, on_device([self.slot_of[id(s)] for s in sequences], torch.int32, x_NV.device))
        for s in sequences:
            s.unseen += 1

    @property
    def head(self) -> Head:
        """The output projection."""
        return self._walk(1).head

    def _sample(self, x_NV: torch.Tensor, rows_N: torch.Tensor | None) -> None:
        out = self.head
        sample_step(x_NV, self.state, self.variant, rows_N, out.bias_V, out.scale, out.softcap)

    def run(self, sequences: Seq[Sequence], steps: int) -> None:
        """Decode so many tokens of every row, which has blocks for them; rows that end on the way draw fewer."""
        self._compact()
        rows = bucket_of(1 + max(self.slot_of[id(s)] for s in sequences))
        self._write_tables(sequences, rows)
        graph = self._graph(rows)
        for _ in range(steps):
            graph.replay()
        for s in sequences:
            s.unseen += steps

    def _write_tables(self, sequences: Seq[Sequence], rows: int) -> None:
        """Block tables as they stand: of a row that was there before, the last known block and those behind it."""
        for s in sequences:
            slot = self.slot_of[id(s)]
            known = max(self._written.get(slot, 0) - 1, 0)
            self._table[slot, known : len(s.table)] = s.table[known:]
            self._written[slot] = len(s.table)
        host = self._table_host[:rows]
        if self.table_BN.is_cuda:
            host = host.pin_memory()  # a copy: the one before may still wait behind a burst to be read
        self.table_BN[:rows].copy_(host, non_blocking=True)

    def begin_look(self, sequences: Seq[Sequence]) -> Look:
        """A look at the unseen tokens of these rows. Whoever drew its last one for certain leaves its slot."""
        look = Look(self.state, sequences, [self.slot_of[id(s)] for s in sequences])
        self.release([s for s in sequences if s.full])
        return look

    # Graphs

    def _walk(self, rows: int) -> DecodeWalk:
        """Few rows and many multiply in different ways."""
        many = rows > few_rows(self.hold) or not self._few_in_nf4
        if many not in self._walks:
            most = bucket_of(self.sizes.rows) if many else few_rows(self.hold)
            self._walks[many] = DecodeWalk(self.model, self._found, most, self.sizes.positions, self.hold)
        return self._walks[many]

    @property
    def prefill(self) -> Prefill:
        """What computes prompts for these rows, on the weights that a step of all of them reads."""
        if self._prefill is None:
            walk = PrefillWalk(self.model, self._found, self.cache.shape.dtype, self._walk(bucket_of(self.sizes.rows)))
            self._prefill = Prefill(walk, self.cache, self.query_heads, self._captures)
        return self._prefill

    def _step(self, rows: int) -> None:
        walk, state = self._walk(rows), self.state
        attention = PagedDecode(
            self.cache, self.table_BN[:rows], state.slots_B[:rows], state.lengths_B[:rows], self.query_heads
        )
        self._sample(walk(state.tokens_B[:rows], attention), None)

    def _graph(self, rows: int) -> Replay:
        """One step of the first ``rows`` slots: a graph, or on the CPU its launches."""
        if not self.table_BN.is_cuda:
            return Launched(self._step, rows)
        graph = self._graphs.get((rows, self.variant))
        if graph is None:
            owners = [i for i, owner in enumerate(self.slots) if owner is not None]
            graph = self._graphs[rows, self.variant] = self._capture(rows, owners)
        return graph

    def capture_all(self) -> None:
        """Make every graph that the rollout which was begun can ask for."""
        for rows in BUCKETS[: 1 + BUCKETS.index(bucket_of(self.sizes.rows))]:
            self._graph(rows)
        self.prefill.capture_all()

    def _capture(self, rows: int, owners: list[int]) -> torch.cuda.CUDAGraph:
        """In the step outside of the graph no row runs."""
        state = self.state
        kept = [t.clone() for t in (state.slots_B, state.lengths_B, state.finished_B)]
        state.clear(owners)
        graph, _ = self._captures(lambda: self._step(rows))
        for t, was in zip((state.slots_B, state.lengths_B, state.finished_B), kept):
            t.copy_(was)
        return graph


def held_bytes_of(found: list[tuple[Parts, Groups]], dtype: torch.dtype) -> int:
    """What the 4-bit weights of these layers take in ``dtype``, adapters beside them, and as codes in another order."""
    made = [group for _, groups in found for group in groups if all(p.nf4 is not None for p in group.members)]
    sizes = [(group, group.members[0].base.in_features) for group in made]
    elements = (
        (group.outputs + group.rank) * row_columns(inputs + group.rank, align_of(inputs)) for group, inputs in sizes
    )
    codes = sum(
        coded_bytes(group.outputs, inputs, group.members[0].base.weight) for group, inputs in sizes if group.rank
    )
    return sum(elements) * dtype.itemsize + codes


def sizes_of(sequences: Seq[Sequence], max_rows: int) -> Sizes:
    """What a decoder for these sequences has to hold; lengths in whole quarters of a power of two, to be used again."""
    return Sizes(
        rows=min(max_rows, len(sequences)),
        tokens=_rounded(max(s.max_new for s in sequences)),
        positions=_rounded(max(s.longest for s in sequences)),
        stop_ids=max(8, *(len(s.stop_ids) for s in sequences)),
        penalties=any(s.params.repetition_penalty != 1 for s in sequences),
        tallies=any(s.params.tallied for s in sequences),
    )


def _rounded(tokens: int) -> int:
    step = max(64, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


def _settings(s: Sequence) -> RowSettings:
    p = s.params
    return RowSettings(
        temperature=p.temperature,
        top_k=p.top_k,
        top_p=p.top_p,
        min_p=p.min_p,
        repetition_penalty=p.repetition_penalty,
        key=stream_key(s.seed, s.index),
        count=len(s.output),
        position=len(s) - 1,
        min_tokens=p.min_tokens,
        max_tokens=s.max_new,
        stop_ids=sorted(s.stop_ids),
        seen=s.tokens(0, len(s)) if p.repetition_penalty != 1 else (),
        presence_penalty=p.presence_penalty,
        frequency_penalty=p.frequency_penalty,
        generated=s.output if p.tallied else (),
    )
