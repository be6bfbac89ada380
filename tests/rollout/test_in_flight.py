"""Two bursts in flight: the host takes a look while the next burst runs, and nobody gets a token, a block or a slot too
many or too few by it, however it ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pronghorn.config.sampling import SamplingParams
from pronghorn.kernels.sample_state import SampleState
from pronghorn.rollout.native import ahead as ahead_module
from pronghorn.rollout.native.decoder import Decoder
from pronghorn.rollout.native.ending import Ending
from pronghorn.rollout.native.look import Look
from pronghorn.rollout.native.plan import make_sequences
from pronghorn.rollout.native.request import Sequence
from pronghorn.rollout.native.scheduler import Scheduler
from tests.helpers import tiny_llama
from tests.rollout.conftest import load
from tests.rollout.test_decoder import PROMPTS, assert_same, both, said

PARAMS = SamplingParams(n=2, max_tokens=40, seed=1, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[Any, Any]:
    """A model whose base does not train, as under LoRA: its layers are fused."""
    model, tokenizer = load(tiny_llama(tmp_path_factory.mktemp("llama")))
    return model.requires_grad_(False), tokenizer


# Random schedules

lengths = st.one_of(st.just(1), st.integers(1, 9), st.integers(10, 50))
requests = st.builds(
    dict,
    n=st.integers(1, 4),
    max_tokens=lengths,
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.8]),
    stop_token_ids=st.sampled_from([[], [], [*range(60, 75)], [*range(100, 180, 3)]]),
    stop=st.sampled_from([[], [], ["1"], ["a", "7"], ["e"]]),
    ignore_eos=st.booleans(),
)
schedules = st.builds(
    dict,
    max_num_seqs=st.integers(1, 17),
    num_kv_blocks=st.integers(32, 60),
    block_size=st.just(3),
    max_prefill_tokens=st.integers(7, 60),
)
SEEN: Counter[str] = Counter()


@pytest.fixture
def watched(monkeypatch) -> Iterator[Counter[str]]:
    """What happened, so that a test can say that it did; and what must not happen to tokens in flight."""
    begun: list[Look] = []
    begin, take, preempt, move = Decoder.begin_look, Look.take, Scheduler._preempt, SampleState.move
    finish = Scheduler.finish

    def beginning(self: Decoder, sequences: Any) -> Look:
        assert not begun, "the look before was taken"
        begun.append(begin(self, sequences))
        return begun[0]

    def taking(self: Look) -> Any:
        assert begun.pop() is self
        drawn = take(self)
        SEEN["in flight"] += any(s.unseen for s in self.sequences)
        return drawn

    def preempting(self: Scheduler, sequence: Sequence) -> None:
        assert not begun and not any(s.unseen for s in self.running)
        SEEN["preempted"] += 1
        preempt(self, sequence)

    def moving(*args: Any) -> None:
        SEEN["moved"] += 1
        SEEN["moved with a look begun"] += len(begun)
        move(*args)

    def finishing(self: Scheduler, sequence: Sequence) -> None:
        SEEN["stop string in flight"] += isinstance(sequence.stop_reason, str) and sequence.unseen > 0
        SEEN["stop id in flight"] += isinstance(sequence.stop_reason, int) and sequence.unseen > 0
        finish(self, sequence)

    monkeypatch.setattr(Decoder, "begin_look", beginning)
    monkeypatch.setattr(Look, "take", taking)
    monkeypatch.setattr(Scheduler, "_preempt", preempting)
    monkeypatch.setattr(Scheduler, "finish", finishing)
    monkeypatch.setattr(SampleState, "move", moving)
    SEEN.clear()
    yield SEEN
    assert not begun


def test_random_schedules_say_what_the_loop_that_looks_at_all_says(loaded, watched, monkeypatch):
    model, tokenizer = loaded

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(
        asked=st.lists(requests, min_size=4, max_size=4),
        schedule=schedules,
        steps=st.integers(1, 9),
        few=st.integers(0, 8),
    )
    def run(asked: list[dict[str, Any]], schedule: dict[str, int], steps: int, few: int) -> None:
        monkeypatch.setattr(ahead_module, "STEPS", steps)
        monkeypatch.setattr(ahead_module, "FEW_STEPS", max(1, steps // 2))
        monkeypatch.setattr(ahead_module, "_FEW", few)
        assert_same(*both(model, tokenizer, **schedule), [SamplingParams(**r) for r in asked])

    run()
    expected = {"in flight", "preempted", "moved", "stop string in flight", "stop id in flight"}
    assert all(watched[what] >= 5 for what in expected), watched


def test_a_row_that_the_gpu_does_not_know_to_have_ended_draws_on_into_blocks_that_others_get_behind_it(loaded, watched):
    """By a stop string; every block is wanted, so what it held is another's in the next prefill."""
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer, max_num_seqs=4, num_kv_blocks=34, block_size=3, max_prefill_tokens=40)
    params = [SamplingParams(n=6, max_tokens=50, seed=s, stop=["e", "1"], ignore_eos=True) for s in (1, 2, 3, 4)]
    outputs = assert_same(ahead, stepwise, params)
    assert sum(c.finish_reason == "stop" for o in outputs for c in o.outputs) > 8
    assert watched["stop string in flight"] > 8 and watched["preempted"]


