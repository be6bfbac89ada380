"""The endless order of prompts: TRL's permutations, exact at any cursor."""

from __future__ import annotations

from pronghorn.grpo.prompt_stream import PromptStream
from pronghorn.grpo.repeat_sampler import RepeatSampler


def test_the_order_is_the_repeat_samplers_epoch_after_epoch() -> None:
    stream = PromptStream(6, seed=5)
    for epoch in range(3):
        sampler = RepeatSampler(6, group=1, prompts=2, seed=5, epoch=lambda e=epoch: e)
        assert stream.take(6) == list(sampler)
    assert PromptStream(4, shuffle=False).take(9) == [0, 1, 2, 3, 0, 1, 2, 3, 0]


def test_any_split_and_any_resume_give_the_same_rows() -> None:
    whole = PromptStream(7, seed=1).take(40)
    stream, taken = PromptStream(7, seed=1), []
    for count in (1, 5, 9, 0, 25):
        again = PromptStream(7, seed=1)
        again.load_state_dict(stream.state_dict())
        stream = again
        taken += stream.take(count)
    assert taken == whole and stream.cursor == 40


def test_what_is_excluded_is_passed_over_while_there_is_anything_else() -> None:
    order = PromptStream(5, seed=2).take(5)
    stream = PromptStream(5, seed=2)
    assert stream.take(2, exclude={order[0], order[2]}) == [order[1], order[3]]
    assert PromptStream(2, seed=0).take(3, exclude={0, 1}) != []  # no endless search
