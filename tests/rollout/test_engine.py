"""The engine's edges: sharing, stopping, limits, interrupts, memory."""

from __future__ import annotations

import gc

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.config.sampling import SamplingParams
from pronghorn.models import unwrap
from pronghorn.models.parts import HELD, HeldOf, held_bytes, held_weights, read_parts
from pronghorn.models.tree import layers
from pronghorn.rollout import base
from tests.helpers import tiny_llama
from tests.rollout.conftest import load, with_lora

PROMPT = [0, *range(50, 79)]


def test_weights_are_the_models_own(tmp_path):
    model, tokenizer = load(tiny_llama(tmp_path, tie_word_embeddings=True))
    model = with_lora(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    values = [p.detach().clone() for p in model.parameters()]
    shapes = {p.shape for p in model.parameters() if p.dim() == 2}

    def like_weights() -> list[torch.Tensor]:
        gc.collect()
        each = (t for t in gc.get_objects() if type(t) is torch.Tensor)
        return [t for t in each if t.shape in shapes and t.dtype == torch.float32]

    before = like_weights()  # other tests' as well; held here, so that no new tensor can take their place
    known = {*pointers, *(t.data_ptr() for t in before)}

    def copies() -> list[torch.Size]:
        return [t.shape for t in like_weights() if t.data_ptr() not in known]

    engine = base.create("native", model, tokenizer)
    engine.generate([PROMPT] * 3, SamplingParams(n=2, max_tokens=10))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters()))
    assert copies() == []
    copy = model.get_input_embeddings().weight.detach().clone()
    assert copies() == [copy.shape], "a copy would have been seen"


def test_a_new_kv_cache_takes_the_place_of_training_s_dequantized_weights(tmp_path):
    model, tokenizer = load(tiny_llama(tmp_path))
    model.requires_grad_(False)
    for layer in layers(model):
        parts = read_parts(layer, "silu")
        assert not isinstance(parts, str), parts
        vars(layer)[HELD] = HeldOf(None, held_weights(parts.rounded(torch.float32), torch.float32))
    assert held_bytes(layers(model)) > 0
    base.create("native", model, tokenizer).generate([PROMPT], SamplingParams(max_tokens=2))
    assert held_bytes(layers(model)) == 0


def test_the_prompt_is_prefilled_once_for_its_samples(loaded):
    model, tokenizer = loaded
    tokens: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: tokens.append(args[0].numel()))
    try:
        base.create("native", model, tokenizer).generate([PROMPT], SamplingParams(n=8, max_tokens=5, ignore_eos=True))
        assert tokens == [30, 8, 8, 8, 8]
        tokens.clear()
        one = SamplingParams(max_tokens=2, ignore_eos=True)
        base.create("native", model, tokenizer).generate([PROMPT, PROMPT, [0, 5]], one)
        assert tokens == [32, 3], "equal prompts of separate requests share it as well"
    finally:
        hook.remove()


def test_finished_rows_leave_and_results_keep_their_order(loaded):
    model, tokenizer = loaded
    batches: list[int] = []
    hook = model.model.embed_tokens.register_forward_hook(lambda _m, args, _o: batches.append(args[0].numel()))
    seen: list[tuple[int, int, int]] = []
    try:
        lengths = [9, 2, 5, 1]
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
        outputs = base.create("native", model, tokenizer).generate(
            [[0, i] for i in range(4)], params, progress=lambda *a: seen.append(a)
        )
    finally:
        hook.remove()
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    assert [o.prompt_token_ids for o in outputs] == [[0, i] for i in range(4)]
    assert batches == [8, 3, 2, 2, 2, 1, 1, 1, 1]
    assert all(o.outputs[0].finish_reason == "length" and o.finished for o in outputs)
    assert seen[0] == (1, 4, 4) and seen[-1] == (4, 4, sum(lengths))


def say(model, monkeypatch, script: list[int]) -> None:
    """Make the runner's logits spell ``script`` for every row, then token 7 for ever."""
    from pronghorn.rollout.native.runner import Runner

    run = Runner.run

    def scripted(self, step):
        logits, sequences = run(self, step)
        logits = torch.zeros_like(logits)
        for row, sequence in enumerate(sequences):
            at = len(sequence.output)
            logits[row, script[at] if at < len(script) else 7] = 100.0
        return logits, sequences

    monkeypatch.setattr(Runner, "run", scripted)


def complete(loaded, monkeypatch, text: str | list[int], **settings) -> base.CompletionOutput:
    model, tokenizer = loaded
    script = tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else text
    say(model, monkeypatch, script)
    params = SamplingParams(**{"temperature": 0, "max_tokens": 40, **settings})
    return base.create("native", model, tokenizer).generate([PROMPT], params)[0].outputs[0]