# Rows and looks of a decoder


def rows_of(loaded: Any, count: int, max_tokens: int = 20) -> tuple[Decoder, list[Sequence]]:
    """A decoder with so many rows in its slots, in the middle of their prompt's answer."""
    model, tokenizer = loaded
    engine, _ = both(model, tokenizer)
    params = SamplingParams(
        n=8, max_tokens=max_tokens, ignore_eos=True, repetition_penalty=1.2, presence_penalty=0.5, seed=5
    )
    engine.generate([[0, 5]], params)
    decoder = engine._decoder
    rows = make_sequences([[0, 9, 8]], params, 256, 384, frozenset())[:count]
    for i, row in enumerate(rows):
        row.output = [20 + i]
        row.table = [i]
    decoder.begin(rows)
    decoder.admit(rows)
    return decoder, rows


def test_a_look_shows_what_was_drawn_until_it_began(loaded):
    """Taken late, it gives what it would have given at once, and leaves the rest unseen."""
    decoder, rows = rows_of(loaded, 3)
    decoder.run(rows, 2)
    look = decoder.begin_look(rows)
    at_once = Look(decoder.state, rows, [0, 1, 2]).take()
    for row in rows:
        row.unseen = 2
    decoder.run(rows, 3)
    decoder.release(rows[1:2])
    decoder.admit(rows_of(loaded, 1)[1])
    late = look.take()
    assert late == at_once and [len(d.tokens) for d in late] == [2] * 3
    assert [row.unseen for row in rows] == [3] * 3
    for row, drawn in zip(rows, late):
        row.output += drawn.tokens
    rest = decoder.begin_look([rows[0], rows[2]]).take()
    assert [len(d.tokens) for d in rest] == [3, 3] and not any(d.ended for d in rest)
    state = decoder.state
    for row, first, then in zip((rows[0], rows[2]), (late[0], late[2]), rest):
        at = decoder.slot_of[id(row)]
        assert first.tokens + then.tokens == state.out_tokens_BT[at, 1:6].tolist()
        assert first.policy_logps + then.policy_logps == state.out_policy_logps_BT[at, 1:6].tolist()


def test_rows_move_as_they_stand_with_tokens_that_nobody_has_seen(loaded):
    """What they draw afterwards is what they would have drawn where they were; a look that was begun is as it was."""
    said_: list[Any] = []
    for moved in (True, False):
        decoder, rows = rows_of(loaded, 6)
        decoder.run(rows, 2)
        look = decoder.begin_look(rows)
        decoder.run(rows, 1)
        if moved:
            decoder.release(rows[:4])
        decoder.run(rows[4:], 3)
        assert [decoder.slot_of[id(row)] for row in rows[4:]] == ([0, 1] if moved else [4, 5])
        first = look.take()[4:]
        for row, drawn in zip(rows[4:], first):
            row.output += drawn.tokens
        said_.append((first, decoder.begin_look(rows[4:]).take()))
        if moved:
            assert (decoder.state.slots_B[2:] == -1).all() and decoder.slots[2:] == [None] * (len(decoder.slots) - 2)
    assert [len(d.tokens) for looks in said_ for look in looks for d in look] == [2, 2, 4, 4] * 2
    assert [[d.tokens for d in look] for look in said_[0]] == [[d.tokens for d in look] for look in said_[1]]
    for one, other in zip(*([d for look in looks for d in look] for looks in said_)):
        torch.testing.assert_close(
            one.policy_logps, other.policy_logps, rtol=0, atol=4e-6
        )  # two rows at a time, or six


