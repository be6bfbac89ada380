"""When the host looks: not between the chunks of a prefill, nor before the first burst, whatever ends meanwhile; and
from then on with the next burst in flight."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from pronghorn.config.sampling import SamplingParams
from pronghorn.rollout.native.decoder import Decoder
from pronghorn.rollout.native.look import Look
from pronghorn.rollout.native.runner import Runner
from tests.helpers import tiny_llama
from tests.rollout.conftest import load
from tests.rollout.test_decoder import PROMPTS, assert_same, both, said, watch_steps


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[Any, Any]:
    """A model whose base does not train, as under LoRA: its layers are fused."""
    model, tokenizer = load(tiny_llama(tmp_path_factory.mktemp("llama")))
    return model.requires_grad_(False), tokenizer


def watch_looks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """At every look to come, as it begins: most tokens that each row has drawn since the last."""
    looks: list[list[int]] = []
    begin = Decoder.begin_look

    def watched(self: Decoder, sequences: Any) -> Look:
        looks.append([s.unseen for s in sequences])
        return begin(self, sequences)

    monkeypatch.setattr(Decoder, "begin_look", watched)
    return looks


def watch_order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the host does, in its order: prefills, bursts, looks begun and taken."""
    events: list[str] = []

    def watch(owner: Any, name: str, event: str) -> None:
        do = getattr(owner, name)

        def watched(*args: Any) -> Any:
            events.append(event)
            return do(*args)

        monkeypatch.setattr(owner, name, watched)

    watch(Runner, "prefill", "prefill")
    watch(Decoder, "run", "burst")
    watch(Decoder, "begin_look", "begin")
    watch(Look, "take", "take")
    return events


def test_the_next_burst_is_launched_before_the_host_takes_the_look_at_the_one_before(loaded, monkeypatch):
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer)
    events = watch_order(monkeypatch)
    outputs = ahead.generate(PROMPTS, SamplingParams(n=2, max_tokens=30, seed=1, ignore_eos=True))
    between = ["burst", "take", "begin"]
    assert events == ["prefill", "burst", "begin", *between * 3, "take"], "1 + 8, 8, 8 and 5 tokens"
    assert said(outputs) == said(
        stepwise.generate(PROMPTS, SamplingParams(n=2, max_tokens=30, seed=1, ignore_eos=True))
    )


def test_texts_of_prompts_are_decoded_while_the_first_look_is_on_its_way(loaded, monkeypatch):
    """Each once, whatever its samples; where no text is asked for, none."""
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer)
    events, decode = watch_order(monkeypatch), tokenizer.decode

    def watched(ids: Any, **options: Any) -> str:
        if list(ids) in PROMPTS:
            events.append("text")
        return decode(ids, **options)

    monkeypatch.setattr(tokenizer, "decode", watched)
    params = SamplingParams(n=2, max_tokens=12, seed=1, ignore_eos=True)
    outputs = ahead.generate(PROMPTS, params)
    assert events == ["prefill", "burst", "begin", "burst", *["text"] * len(PROMPTS), "take", "begin", "take"]
    assert (
        [o.prompt for o in outputs]
        == [o.prompt for o in stepwise.generate(PROMPTS, params)]
        == [decode(ids) for ids in PROMPTS]
    )
    events.clear()
    quiet = ahead.generate(PROMPTS, dataclasses.replace(params, detokenize=False))
    assert "text" not in events and [o.prompt for o in quiet] == [None] * len(PROMPTS)


def test_a_prefill_too_is_launched_with_a_look_on_its_way(loaded, monkeypatch):
    """Of the second prompt's rows, once the first one's have ended by a stop id, which no length foretells."""
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer, max_num_seqs=2)
    plain = SamplingParams(max_tokens=30, seed=3, ignore_eos=True)
    ids = ahead.generate(PROMPTS[:1], plain)[0].outputs[0].token_ids
    at = next(i for i in range(9, 17) if ids.index(ids[i]) == i)
    first = SamplingParams(max_tokens=30, seed=3, ignore_eos=True, stop_token_ids=[ids[at]])
    params = [first, *[SamplingParams(max_tokens=60, seed=4 + i, ignore_eos=True) for i in range(3)]]
    events = watch_order(monkeypatch)
    assert_same(ahead, stepwise, params)
    behind = [i for i, e in enumerate(events) if e == "prefill" and i]
    assert events[behind[0] - 1 :][:4] == ["begin", "prefill", "take", "burst"]


def test_a_prefill_is_not_looked_at_however_many_chunks_it_has(loaded, monkeypatch):
    model, tokenizer = loaded
    params = SamplingParams(n=2, max_tokens=40, seed=1, ignore_eos=True)
    _, stepwise = both(model, tokenizer)
    expected = said(stepwise.generate(PROMPTS, params))
    looks, chunks, prefill = watch_looks(monkeypatch), [], Runner.prefill

    def watched(self: Runner, step: Any, *walk: Any) -> Any:
        chunks.append(sum(c.stop - c.start for c in step.prefill))
        return prefill(self, step, *walk)

    monkeypatch.setattr(Runner, "prefill", watched)
    for tokens, expected_chunks in ((4096, [94]), (40, [40, 40, 14]), (9, [9] * 10 + [4])):
        engine, _ = both(model, tokenizer, max_prefill_tokens=tokens)
        assert said(engine.generate(PROMPTS, params)) == expected
        assert chunks == expected_chunks
        assert looks == [[9] * 8, *[[8] * 8] * 3, [7] * 8], "the first token and 8 more, and so on, then the rest"
        looks.clear()
        chunks.clear()


