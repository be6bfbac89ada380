"""What goes wrong in a rollout, in either loop: one clear error, all blocks free, and the next rollout works."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.config.sampling import SamplingParams
from pronghorn.rollout import base
from pronghorn.rollout.native import engine as engine_module
from pronghorn.rollout.native import kv_cache
from pronghorn.rollout.native.decode_walk import PrefillWalk
from pronghorn.rollout.native.runner import LivePolicy
from tests.grpo.support import pronghorn_model
from tests.helpers import tiny_llama
from tests.rollout.conftest import load

PROMPT = [0, *range(50, 79)]
PARAMS = SamplingParams(n=4, max_tokens=40, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[Any, Any]:
    model, tokenizer = load(tiny_llama(tmp_path_factory.mktemp("llama")))
    return model.requires_grad_(False), tokenizer


@pytest.fixture(params=[True, False], ids=["ahead", "stepwise"])
def engine(loaded, request) -> Any:
    model, tokenizer = loaded
    return base.create("native", model, tokenizer, ahead=request.param)


def ids(outputs: list[base.RequestOutput]) -> list[list[int]]:
    return [c.token_ids for o in outputs for c in o.outputs]


def fail_at(monkeypatch: pytest.MonkeyPatch, engine: Any, call: int, error: BaseException) -> list[int]:
    """Sampling raises ``error`` at its call of this number: in a burst, or a step. The calls so far."""
    if engine.ahead:
        from pronghorn.rollout.native import decoder as module

        name = "sample_step"
    else:
        from pronghorn.rollout.native import stepwise as module  # type: ignore[no-redef]

        name = "sample"
    run, calls = getattr(module, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == call:
            raise error
        return run(*args, **kwargs)

    monkeypatch.setattr(module, name, failing)
    return calls


def assert_clean(engine: Any, expected: list[list[int]]) -> None:
    blocks = engine.scheduler.blocks
    assert blocks.available == blocks.num_blocks and not any(blocks.holders)
    if engine._decoder is not None:
        assert not engine._decoder.slot_of and not any(engine._decoder.slots)
        assert (engine._decoder.state.slots_B == -1).all()
    assert ids(engine.generate([PROMPT], PARAMS)) == expected


@pytest.mark.parametrize("call", [1, 2, 9, 25])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_the_middle(engine, monkeypatch, call, error):
    expected = ids(engine.generate([PROMPT], PARAMS))
    with monkeypatch.context() as patch:
        fail_at(patch, engine, call, error("now"))
        with pytest.raises(error):
            engine.generate([PROMPT], PARAMS)
    assert torch.is_grad_enabled()
    assert_clean(engine, expected)


def test_an_interrupt_in_a_prefill_and_in_the_progress_callback(engine, loaded):
    expected = ids(engine.generate([PROMPT], PARAMS))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = loaded[0].model.norm.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT], PARAMS)
    handle.remove()
    assert_clean(engine, expected)
    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT], PARAMS, progress=stop)
    assert_clean(engine, expected)


@pytest.mark.parametrize("call", [1, 2, 4])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.OutOfMemoryError("tried to allocate 7 GiB")])
def test_a_fault_in_a_later_chunk_of_a_prefill(engine, loaded, monkeypatch, call, error):
    """Some prompts are whole and have drawn, one is half computed, others wait."""
    model, tokenizer = loaded
    made = base.create("native", model, tokenizer, ahead=engine.ahead, max_prefill_tokens=16)
    prompts = [PROMPT[:9], PROMPT[:12], PROMPT, [0, 9]]
    expected = ids(made.generate(prompts, PARAMS))
    where, name = (PrefillWalk, "__call__") if engine.ahead else (LivePolicy, "hidden_states")
    walk, calls = getattr(where, name), []

    def failing(self: Any, ids_T: torch.Tensor, *args: Any) -> torch.Tensor:
        calls.append(len(ids_T))
        if len(calls) == call:
            raise error
        return walk(self, ids_T, *args)

    with monkeypatch.context() as patch:
        patch.setattr(where, name, failing)
        with pytest.raises(error if isinstance(error, type) else type(error)):
            made.generate(prompts, PARAMS)
    assert calls == [16, 16, 16, 5][:call], "prefills alone"
    assert (made._decoder is not None) == (engine.ahead and not isinstance(error, torch.OutOfMemoryError))
    assert_clean(made, ids(engine.generate([PROMPT], PARAMS)))
    assert ids(made.generate(prompts, PARAMS)) == expected


def test_blocks_that_run_out_preempt_and_all_are_served(engine, loaded):
    model, tokenizer = loaded
    expected = ids(engine.generate([PROMPT, [0, 9]], PARAMS))
    tight = base.create("native", model, tokenizer, ahead=engine.ahead, num_kv_blocks=18, block_size=4)
    assert ids(tight.generate([PROMPT, [0, 9]], PARAMS)) == expected
    assert tight.scheduler.preemptions > 0


def test_requests_that_cannot_be_served_are_refused_before_anything_runs(engine, loaded, monkeypatch):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match=r"prompts\[1\] is empty; give at least one token"):
        engine.generate([[1], []], PARAMS)
    with pytest.raises(ConfigError, match=r"prompts\[0\] has 300 tokens.*max_seq_length=256; shorten"):
        engine.generate([[5] * 300], PARAMS)
    small = base.create("native", model, tokenizer, ahead=engine.ahead, num_kv_blocks=3)
    with pytest.raises(ConfigError, match=r"holds 48 tokens.*70 \(30 prompt \+ 40 new\).*gpu_memory_utilization"):
        small.generate([[0, 9], PROMPT], PARAMS)
    assert small.scheduler.blocks.available == 3 and small.scheduler.next_step() is None
    with monkeypatch.context() as patch:
        patch.setattr(kv_cache, "memory_budget", lambda *_: 1000)
        fresh = base.create("native", model, tokenizer, ahead=engine.ahead)
        with pytest.raises(ConfigError, match="gpu_memory_utilization=0.6 leaves room for a KV cache of 0 tokens"):
            fresh.generate([PROMPT], PARAMS)


OUT = "tried to allocate 7 GiB"


def test_out_of_memory_is_one_error_with_the_remedy(engine, monkeypatch, capsys):
    expected = ids(engine.generate([PROMPT], PARAMS))
    with monkeypatch.context() as patch:
        calls = fail_at(patch, engine, 5, torch.OutOfMemoryError(OUT))
        with pytest.raises(torch.OutOfMemoryError, match="lower gpu_memory_utilization .now 0.6.*7 GiB"):
            engine.generate([PROMPT], PARAMS)
        assert len(calls) == 5, "nothing was tried again: nobody asked"
    assert engine.max_num_seqs == 256 and "again" not in capsys.readouterr().out
    assert engine.cache is None and engine._decoder is None, "what it held is free"
    assert_clean(engine, expected)


def test_a_smaller_batch_is_tried_where_the_user_asked(engine, monkeypatch, capsys):
    """Seeds make the retry say what the first try would have said."""
    engine.oom_retry = True
    expected = ids(engine.generate([PROMPT], PARAMS))
    seen: list[tuple[int, int, int]] = []
    with monkeypatch.context() as patch:
        fail_at(patch, engine, 5, torch.OutOfMemoryError(OUT))
        outputs = engine.generate([PROMPT], PARAMS, progress=lambda *a: seen.append(a))
    assert ids(outputs) == expected
    assert engine.max_num_seqs == 2
    said = capsys.readouterr().out
    assert said.count("again with max_num_seqs=2") == 1 and "ran out of memory" in said
    assert seen[-1][:2] == (4, 4)
    engine.max_num_seqs = 256
    assert_clean(engine, expected)


def full_at(monkeypatch: pytest.MonkeyPatch, what: str) -> list[int]:
    """The first making of the cache, the slots and graphs, or the adapters' roundings finds the memory full. The calls
    so far."""
    owner, name = {
        "cache": (torch, "zeros"),
        "decoder": (engine_module, "Decoder"),
        "adapters": (engine_module, "prepared"),
        "snapshot": (engine_module, "Snapshot"),
    }[what]
    make, calls = getattr(owner, name), []

    def full(*args: Any, **kwargs: Any) -> Any:
        if what != "cache" or (isinstance(args[0], tuple) and len(args[0]) == 4):  # keys or values of a layer
            calls.append(len(calls))
            if len(calls) == 1:
                raise torch.OutOfMemoryError(OUT)
        return make(*args, **kwargs)

    monkeypatch.setattr(owner, name, full)
    return calls


@pytest.mark.parametrize("what", ["cache", "decoder", "adapters"])
def test_out_of_memory_before_the_first_step_is_the_same_error(engine, monkeypatch, what):
    if what == "decoder" and not engine.ahead:
        pytest.skip("no slots and graphs here")
    expected = ids(engine.generate([PROMPT], PARAMS))
    engine.release()
    with monkeypatch.context() as patch:
        calls = full_at(patch, what)
        why = "the KV cache of 352 tokens needs 0.00 GiB, .*7 GiB" if what == "cache" else "tried to allocate 7 GiB"
        with pytest.raises(torch.OutOfMemoryError, match=f"of 4 .*lower gpu_memory_utilization.*max_tokens: {why}"):
            engine.generate([PROMPT], PARAMS)
        assert len(calls) == 1, "nothing was tried again: nobody asked"
    assert engine.cache is None and engine._decoder is None
    assert_clean(engine, expected)


@pytest.mark.parametrize("what", ["cache", "decoder"])
def test_a_cache_or_graphs_that_do_not_fit_are_made_for_fewer_rows(engine, monkeypatch, capsys, what):
    if what == "decoder" and not engine.ahead:
        pytest.skip("no slots and graphs here")
    engine.oom_retry = True
    expected = ids(engine.generate([PROMPT], PARAMS))
    blocks = engine.cache.num_blocks
    engine.release()
    with monkeypatch.context() as patch:
        full_at(patch, what)
        assert ids(engine.generate([PROMPT], PARAMS)) == expected
    assert engine.max_num_seqs == 2 and engine.cache.num_blocks < blocks
    assert capsys.readouterr().out.count("again with max_num_seqs=2") == 1


@pytest.mark.parametrize("what", ["snapshot", "cache", "decoder"])
def test_out_of_memory_while_a_drawing_is_made_ready(monkeypatch, what):
    """With the remedy, nothing held, nothing tried again; and what was ready before is not drawn from a cache that is
    gone."""
    model = pronghorn_model()
    engine = base.create("native", model, model.get_base_model().pronghorn_state.tokenizer, ahead=True, oom_retry=True)
    expected = ids(engine.ready([PROMPT], PARAMS, 1.0)())
    before = engine.ready([PROMPT], PARAMS, 1.0)
    if what != "snapshot":
        engine.release()
    else:
        engine._snapshot = None
    with monkeypatch.context() as patch:
        calls = full_at(patch, what)
        with pytest.raises(torch.OutOfMemoryError, match="of 4 completions.*lower gpu_memory_utilization.*7 GiB"):
            engine.ready([PROMPT], PARAMS, 1.0)
        assert len(calls) == 1
    assert engine.cache is None and engine._decoder is None and engine.max_num_seqs == 256
    with pytest.raises(RuntimeError, match="another generation ran"):
        before()
    assert ids(engine.ready([PROMPT], PARAMS, 1.0)()) == expected
    drawing = engine.ready([PROMPT], PARAMS, 1.0)
    with monkeypatch.context() as patch:
        fail_at(patch, engine, 5, torch.OutOfMemoryError(OUT))
        with pytest.raises(torch.OutOfMemoryError, match="lower gpu_memory_utilization.*7 GiB"):
            drawing()
    assert engine.cache is None and ids(engine.ready([PROMPT], PARAMS, 1.0)()) == expected


def test_a_retry_gives_up_at_one_row(engine, loaded):
    engine.oom_retry = True

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError(OUT)

    handle = loaded[0].model.norm.register_forward_pre_hook(full)
    with pytest.raises(torch.OutOfMemoryError, match="generation of 4 completions"):
        engine.generate([PROMPT], PARAMS)
    handle.remove()
    assert engine.max_num_seqs == 1


def test_unseeded_requests_keep_their_seeds_in_a_retry(engine, monkeypatch):
    engine.oom_retry = True
    params = SamplingParams(n=4, max_tokens=12, ignore_eos=True)
    torch.manual_seed(11)
    expected = ids(engine.generate([PROMPT], params))
    torch.manual_seed(11)
    fail_at(monkeypatch, engine, 5, torch.OutOfMemoryError(OUT))
    assert ids(engine.generate([PROMPT], params)) == expected


def test_rest_gives_back_what_is_more_than_its_share(engine, monkeypatch):
    assert engine.rest(0.0) is False, "nothing is held yet"
    expected = ids(engine.generate([PROMPT], PARAMS))
    held = engine.held_bytes
    assert held == engine.cache.bytes > 0
    monkeypatch.setattr(engine_module, "total_memory", lambda device: 10 * held)
    cache = engine.cache
    assert engine.rest(0.1) is False and engine.cache is cache
    assert engine.rest(0.09) is True and engine.cache is None and engine._decoder is None and engine.held_bytes == 0
    assert engine.rest(0.0) is False
    assert ids(engine.generate([PROMPT], PARAMS)) == expected, "it wakes by itself"


def test_the_memory_of_this_machine_is_known():
    assert kv_cache.total_memory(torch.device("cpu")) > 2**28