def test_whoever_drew_its_last_token_leaves_its_slot_once_a_look_has_begun(loaded):
    decoder, rows = rows_of(loaded, 3, max_tokens=8)
    rows[0].max_new = 3
    decoder.release(rows)
    decoder.admit(rows)
    decoder.run(rows, 2)
    look = decoder.begin_look(rows)
    assert id(rows[0]) not in decoder.slot_of and len(decoder.slot_of) == 2
    assert [d.ended for d in look.take()] == [True, False, False]


# However it ends


def fails_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool) -> None:
    """The call of this number is interrupted, before it did what it does or after."""
    do, calls = getattr(owner, name), []

    def failing(*args: Any) -> Any:
        calls.append(name)
        if len(calls) == call and not after:
            raise KeyboardInterrupt
        found = do(*args)
        if len(calls) == call:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, name, failing)


PLACES: list[tuple[Any, str]] = [
    (Decoder, "run"),
    (Decoder, "_write_tables"),
    (Decoder, "begin_look"),
    (Decoder, "release"),
    (Decoder, "admit"),
    (Look, "take"),
    (Ending, "report"),
    (SampleState, "load"),
    (SampleState, "clear"),
]
CALLS = [(*place, call) for place in PLACES for call in (1, 2, 3)] + [(SampleState, "move", 1)]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("owner, name, call", CALLS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_an_interrupt_leaves_nothing_behind(loaded, owner, name, call, after):
    model, tokenizer = loaded
    engine, _ = both(model, tokenizer, max_num_seqs=6)
    params = [
        SamplingParams(n=n, max_tokens=m, seed=m, ignore_eos=True) for n, m in ((4, 20), (4, 12), (1, 30), (1, 60))
    ]
    expected = said(engine.generate(PROMPTS, params))
    with pytest.MonkeyPatch.context() as patch:
        fails_at(patch, owner, name, call, after)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, params)
    decoder, blocks = engine._decoder, engine.scheduler.blocks
    assert blocks.available == blocks.num_blocks and not any(blocks.holders)
    assert not any(decoder.slots) and not decoder.slot_of
    looks: list[Look] = []
    with pytest.MonkeyPatch.context() as patch:
        begin, take = Decoder.begin_look, Look.take

        def beginning(*args: Any) -> Look:
            looks.append(begin(*args))
            return looks[-1]

        def taking(self: Look) -> Any:
            assert looks and looks[-1] is self, "begun in this run"
            return take(self)

        patch.setattr(Decoder, "begin_look", beginning)
        patch.setattr(Look, "take", taking)
        assert said(engine.generate(PROMPTS, params)) == expected
    assert (decoder.state.slots_B == -1).all() and (decoder.state.lengths_B == 0).all()


def test_a_slot_that_an_interrupt_left_between_two_owners_is_free_in_the_next_run(loaded):
    decoder, rows = rows_of(loaded, 3)
    with pytest.MonkeyPatch.context() as patch:
        fails_at(patch, SampleState, "clear", 1, after=False)
        with pytest.raises(KeyboardInterrupt):
            decoder.release(rows[:2])
    assert (decoder.state.slots_B[:3] >= 0).all()
    decoder.clear()
    assert (decoder.state.slots_B == -1).all() and not decoder.slot_of


def test_no_numbers_in_one_burst_are_found_with_the_next_one_in_flight(loaded):
    model, tokenizer = loaded
    engine, _ = both(model, tokenizer)
    expected = said(engine.generate(PROMPTS, PARAMS))
    sample, calls = Decoder._sample, []

    def broken(self: Decoder, x_NV: torch.Tensor, rows_N: torch.Tensor | None) -> None:
        calls.append(rows_N is None)
        if len(calls) == 12:  # the prefill's draw, eight steps, and the third of the second burst
            x_NV[1] = float("nan")
        sample(self, x_NV, rows_N)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "_sample", broken)
        with pytest.raises(FloatingPointError, match="not numbers"):
            engine.generate(PROMPTS, PARAMS)
    assert len(calls) == 1 + 3 * 8, "the third burst was launched before the look at the second"
    assert engine.cache is None, "no NaN stays behind"
    blocks = engine.scheduler.blocks
    assert blocks.available == blocks.num_blocks
    assert said(engine.generate(PROMPTS, PARAMS)) == expected