@pytest.mark.parametrize("eos", [1, 4, 5])
def test_each_of_the_three_ends_stops(loaded, monkeypatch, eos):
    out = complete(loaded, monkeypatch, [50, 51, eos])
    assert (out.token_ids, out.finish_reason, out.stop_reason) == ([50, 51, eos], "stop", None)
    assert out.text == loaded[1].decode([50, 51])
    assert len(complete(loaded, monkeypatch, [50, eos], ignore_eos=True).token_ids) == 40
    assert len(complete(loaded, monkeypatch, [50, eos], min_tokens=10).token_ids) == 40  # it says 7 from then on


def test_stop_ids(loaded, monkeypatch):
    out = complete(loaded, monkeypatch, [50, 51, 60, 52], stop_token_ids=[60])
    assert (out.token_ids, out.finish_reason, out.stop_reason) == ([50, 51, 60], "stop", 60)
    assert out.text == loaded[1].decode([50, 51])
    out = complete(loaded, monkeypatch, [50, 51, 60], stop_token_ids=[60], include_stop_str_in_output=True)
    assert out.text == loaded[1].decode([50, 51, 60])


def test_stop_strings_across_tokens(loaded, monkeypatch):
    text = "The answer is <answer>\n19\n</answer> and more"
    out = complete(loaded, monkeypatch, text, stop="</answer>")
    assert out.text == "The answer is <answer>\n19\n"
    assert (out.finish_reason, out.stop_reason) == ("stop", "</answer>")
    kept = loaded[1].decode(out.token_ids)
    assert "</answer>" in kept and "more" not in kept
    out = complete(loaded, monkeypatch, text, stop=["zzz", "</answer>", "r>"], include_stop_str_in_output=True)
    assert out.text == "The answer is <answer>", "the first match in the text"
    out = complete(loaded, monkeypatch, text, stop=["wer is <an"])
    assert out.text == "The ans"
    out = complete(loaded, monkeypatch, text, stop=["never"])
    assert out.finish_reason == "length" and out.text.startswith(text)


def test_a_stop_string_of_several_bytes(loaded, monkeypatch):
    text = "price 5€ now"  # the euro sign takes three byte tokens
    assert len(loaded[1]("€", add_special_tokens=False)["input_ids"]) == 3
    out = complete(loaded, monkeypatch, text, stop="€")
    assert (out.text, out.stop_reason) == ("price 5", "€")


def test_no_stop_string_before_min_tokens(loaded, monkeypatch):
    text = "a. b. c. d. e. f. g."
    first = complete(loaded, monkeypatch, text, stop=".")
    later = complete(loaded, monkeypatch, text, stop=".", min_tokens=6)
    assert first.text == "a"
    assert len(later.token_ids) >= 6 and later.text.count(".") >= 1


def test_alternatives_have_vllms_shape(loaded):
    model, tokenizer = loaded
    params = [SamplingParams(max_tokens=4, logprobs=2, seed=1), SamplingParams(max_tokens=4)]
    asked, other = base.create("native", model, tokenizer).generate([PROMPT, PROMPT], params)
    assert other.outputs[0].logprobs is None
    table = asked.outputs[0].logprobs
    assert len(table) == len(asked.outputs[0].token_ids)
    for token, policy, found in zip(asked.outputs[0].token_ids, asked.outputs[0].policy_logprobs, table):
        assert found[token].logprob == pytest.approx(policy, abs=1e-5)
        assert found[token].decoded_token == tokenizer.decode([token])
        assert len(found) in (2, 3) and {x.rank for x in found.values()} >= {1, 2}


def test_bad_prompts_are_named(loaded):
    model, tokenizer = loaded
    engine = base.create("native", model, tokenizer)
    with pytest.raises(ConfigError, match=r"prompts\[1\] is empty"):
        engine.generate([[1], []], SamplingParams())
    with pytest.raises(ConfigError, match=r"prompts\[0\] has 300 tokens.*max_seq_length=256; shorten"):
        engine.generate([[5] * 300], SamplingParams())
    with pytest.raises(ConfigError, match="outside the model's vocabulary of 384"):
        engine.generate([[1, 999]], SamplingParams())
    with pytest.raises(ConfigError, match="2 prompts with 1 sampling_params"):
        engine.generate([[1], [2]], [SamplingParams()])
    assert engine.generate([], SamplingParams()) == []


def test_completions_are_clipped_to_the_models_length(loaded):
    model, tokenizer = loaded
    engine = base.create("native", model, tokenizer)
    for limit in (None, 500):
        params = SamplingParams(max_tokens=limit, ignore_eos=True)
        (out,) = engine.generate([[0, *[9] * 239]], params)[0].outputs
        assert (len(out.token_ids), out.finish_reason) == (16, "length")


