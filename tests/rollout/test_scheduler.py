"""Properties of the scheduler and the block manager, without a model."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.config.errors import ConfigError
from pronghorn.config.sampling import SamplingParams
from pronghorn.rollout.native.blocks import BlockManager, OutOfBlocks, blocks_for
from pronghorn.rollout.native.request import Prompt, Sequence
from pronghorn.rollout.native.scheduler import Scheduler, Step


def make(shape: list[tuple[int, int, list[int]]]) -> list[Sequence]:
    """Sequences from ``(prompt tokens, which prompt, ends)`` where ``ends`` holds each sample's completion length."""
    prompts: dict[tuple[int, int], Prompt] = {}
    out: list[Sequence] = []
    for request, (length, which, ends) in enumerate(shape):
        prompt = prompts.setdefault((length, which), Prompt(list(range(length))))
        for index, end in enumerate(ends):
            out.append(Sequence(len(out), request, index, prompt, SamplingParams(), max_new=end))
    return out


class Model:
    """Plays the model: fills slots with what they stand for, and checks that each step finds what it must read."""

    def __init__(self, blocks: BlockManager) -> None:
        self.size = blocks.block_size
        self.slots: dict[int, tuple] = {}

    def content(self, sequence: Sequence, position: int) -> tuple:
        """What the KV of a position depends on: the prompt up to it, and from its own output on, the sequence."""
        if position < len(sequence.prompt):
            return ("prompt", id(sequence.prompt), position)
        return ("own", sequence.order, position)

    def slot(self, sequence: Sequence, position: int) -> int:
        return sequence.table[position // self.size] * self.size + position % self.size

    def write(self, sequence: Sequence, start: int, stop: int) -> None:
        for position in range(start, stop):
            self.slots[self.slot(sequence, position)] = self.content(sequence, position)

    def check(self, sequence: Sequence, stop: int) -> None:
        for position in range(stop):
            assert self.slots[self.slot(sequence, position)] == self.content(sequence, position)

    def run(self, step: Step) -> list[Sequence]:
        read = [[self.slots.get(source * self.size + i) for i in range(self.size)] for source, _ in step.copies]
        for (_, target), values in zip(step.copies, read):
            for i, value in enumerate(values):
                self.slots.pop(target * self.size + i, None)
                if value is not None:
                    self.slots[target * self.size + i] = value
        drawing: list[Sequence] = []
        for chunk in step.prefill:
            self.write(chunk.sequence, chunk.start, chunk.stop)
        for sequence in step.decode:
            self.write(sequence, len(sequence) - 1, len(sequence))
        for chunk in step.prefill:
            self.check(chunk.sequence, chunk.stop)
            if chunk.draws:
                drawing += [chunk.sequence, *chunk.followers]
            for follower in chunk.followers:
                self.check(follower, len(follower))
        for sequence in step.decode:
            self.check(sequence, len(sequence))
        return drawing + step.decode


shapes = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 2), st.lists(st.integers(1, 15), min_size=1, max_size=5)),
    min_size=1,
    max_size=7,
)


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    spare=st.integers(0, 40),
    size=st.integers(1, 5),
    rows=st.integers(1, 9),
    budget=st.integers(1, 40),
    together=st.integers(1, 5),
)
def test_every_sequence_ends_with_its_own_keys_and_no_block_leaks(shape, spare, size, rows, budget, together):
    sequences = make(shape)
    blocks = BlockManager(max(blocks_for(s.longest, size) for s in sequences) + spare, size)
    scheduler, model = Scheduler(blocks, rows, budget, together), Model(blocks)
    for sequence in sequences:
        scheduler.add(sequence)
    done: list[Sequence] = []
    first_run: list[Sequence] = []
    favoured: dict[Sequence, int] = {}
    prefilled = 0
    for _ in range(10_000):
        step = scheduler.next_step()
        if step is None:
            break
        assert bool(step.prefill) != bool(step.decode)
        assert len(scheduler.running) <= rows
        assert sum(c.stop - c.start for c in step.prefill) <= budget
        oldest = min((s for s in sequences if s not in done), key=lambda s: s.order)
        assert oldest in scheduler.running, "the oldest is never kept waiting"
        favoured.setdefault(oldest, oldest.preemptions)
        assert oldest.preemptions == favoured[oldest], "nor preempted, once it is the oldest"
        held = [b for s in scheduler.running for b in s.table]
        assert [held.count(b) for b in range(blocks.num_blocks)] == blocks.holders
        assert all(not s.table for s in scheduler.waiting)
        for sequence in step.decode:
            assert blocks.holders[sequence.table[(len(sequence) - 1) // size]] == 1, "writes to a shared block"
        drawing = model.run(step)
        prefilled += sum(c.stop - c.start for c in step.prefill)
        for sequence in drawing:
            if sequence not in first_run:
                first_run.append(sequence)
            sequence.output.append(7)
            if len(sequence.output) == sequence.max_new:
                scheduler.finish(sequence)
                done.append(sequence)
                assert not sequence.table
    assert sorted(s.order for s in done) == list(range(len(sequences)))
    assert [s.order for s in first_run] == sorted(s.order for s in first_run), "first come, first served"
    assert blocks.available == blocks.num_blocks and not any(blocks.holders)
    if scheduler.preemptions == 0 and rows >= len(sequences) and len({(n, w) for n, w, _ in shape}) == len(shape):
        slack = spare * size  # with enough blocks, each prompt is computed exactly once
        if slack >= sum(s.longest + 2 * size for s in sequences):
            assert prefilled == sum(n for n, _, _ in shape)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, steps=st.integers(0, 30), spare=st.integers(0, 10))
def test_abort_frees_every_block_at_any_moment(shape, steps, spare):
    sequences = make(shape)
    blocks = BlockManager(max(blocks_for(s.longest, 4) for s in sequences) + spare, 4)
    scheduler, model = Scheduler(blocks, 4, 16), Model(blocks)
    for sequence in sequences:
        scheduler.add(sequence)
    for _ in range(steps):
        step = scheduler.next_step()
        if step is None:
            break
        for sequence in model.run(step):
            sequence.output.append(7)
            if len(sequence.output) == sequence.max_new:
                scheduler.finish(sequence)
    scheduler.next_step()  # blocks of a step that never ran are freed as well
    scheduler.abort()
    assert blocks.available == blocks.num_blocks and not any(blocks.holders)
    assert scheduler.next_step() is None


def test_a_prompt_is_prefilled_once_and_its_last_block_is_copied_when_written():
    sequences = make([(10, 0, [3, 3, 3])])
    blocks = BlockManager(20, 4)
    scheduler = Scheduler(blocks, 8, 100)
    for sequence in sequences:
        scheduler.add(sequence)
    step = scheduler.next_step()
    assert [(c.start, c.stop, len(c.followers)) for c in step.prefill] == [(0, 10, 2)]
    assert blocks.num_blocks - blocks.available == 3
    for sequence in sequences:
        sequence.output.append(1)
    step = scheduler.next_step()
    assert step.decode == sequences
    assert len(step.copies) == 2, "the last holder writes in place"
    assert [s.table[:2] for s in sequences] == [sequences[0].table[:2]] * 3
    assert len({s.table[2] for s in sequences}) == 3


def test_the_youngest_is_preempted_and_computed_again():
    sequences = make([(4, 0, [8]), (4, 1, [8])])
    blocks = BlockManager(5, 4)
    scheduler, model = Scheduler(blocks, 8, 100), Model(blocks)
    for sequence in sequences:
        scheduler.add(sequence)
    while (step := scheduler.next_step()) is not None:
        for sequence in model.run(step):
            sequence.output.append(1)
            if len(sequence.output) == 8:
                scheduler.finish(sequence)
    assert sequences[0].preemptions == 0
    assert sequences[1].preemptions >= 1


def test_a_request_that_can_never_fit_is_refused_with_the_remedy():
    scheduler = Scheduler(BlockManager(2, 4), 8, 100)
    with pytest.raises(ConfigError, match=r"8 tokens.*15 \(10 prompt \+ 5 new\).*gpu_memory_utilization"):
        scheduler.add(make([(10, 0, [5])])[0])


def test_blocks_refuse_misuse():
    blocks = BlockManager(2, 4)
    table = blocks.allocate(2)
    with pytest.raises(OutOfBlocks, match="1 KV blocks asked for, 0 of 2 free"):
        blocks.allocate(1)
    assert blocks.make_writable(table, 3) is None
    with pytest.raises(OutOfBlocks):
        blocks.make_writable(table, 8)
    assert len(table) == 2
    with pytest.raises(ValueError, match="gap"):
        blocks.make_writable(table, 12)
    copy = list(table)
    blocks.free(table)
    blocks.free(table)
    assert blocks.available == 2
    with pytest.raises(ValueError, match="cannot be freed"):
        blocks.free(copy)
    with pytest.raises(ValueError, match="cannot be shared"):
        blocks.share([0])


def test_the_scheduler_needs_no_torch():
    import subprocess

    code = (
        "import sys; import pronghorn.rollout.native.scheduler, pronghorn.rollout.native.stopping;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_admission_waits_for_several_free_rows_once_full():
    sequences = make([(4, i, [2 + i % 8]) for i in range(24)])
    blocks = BlockManager(200, 4)
    scheduler, model = Scheduler(blocks, 8, 1000, 4), Model(blocks)
    for sequence in sequences:
        scheduler.add(sequence)
    admitted = []
    while (step := scheduler.next_step()) is not None:
        if step.prefill:
            admitted.append(len(step.prefill))
        for sequence in model.run(step):
            sequence.output.append(1)
            if len(sequence.output) == sequence.max_new:
                scheduler.finish(sequence)
    assert sum(admitted) == 24 and admitted[0] == 8 and min(admitted[:-1]) >= 4