def test_those_that_end_with_their_first_token_in_an_early_chunk(loaded, monkeypatch):
    """By a stop id, which the host cannot foresee: their rows idle until the look, and in the burst behind it."""
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer, max_prefill_tokens=9)
    plain = [SamplingParams(n=2, max_tokens=20, seed=20 + i, ignore_eos=True) for i in range(len(PROMPTS))]
    first = [o.outputs[0].token_ids[0] for o in assert_same(ahead, stepwise, plain)]
    looks = watch_looks(monkeypatch)
    for early in ([0], [1], [0, 1, 2], [3], [0, 1, 2, 3]):
        params = [
            SamplingParams(**{**p.__dict__, "stop_token_ids": [first[i]] if i in early else []})
            for i, p in enumerate(plain)
        ]
        looks.clear()
        outputs = assert_same(ahead, stepwise, params)
        lengths = [len(c.token_ids) for o in outputs for c in o.outputs]
        left = [sum(n > seen for n in lengths) for seen in (0, 9, 17)]
        assert [len(rows) for rows in looks] == [n for n in left if n] and looks[0] == [9] * 8
        for i in early:
            c = outputs[i].outputs[0]
            assert (c.token_ids, c.finish_reason, c.stop_reason) == ([first[i]], "stop", first[i])
            assert len(c.token_logprobs) == len(c.policy_logprobs) == 1


def test_those_that_are_known_to_end_with_their_first_token_make_room(loaded, monkeypatch):
    """By their length: no step runs for them, and whoever waits takes their rows before anybody decodes."""
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer, max_num_seqs=3, max_prefill_tokens=40)
    steps, looks = watch_steps(monkeypatch), watch_looks(monkeypatch)
    assert_same(ahead, stepwise, SamplingParams(n=4, max_tokens=1, seed=1))
    assert steps == [] and [sum(rows) for rows in looks] == [3] * 5 + [1]
    looks.clear()
    assert_same(ahead, stepwise, [SamplingParams(max_tokens=n, seed=n, ignore_eos=True) for n in (1, 9, 1, 9)])
    assert looks == [[1, 1, 1], [8, 9]] and {running for _, running in steps} == {2}


def test_rows_are_admitted_while_others_decode(loaded, monkeypatch):
    """Their first tokens are drawn beside tokens of rows in the middle, and looked at together."""
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer, max_num_seqs=4, max_prefill_tokens=9)
    looks = watch_looks(monkeypatch)
    params = [SamplingParams(n=2, max_tokens=n, seed=n, ignore_eos=True) for n in (3, 60, 21, 50)]
    assert_same(ahead, stepwise, params)
    assert any(len(set(rows)) == 2 for rows in looks), "9 unseen tokens of new rows beside 8 of old ones"


def test_a_prefill_can_be_stopped_between_its_chunks(loaded):
    """Progress is reported at every chunk, though nothing new is known."""
    model, tokenizer = loaded
    engine, _ = both(model, tokenizer, max_prefill_tokens=9)
    seen: list[tuple[int, int, int]] = []
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    expected = said(engine.generate(PROMPTS, params, progress=lambda *a: seen.append(a)))
    assert seen == [(0, 4, 0)] * 11 + [(0, 4, 36), (0, 4, 68), (4, 4, 80)]

    def stop(*_: int) -> None:
        seen.append((0, 0, 0))
        if len(seen) == 4:
            raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        engine.generate(PROMPTS, params, progress=stop)
    blocks = engine.scheduler.blocks
    assert blocks.available == blocks.num_blocks and not any(engine._decoder.slots)
    assert said(engine.generate(PROMPTS, params)) == expected


def test_one_row_without_numbers_in_an_early_chunk_raises_though_others_follow(loaded, monkeypatch):
    model, tokenizer = loaded
    engine, _ = both(model, tokenizer, max_prefill_tokens=20)
    params = SamplingParams(max_tokens=20, seed=1)
    expected = said(engine.generate(PROMPTS, params))
    sample, calls = Decoder._sample, []

    def broken(self: Decoder, x_NV: torch.Tensor, rows_N: torch.Tensor | None) -> None:
        calls.append(rows_N is None)
        if len(calls) == 1:
            x_NV[0] = float("nan")
        sample(self, x_NV, rows_N)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "_sample", broken)
        with pytest.raises(FloatingPointError, match="not numbers"):
            engine.generate(PROMPTS, params)
    assert calls.count(False) > 1, "its successors were launched before anybody looked"
    assert engine.cache is None, "no NaN stays behind"
    assert said(engine.generate(PROMPTS, params)) == expected