def test_a_cache_too_small_for_one_request(loaded, monkeypatch):
    model, tokenizer = loaded
    engine = base.create("native", model, tokenizer, num_kv_blocks=2)
    with pytest.raises(ConfigError, match=r"holds 32 tokens.*46 \(30 prompt \+ 16 new\).*max_tokens"):
        engine.generate([PROMPT], SamplingParams())
    assert len(engine.generate([[0, 9]], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids) == 4
    from pronghorn.rollout.native import kv_cache

    monkeypatch.setattr(kv_cache, "memory_budget", lambda *_: 1000)
    with pytest.raises(ConfigError, match="gpu_memory_utilization=0.6 leaves room for a KV cache of 0 tokens"):
        base.create("native", model, tokenizer).generate([PROMPT], SamplingParams())


@pytest.mark.parametrize(
    ("budget", "others", "blocks"),
    [(100, 0, 40), (40, 0, 40), (39, 0, 39), (100, 60, 40), (100, 61, 39), (60, 40, 20), (60, 41, 40), (35, 16, 35)],
)
def test_a_cache_leaves_room_for_weights_while_half_of_it_fits_beside_them(monkeypatch, budget, others, blocks):
    """40 blocks are needed, 9 at least; all sizes in blocks."""
    from pronghorn.rollout.native import kv_cache

    shape = kv_cache.KVShape(2, 1, 8, torch.float32, torch.device("cpu"))
    block = 4 * shape.token_bytes
    monkeypatch.setattr(kv_cache, "memory_budget", lambda *_: budget * block)
    assert kv_cache.capacity(shape, 4, 40, 9, 0.6, others * block) == blocks
    assert kv_cache.capacity(shape, 4, 4, budget, 0.6, others * block) == 4, "what the run needs, at most"


def test_unknown_engines_and_options(loaded):
    model, tokenizer = loaded
    with pytest.raises(ConfigError, match="did you mean 'native'"):
        base.create("nativ", model, tokenizer)
    with pytest.raises(ConfigError, match="max_num_seqs=0"):
        base.create("native", model, tokenizer, max_num_seqs=0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_frees_all_and_the_engine_goes_on(tmp_path, error):
    model, tokenizer = load(tiny_llama(tmp_path))
    model.train()
    engine = base.create("native", model, tokenizer)
    params = SamplingParams(n=4, max_tokens=20, seed=3, ignore_eos=True)
    expected = [c.token_ids for c in engine.generate([PROMPT], params)[0].outputs]
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == 15:
            raise error

    handle = model.model.layers[1].mlp.register_forward_hook(hook)
    with pytest.raises(error):
        engine.generate([PROMPT], params)
    handle.remove()
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()
    blocks = engine.scheduler.blocks
    assert blocks.available == blocks.num_blocks
    assert [c.token_ids for c in engine.generate([PROMPT], params)[0].outputs] == expected


def test_an_interrupt_in_the_progress_callback(loaded):
    model, tokenizer = loaded
    engine = base.create("native", model, tokenizer)

    def stop(finished, total, tokens):
        if tokens > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([PROMPT], SamplingParams(n=2, max_tokens=20), progress=stop)
    assert engine.scheduler.blocks.available == engine.scheduler.blocks.num_blocks


def test_memory_is_taken_when_needed_and_given_back(loaded):
    model, tokenizer = loaded
    engine = base.create("native", model, tokenizer)
    assert engine.cache is None
    params = SamplingParams(n=2, max_tokens=8, seed=1)
    first = engine.generate([PROMPT], params)
    cache = engine.cache
    assert cache.num_blocks <= 2 + 2 * 3 + 3
    engine.generate([PROMPT], params)
    assert engine.cache is cache, "kept between runs of a size"
    engine.generate([PROMPT] * 4, params)
    assert engine.cache.num_blocks > cache.num_blocks
    engine.release()
    assert engine.cache is None
    engine.release()
    assert [c.token_ids for c in engine.generate([PROMPT], params)[0].outputs] == [
        c.token_ids for c in first[0].outputs
    ]


def test_out_of_memory_names_the_remedy(loaded):
    model, tokenizer = loaded
    engine = base.create("native", model, tokenizer)

    def hook(*_):
        raise torch.OutOfMemoryError("tried to allocate 7 GiB")

    handle = model.model.layers[0].register_forward_pre_hook(hook)
    with pytest.raises(torch.OutOfMemoryError, match="lower gpu_memory_utilization .now 0.6.*7 GiB"):
        engine.generate([PROMPT], SamplingParams())
    handle.remove()
    assert engine.generate([PROMPT], SamplingParams())


def test_logits_that_are_no_numbers_raise(tmp_path):
    model, tokenizer = load(tiny_llama(tmp_path))
    engine = base.create("native", model, tokenizer)
    params = SamplingParams(n=2, max_tokens=20, seed=1)
    expected = [c.token_ids for c in engine.generate([PROMPT], params)[0].outputs]
    weight = model.model.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not numbers"):
        engine.generate([PROMPT], params)
    assert engine.cache is None, "dropped"
    with torch.no_grad():
        weight.copy_(kept)
    assert [c.token_ids for c in engine.generate([PROMPT], params)[0].outputs] == expected, "no NaN stays behind"


def test_the_engine_of_a_model_is_made_once_and_follows_its_wrapper(tmp_path):
    model, tokenizer = load(tiny_llama(tmp_path))
    engine = base.engine_of(model, tokenizer)
    peft = with_lora(model)
    assert base.engine_of(peft, tokenizer) is engine
    assert engine.model is peft and unwrap(peft) is model
