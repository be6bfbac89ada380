"""Properties of the scheduler under arrivals at any time, ends at any time, and steps that run ahead of the host."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.config.sampling import SamplingParams
from pronghorn.rollout.native.blocks import BlockManager, blocks_for
from pronghorn.rollout.native.request import Prompt, Sequence
from pronghorn.rollout.native.scheduler import Scheduler, Step
from tests.rollout.test_scheduler import Model


class Watched(Scheduler):
    """Says whether looking ahead cost anybody its place, and whether anybody lost what nobody had taken in."""

    def _preempt(self, sequence: Sequence) -> None:
        assert not any(s.unseen for s in self.running), "who has ended is known before anybody has to go"
        super()._preempt(sequence)

    def _look_ahead(self, rows: list[Sequence], ahead: int) -> int:
        before, running = self.preemptions, list(self.running)
        more = super()._look_ahead(rows, ahead)
        assert self.preemptions == before and self.running == running, "looking ahead preempts nobody"
        assert 1 <= more <= max(ahead, 1)
        size = self.blocks.block_size
        for row in rows:
            last = min(len(row) - 1 + more, row.longest)
            assert len(row.table) >= blocks_for(last, size), "a block for each position that the burst writes"
        if more < min(ahead, max(row.longest - len(row) for row in rows)):
            assert self.blocks.available == 0, "cut short for want of blocks alone"
        return more


@dataclass
class Arrival:
    """A sequence, when it comes, and how many tokens it says before it ends: by a stop string where not ``told``, which
    a GPU knows nothing of."""

    sequence: Sequence
    at: int
    end: int
    told: bool


@dataclass
class Run:
    """What happened to all of them; ``drawn`` is what a GPU knows."""

    drawn: dict[Sequence, int] = field(default_factory=dict)
    ended: list[Sequence] = field(default_factory=list)
    first_drawn: list[Sequence] = field(default_factory=list)
    ended_in: dict[Sequence, int] = field(default_factory=dict)
    steps: int = 0
    overlapped: int = 0


Shape = list[tuple[int, int, int, list[tuple[int, int, bool]]]]


def arrivals(shape: Shape) -> list[Arrival]:
    """From ``(prompt tokens, which prompt, when, [(most tokens, tokens short of it, told)])``, as they come."""
    prompts: dict[tuple[int, int], Prompt] = {}
    out: list[Arrival] = []
    for request, (length, which, at, samples) in enumerate(sorted(shape, key=lambda s: s[2])):
        prompt = prompts.setdefault((length, which), Prompt(list(range(length))))
        for index, (most, short, told) in enumerate(samples):
            sequence = Sequence(len(out), request, index, prompt, SamplingParams(), max_new=most)
            out.append(Arrival(sequence, at, max(most - short, 1), told))
    return out


def check_step(scheduler: Scheduler, step: Step) -> None:
    """What holds of every step before it runs."""
    blocks = scheduler.blocks
    if not step.prefill and not step.decode:
        assert any(s.unseen for s in scheduler.running), "there is something to look at"
        assert not step.copies
    assert not (step.prefill and step.decode)
    assert all(not s.unseen for s in scheduler.waiting)
    assert len(scheduler.running) <= scheduler.max_rows
    assert sum(c.stop - c.start for c in step.prefill) <= scheduler.prefill_tokens
    held = [b for s in scheduler.running for b in s.table]
    assert [held.count(b) for b in range(blocks.num_blocks)] == blocks.holders, "blocks are held by tables alone"
    assert all(not s.table for s in scheduler.waiting)
    for s in scheduler.running:
        assert len(s.table) <= blocks_for(s.longest, blocks.block_size), "no block past the longest that it can come to"
        assert len(set(s.table)) == len(s.table)
    for s in step.decode:
        for position in range(len(s) - 1, min(len(s) - 1 + step.ahead, s.longest - 1)):
            block = s.table[position // blocks.block_size]
            assert blocks.holders[block] == 1, "a step writes to blocks of its own alone"
    targets = [target for _, target in step.copies]
    assert len(set(targets)) == len(targets)


def decode(model: Model, step: Step, run: Run, end: dict[Sequence, int]) -> None:
    """A burst: ``ahead`` steps; a row that has drawn its last token writes no more, as on the GPU."""
    for more in range(step.ahead):
        going = [s for s in step.decode if run.drawn[s] < end[s]]
        for s in going:
            count = len(s.prompt) + run.drawn[s]
            model.write(s, count - 1, count)
        for s in going:
            model.check(s, len(s.prompt) + run.drawn[s])
            run.drawn[s] += 1
        if more == 0:
            assert all(s in going or s.unseen for s in step.decode), "who is known to have ended has left"
    for s in step.decode:
        s.unseen += step.ahead


@dataclass
class Begun:
    """A look that was begun: who had drawn how many tokens then, and how many at most since the look before."""

    drawn: dict[Sequence, int]
    covered: dict[Sequence, int]


def begin(scheduler: Scheduler, run: Run) -> Begun:
    rows = [s for s in scheduler.running if s.unseen]
    assert all(len(s.output) < run.drawn[s] <= len(s.output) + s.unseen for s in rows)
    return Begun({s: run.drawn[s] for s in rows}, {s: s.unseen for s in rows})


def take(scheduler: Scheduler, begun: Begun, run: Run, end: dict[Sequence, int]) -> None:
    """The host takes in what was drawn until then, whatever was drawn since."""
    for s, drawn in begun.drawn.items():
        assert s in scheduler.running, "who is looked at is still there"
        s.unseen -= begun.covered[s]
        s.output += [7] * (min(drawn, end[s]) - len(s.output))
        if len(s.output) == end[s]:
            scheduler.finish(s)
            run.ended.append(s)
            run.ended_in[s] = run.steps
        else:
            assert s.computed == len(s) - 1, "all but the newest token are in the cache"
    run.overlapped += any(s.unseen for s in scheduler.running)


EARLY, LATE, BEHIND = "after each prefill", "after a burst, and where it has to", "behind the next burst or prefill"


def play(scheduler: Scheduler, all_: list[Arrival], ahead: list[int], looks: str = EARLY) -> Run:
    """Run to the end; ``ahead`` are looks taken in turn, ``looks`` when the host takes them."""
    model, run = Model(scheduler.blocks), Run()
    coming, end = list(all_), {a.sequence: a.end for a in all_}
    end_on_gpu = {a.sequence: a.end if a.told else a.sequence.max_new for a in all_}
    favoured: dict[Sequence, int] = {}
    begun: Begun | None = None
    while True:
        while coming and coming[0].at <= run.steps:
            scheduler.add(coming.pop(0).sequence)
        step = scheduler.next_step(ahead[run.steps % len(ahead)])
        run.steps += 1
        assert run.steps < 20_000, "it does not end"
        if step is None:
            assert begun is None
            if not coming:
                return run
            run.steps = max(run.steps, coming[0].at)
            continue
        check_step(scheduler, step)
        oldest = min((s for s in [*scheduler.running, *scheduler.waiting]), key=lambda s: s.order)
        assert oldest in scheduler.running, "the oldest is never kept waiting"
        favoured.setdefault(oldest, oldest.preemptions)
        assert oldest.preemptions == favoured[oldest], "nor preempted, once it is the oldest"
        if step.prefill:
            for s in model.run(step):
                if s not in run.first_drawn:
                    run.first_drawn.append(s)
                run.drawn[s] = len(s.output) + 1
                s.unseen = 1
            if looks != EARLY and begun is None:
                continue
        elif step.decode:
            assert step.ahead <= ahead[(run.steps - 1) % len(ahead)]
            model.run(Step(copies=step.copies))
            decode(model, step, run, end_on_gpu)
        if looks != BEHIND:
            take(scheduler, begin(scheduler, run), run, end)
            continue
        if begun is None and not step.decode:
            begun = begin(scheduler, run)
        if begun is not None:
            take(scheduler, begun, run, end)
        begun = begin(scheduler, run) if step.decode and any(s.unseen for s in scheduler.running) else None


samples = st.lists(st.tuples(st.integers(1, 25), st.integers(0, 24), st.booleans()), min_size=1, max_size=5)
shapes = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 2), st.integers(0, 30), samples), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    spare=st.integers(0, 40),
    size=st.integers(1, 5),
    rows=st.integers(1, 9),
    budget=st.integers(1, 40),
    together=st.integers(1, 5),
    ahead=st.lists(st.integers(1, 17), min_size=1, max_size=3),
    looks=st.sampled_from([EARLY, LATE, BEHIND, BEHIND]),
)
def test_whoever_comes_ends_with_its_own_keys_and_no_block_leaks(
    shape, spare, size, rows, budget, together, ahead, looks
):
    all_ = arrivals(shape)
    blocks = BlockManager(max(blocks_for(a.sequence.longest, size) for a in all_) + spare, size)
    run = play(Watched(blocks, rows, budget, together), all_, ahead, looks)
    assert sorted(s.order for s in run.ended) == list(range(len(all_)))
    assert all(len(a.sequence.output) == a.end and not a.sequence.table for a in all_)
    orders = [s.order for s in run.first_drawn]
    assert orders == sorted(orders), "first come, first served"
    assert blocks.available == blocks.num_blocks and not any(blocks.holders)


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes, seed=st.randoms(use_true_random=False), ahead=st.integers(1, 9), looks=st.sampled_from([EARLY, LATE])
)
def test_who_ends_when_does_not_depend_on_the_order_of_coming(shape, seed, ahead, looks):
    """With room for all, the number of steps that a sequence takes is its own affair."""
    shape = [(length, which, 0, samples_) for length, which, _, samples_ in shape]
    shuffled = list(shape)
    seed.shuffle(shuffled)
    ends = []
    for one in (shape, shuffled):
        all_ = arrivals(one)
        scheduler = Watched(BlockManager(2000, 4), 100, 10_000)
        run = play(scheduler, all_, [ahead], looks)
        assert scheduler.preemptions == 0
        ends.append(sorted((len(s.prompt), s.max_new, a.end, run.ended_in[s]) for a in all_ for s in (a.sequence,)))
    assert ends[0] == ends[1]


@settings(max_examples=60, deadline=None)
@given(shape=shapes, spare=st.integers(0, 12), size=st.integers(1, 5))
def test_looking_ahead_says_what_single_steps_say(shape, spare, size):
    """The same sequences end with the same lengths."""
    runs = []
    for ahead, looks in ((1, EARLY), (16, EARLY), (16, LATE), (4, BEHIND), (16, BEHIND)):
        all_ = arrivals(shape)
        blocks = BlockManager(max(blocks_for(a.sequence.longest, size) for a in all_) + spare, size)
        run = play(Watched(blocks, 6, 30), all_, [ahead], looks)
        runs.append(sorted((s.order, len(s.output)) for s in run.ended))
    assert all(run == runs[0] for run in runs)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, budget=st.integers(1, 40), stop=st.integers(0, 30), spare=st.integers(0, 10))
def test_abort_frees_every_block_between_two_looks(shape, budget, stop, spare):
    all_ = arrivals(shape)
    blocks = BlockManager(max(blocks_for(a.sequence.longest, 4) for a in all_) + spare, 4)
    scheduler, model = Watched(blocks, 6, budget), Model(blocks)
    for a in all_:
        scheduler.add(a.sequence)
    for _ in range(stop):
        step = scheduler.next_step(4)
        if step is None or not step.prefill:
            break
        for s in model.run(step):
            s.unseen = 1
    scheduler.abort()
    assert blocks.available == blocks.num_blocks and not any(blocks.holders)
    assert not any(a.sequence.unseen for a in all_) and scheduler.next_step() is None


def test_a_burst_ends_where_the_blocks_do():
    prompt = Prompt([1, 2, 3])
    first, second = (Sequence(i, i, 0, prompt, SamplingParams(), max_new=40) for i in range(2))
    blocks = BlockManager(12, 4)  # one request's 43 tokens take 11
    scheduler = Watched(blocks, 4, 100)
    scheduler.add(first)
    scheduler.add(second)
    model = Model(blocks)
    for s in model.run(scheduler.next_step()):
        s.output.append(7)
    step = scheduler.next_step(16)
    assert step.decode == [first, second] and step.ahead == 16
    assert blocks.available == 12 - 2 * 5, "19 positions each, in 5 blocks"
    for s in step.decode:
        s.output += [7] * 16
        s.computed = len(s) - 1
    step = scheduler.next_step(16)
    assert step.decode == [first, second]
    assert step.ahead == 5, "positions 19 of both are the last that the 12 blocks hold: 24 tokens each"
    assert scheduler.preemptions == 0 and blocks.available == 0


def test_a_burst_is_no_longer_than_the_longest_row_has_left():
    sequences = [Sequence(i, i, 0, Prompt([i]), SamplingParams(), max_new=n) for i, n in enumerate((2, 7))]
    scheduler = Watched(BlockManager(100, 4), 4, 100)
    for s in sequences:
        scheduler.add(s)
    scheduler.next_step()
    for s in sequences:
        s.output.append(7)
        s.computed = len(s) - 1
    assert scheduler.next_step(16).ahead == 6
    assert [len(s.table) for s in sequences] == [1, 2]


def queued(scheduler: Scheduler, lengths: list[tuple[int, int]]) -> list[Sequence]:
    """Sequences of so many prompt tokens and at most so many new ones, each of a prompt of its own, in the queue."""
    sequences = [
        Sequence(i, i, 0, Prompt([i] * n), SamplingParams(), max_new=new) for i, (n, new) in enumerate(lengths)
    ]
    for s in sequences:
        scheduler.add(s)
    return sequences


def drawing(step: Step) -> list[Sequence]:
    """Who draws in this prefill; nobody looks."""
    found = [s for c in step.prefill if c.draws for s in (c.sequence, *c.followers)]
    for s in found:
        s.unseen = 1
    return found


def test_prefills_and_the_first_burst_need_no_look():
    scheduler = Watched(BlockManager(100, 4), 8, 10)
    first, second, third = queued(scheduler, [(10, 9), (25, 9), (5, 9)])
    assert [drawing(scheduler.next_step(4)) for _ in range(4)] == [[first], [], [], [second, third]]
    step = scheduler.next_step(4)
    assert step.decode == [first, second, third] and step.ahead == 4
    assert [s.computed for s in step.decode] == [14, 29, 9], "four tokens are read, the first one by the first step"
    assert [len(s.table) for s in step.decode] == [4, 8, 3], "blocks for the positions up to 13, 28 and 8"


def launched(step: Step) -> None:
    """It runs, and nobody looks."""
    for s in step.decode:
        s.unseen += step.ahead


def test_a_second_burst_is_planned_before_anybody_looks_at_the_first():
    scheduler = Watched(BlockManager(100, 4), 8, 10)
    (first,) = queued(scheduler, [(10, 30)])
    assert drawing(scheduler.next_step(4)) == [first]
    for burst in range(3):
        step = scheduler.next_step(4)
        assert step.decode == [first] and step.ahead == 4 and first.computed == 14 + 4 * burst
        launched(step)
    assert first.unseen == 13 and len(first.table) == 6


def test_looks_are_taken_with_another_burst_in_flight():
    all_ = arrivals([(10, i, 0, [(20, 3, i % 2 == 0)]) for i in range(4)])
    run = play(Watched(BlockManager(100, 4), 8, 100), all_, [4], BEHIND)
    assert run.overlapped == 3, "the looks at 5, 9 and 13 tokens; at 17 all have ended"
    assert play(Watched(BlockManager(100, 4), 8, 100), arrivals([(10, 0, 0, [(20, 3, True)])]), [4]).overlapped == 0


def test_whoever_has_certainly_ended_keeps_nobody_from_decoding():
    """Nobody waits for its row: it stays until the host looks, and no step is planned for it."""
    scheduler = Watched(BlockManager(100, 4), 8, 100)
    first, second = queued(scheduler, [(10, 5), (10, 20)])
    assert drawing(scheduler.next_step(4)) == [first, second]
    launched(scheduler.next_step(4))
    held = list(first.table)
    step = scheduler.next_step(4)
    assert step.decode == [second] and first.table == held and scheduler.running == [first, second]
    launched(step)
    third = Sequence(2, 2, 0, Prompt([2] * 10), SamplingParams(), max_new=5)
    scheduler.add(third)
    assert drawing(scheduler.next_step(4)) == [third], "a row is free beside them"
    launched(scheduler.next_step(4))
    assert first.unseen == third.unseen == 5 and second.unseen == 13


def test_where_blocks_are_short_the_host_looks_before_anybody_is_preempted():
    scheduler = Watched(BlockManager(7, 4), 8, 100)
    first, second = queued(scheduler, [(4, 20), (4, 20)])
    assert drawing(scheduler.next_step(4)) == [first, second]
    step = scheduler.next_step(8)
    assert step.decode == [first, second] and step.ahead == 8 and scheduler.blocks.available == 1
    launched(step)
    step = scheduler.next_step(8)
    assert not step.decode and not step.prefill and scheduler.preemptions == 0, "two want the one block that is left"
    for s in (first, second):
        s.unseen, s.output = 0, [7] * 9
    step = scheduler.next_step(8)
    assert step.decode == [first] and scheduler.preemptions == 1 and scheduler.waiting == [second]


def test_whoever_has_certainly_ended_makes_room_before_the_rest_decodes():
    scheduler = Watched(BlockManager(100, 4), 2, 10, admit_together=2)
    first, second, third = queued(scheduler, [(10, 1), (10, 9), (10, 9)])
    assert [drawing(scheduler.next_step(4)) for _ in range(2)] == [[first], [second]]
    step = scheduler.next_step(4)
    assert not step.prefill and not step.decode, "both rows are taken, and one of them by a sequence of one token"
    for s in (first, second):
        s.unseen, s.output, s.computed = 0, [7], len(s.prompt)
    scheduler.finish(first)
    assert drawing(scheduler.next_step(4)) == [third], "though one free row is fewer than are admitted at once"
    assert scheduler.next_step(4).decode == [second, third]


def test_few_that_have_certainly_ended_make_room_one_burst_later():
    """Else the GPU would wait for the host, which has to look and to launch a prefill, each time that a row is free."""
    scheduler = Watched(BlockManager(100, 4), 3, 10)
    first, second, third, fourth = queued(scheduler, [(10, 1), (10, 9), (10, 9), (10, 9)])
    assert [drawing(scheduler.next_step(4)) for _ in range(3)] == [[first], [second], [third]]
    step = scheduler.next_step(4)
    assert step.decode == [second, third] and step.ahead == 4 and scheduler.waiting == [fourth]
    first.unseen, first.output, first.computed = 0, [7], len(first.prompt)
    scheduler.finish(first)
    assert drawing(scheduler.next_step(4)) == [fourth]
