"""Rows in slots, several steps to a look of the host: the GPU's loop on the CPU, beside the loop that looks at all."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from pronghorn.config.errors import ConfigError
from pronghorn.config.load import LoadConfig
from pronghorn.config.sampling import SamplingParams
from pronghorn.loader import from_pretrained
from pronghorn.loader import get_peft_model as add_lora
from pronghorn.lora.config import register
from pronghorn.lora.io import load_lora, save_lora
from pronghorn.lora.projection import row_columns
from pronghorn.models.attention import PackedAttention
from pronghorn.models.forward import hidden_states, logits
from pronghorn.rollout import base
from pronghorn.rollout.native import decode_walk, dense, products
from pronghorn.rollout.native import decoder as decoder_module
from pronghorn.rollout.native.decoder import Decoder, Launched, bucket_of
from pronghorn.rollout.native.paged import PagedDecode
from pronghorn.rollout.native.plan import make_sequences
from tests.helpers import tiny_llama
from tests.rollout.conftest import load

PROMPTS = [[0, *range(40, 40 + n)] for n in (3, 17, 30, 40)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[Any, Any]:
    """A model whose base does not train, as under LoRA: its layers are fused."""
    model, tokenizer = load(tiny_llama(tmp_path_factory.mktemp("llama")))
    return model.requires_grad_(False), tokenizer


def both(model: Any, tokenizer: Any, **options: Any) -> tuple[Any, Any]:
    """Engines that run ahead, and that look at every token."""
    made = (base.create("native", model, tokenizer, ahead=ahead, **options) for ahead in (True, False))
    return next(made), next(made)


def said(outputs: list[base.RequestOutput]) -> list[list[tuple[Any, ...]]]:
    return [[(c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in o.outputs] for o in outputs]


def logps(outputs: list[base.RequestOutput]) -> torch.Tensor:
    """Both log-probs of every token, one behind the other."""
    each = [c for o in outputs for c in o.outputs]
    return torch.tensor([x for c in each for x in (*c.token_logprobs, *c.policy_logprobs)], dtype=torch.float64)


def assert_same(ahead: Any, stepwise: Any, params: Any, **given: Any) -> list[base.RequestOutput]:
    """Equal in all that is said. Float32 sums of 64 and 384 products in another order: log-probs to 4e-6."""
    one, other = ahead.generate(PROMPTS, params, **given), stepwise.generate(PROMPTS, params, **given)
    assert ahead._decoder is not None and stepwise._decoder is None
    assert said(one) == said(other)
    torch.testing.assert_close(logps(one), logps(other), rtol=0, atol=4e-6)
    blocks = ahead.scheduler.blocks
    assert blocks.available == blocks.num_blocks and not any(blocks.holders)
    return one


SETTINGS = {
    "drawn": SamplingParams(n=6, max_tokens=40, seed=1),
    "greedy": SamplingParams(n=3, max_tokens=50, temperature=0),
    "truncated": SamplingParams(n=4, max_tokens=45, seed=2, top_p=0.8, top_k=20, min_p=0.01, temperature=0.7),
    "penalised": SamplingParams(n=4, max_tokens=60, seed=2, top_k=50, repetition_penalty=1.3),
    "tallied": SamplingParams(n=4, max_tokens=60, seed=2, presence_penalty=0.7, frequency_penalty=0.9, top_p=0.9),
    "held": SamplingParams(n=5, max_tokens=60, seed=4, min_tokens=21),
}
OPTIONS: dict[str, dict[str, int]] = {
    "roomy": {},
    "few-rows": {"max_num_seqs": 5},
    "few-blocks": {"num_kv_blocks": 14, "max_prefill_tokens": 32},
    "small-blocks": {"block_size": 3, "max_prefill_tokens": 11},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_both_loops_say_the_same(loaded, settings, options):
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer, **OPTIONS[options])
    outputs = assert_same(ahead, stepwise, SETTINGS[settings])
    if options == "few-blocks" and settings == "drawn":
        assert ahead.scheduler.preemptions > 0, "the cache was small enough to preempt"
    if settings == "held":
        assert all(len(c.token_ids) >= 21 for o in outputs for c in o.outputs)


def test_mixed_requests_share_a_batch(loaded):
    model, tokenizer = loaded
    params = [
        SamplingParams(n=2, max_tokens=3, seed=1, repetition_penalty=1.2),
        SamplingParams(max_tokens=33, temperature=0),
        SamplingParams(n=3, max_tokens=17, seed=3, top_p=0.7, stop_token_ids=list(range(60, 90))),
        SamplingParams(n=2, max_tokens=1, seed=4, min_p=0.02, frequency_penalty=-0.5),
    ]
    assert_same(*both(model, tokenizer), params)


def test_alternatives_take_the_loop_that_looks_at_all_and_one_line_says_so(loaded, capsys):
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer)
    asked = SamplingParams(max_tokens=5, seed=1, logprobs=2)
    plain = SamplingParams(max_tokens=5, seed=1)
    line = "rollouts launch their steps one by one, slower than graphs, because of alternatives (logprobs=)"
    assert said(ahead.generate(PROMPTS, plain)) == said(stepwise.generate(PROMPTS, asked))
    assert capsys.readouterr().out == ""
    for _ in range(2):  # one request that asks is enough
        outputs = ahead.generate(PROMPTS, [plain, asked, plain, plain])
        assert [o.outputs[0].logprobs is not None for o in outputs] == [False, True, False, False]
    assert capsys.readouterr().out == f"Pronghorn: {line}\n"


def test_a_seed_gives_the_same_samples_in_any_company(loaded):
    model, tokenizer = loaded
    params = [SamplingParams(n=3, max_tokens=30, seed=100 + i, top_p=0.9) for i in range(len(PROMPTS))]

    def ids(engine: Any, prompts: Any, settings: Any) -> list[list[list[int]]]:
        return [[c.token_ids for c in o.outputs] for o in engine.generate(prompts, settings)]

    engine, _ = both(model, tokenizer)
    together = ids(engine, PROMPTS, params)
    assert len({tuple(t) for group in together for t in group}) > 8, "samples differ from each other"
    assert [ids(engine, [p], [q])[0] for p, q in zip(PROMPTS, params)] == together
    assert ids(engine, PROMPTS[::-1], params[::-1]) == together[::-1]
    tight, _ = both(model, tokenizer, num_kv_blocks=30, block_size=4)
    assert ids(tight, PROMPTS, params) == together
    assert tight.scheduler.preemptions > 0, "the cache was small enough to preempt"
    narrow, _ = both(model, tokenizer, max_num_seqs=2, max_prefill_tokens=6)
    assert ids(narrow, PROMPTS, params) == together
    fewer = [SamplingParams(**{**p.__dict__, "n": 1}) for p in params]
    assert ids(engine, PROMPTS, fewer) == [group[:1] for group in together]


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """``(rows of the step, rows that run)`` of every step to come."""
    steps: list[tuple[int, int]] = []
    step = Decoder._step

    def watched(self: Decoder, rows: int) -> None:
        steps.append((rows, sum(owner is not None for owner in self.slots)))
        step(self, rows)

    monkeypatch.setattr(Decoder, "_step", watched)
    return steps


def test_a_finished_row_leaves_and_the_rest_move_down(loaded, monkeypatch):
    model, tokenizer = loaded
    steps = watch_steps(monkeypatch)
    lengths = [4, 4, 4, 4, 4, 4, 70, 70]
    params = [SamplingParams(max_tokens=n, seed=n, ignore_eos=True) for n in lengths]
    engine, _ = both(model, tokenizer)
    outputs = engine.generate([[0, 50 + i] for i in range(8)], params)
    assert [len(o.outputs[0].token_ids) for o in outputs] == lengths
    assert steps[0] == (8, 8), "eight rows, a step of eight"
    assert {running for _, running in steps} == {8, 2}
    assert all(rows == 2 for rows, running in steps if running == 2), "the two that stay sat in the last slots"
    assert len(steps) <= 69 + 32, "no more than one burst of steps in vain"
    assert not engine._decoder.slot_of and not any(engine._decoder.slots)
    state = engine._decoder.state
    assert (state.slots_B == -1).all() and (state.lengths_B == 0).all(), "nobody owns a slot, nothing is written"


def test_slots_are_compacted_without_losing_a_row(loaded):
    model, tokenizer = loaded
    engine, _ = both(model, tokenizer)
    engine.generate([[0, 5]], SamplingParams(n=8, max_tokens=2, ignore_eos=True))
    decoder = engine._decoder
    rows = make_sequences([[0, 9, 8]], SamplingParams(n=6, max_tokens=9, seed=1), 256, 384, frozenset({1}))
    for i, row in enumerate(rows):
        row.output = [20 + i]
    decoder.begin(rows)
    decoder.admit(rows)
    decoder.release(rows[:4])
    decoder._compact()
    assert sorted(decoder.slot_of[id(row)] for row in rows[4:]) == [0, 1]
    for row in rows[4:]:
        at = decoder.slot_of[id(row)]
        assert decoder.slots[at] is row
        assert decoder.state.tokens_B[at] == row.last and decoder.state.positions_B[at] == len(row) - 1
        assert decoder.state.counts_B[at] == 1
    assert (decoder.state.slots_B[2:] == -1).all()


def under_lora(model: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, register(config))
    fill(model, 3)
    return model


def test_an_optimizer_step_shows_without_anything_made_anew(tmp_path):
    model, tokenizer = load(tiny_llama(tmp_path))
    model = under_lora(model)
    ahead, stepwise = both(model, tokenizer)
    greedy = SamplingParams(temperature=0, max_tokens=20)
    before = assert_same(ahead, stepwise, greedy)
    decoder = ahead._decoder
    walks, addresses = dict(decoder._walks), [t.data_ptr() for t in vars(decoder.state).values() if torch.is_tensor(t)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    row = torch.tensor(PROMPTS[0])
    hidden = hidden_states(model, row, torch.arange(len(row)), PackedAttention([len(row)], "cpu"))
    logits(model, hidden).log_softmax(-1)[:, 7].mean().neg().backward()
    optimizer.step()
    ahead.policy_changed()
    after = assert_same(ahead, stepwise, greedy)
    assert said(after) != said(before)
    assert ahead._decoder is decoder and decoder._walks == walks, "slots and graphs were used again"
    assert [t.data_ptr() for t in vars(decoder.state).values() if torch.is_tensor(t)] == addresses


def test_the_base_and_an_adapter_from_a_folder_answer(tmp_path):
    model, tokenizer = load(tiny_llama(tmp_path / "model"))
    model = under_lora(model)
    save_lora(model, str(tmp_path / "other"))
    ahead, stepwise = both(model, tokenizer)
    greedy = SamplingParams(temperature=0, max_tokens=20)
    then = said(assert_same(ahead, stepwise, greedy))
    fill(model, 4)
    now = said(assert_same(ahead, stepwise, greedy))
    other = said(assert_same(ahead, stepwise, greedy, adapter=load_lora(model, str(tmp_path / "other"))))
    none = said(assert_same(ahead, stepwise, greedy, adapter=None))
    assert other == then != now and none not in (then, now)
    assert said(assert_same(ahead, stepwise, greedy)) == now, "the live adapter is back"


def fill(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def spell(monkeypatch: pytest.MonkeyPatch, script: list[int]) -> None:
    """Make the head's products spell ``script`` for every row, then token 50 for ever."""
    sample = Decoder._sample

    def scripted(self: Decoder, x_NV: torch.Tensor, rows_N: torch.Tensor | None) -> None:
        counts = self.state.counts_B[: len(x_NV)] if rows_N is None else self.state.counts_B[rows_N.long()]
        x_NV = torch.zeros_like(x_NV)
        for row, count in enumerate(counts.tolist()):
            x_NV[row, script[count] if count < len(script) else 50] = 100.0
        sample(self, x_NV, rows_N)

    monkeypatch.setattr(Decoder, "_sample", scripted)


@pytest.mark.parametrize("before", [0, 7, *range(22, 35)])
def test_stop_strings_across_tokens_and_bursts(loaded, monkeypatch, before):
    """``</answer>`` takes several tokens, and with ``before`` others the burst of 32 steps ends at each place of it."""
    model, tokenizer = loaded
    engine, _ = both(model, tokenizer)
    text = tokenizer.decode([50] * before) + "19</answer> and more"
    script = [50] * before + tokenizer("19</answer> and more", add_special_tokens=False)["input_ids"]
    assert len(tokenizer("</answer>", add_special_tokens=False)["input_ids"]) > 1
    spell(monkeypatch, script)
    params = SamplingParams(temperature=0, max_tokens=60, stop=["never", "</answer>"])
    (out,) = engine.generate(PROMPTS[:1], params)[0].outputs
    assert (out.text, out.finish_reason, out.stop_reason) == (text.split("</answer>")[0], "stop", "</answer>")
    assert out.token_ids == script[: len(out.token_ids)]
    said_ = tokenizer.decode(out.token_ids)
    assert "</answer>" in said_ and "</answer>" not in tokenizer.decode(out.token_ids[:-1]), "ended by its last token"
    assert len(out.policy_logprobs) == len(out.token_logprobs) == len(out.token_ids)
    later = SamplingParams(temperature=0, max_tokens=60, stop="</answer>", min_tokens=len(script))
    (out,) = engine.generate(PROMPTS[:1], later)[0].outputs
    assert (out.finish_reason, len(out.token_ids)) == ("length", 60), "no stop string before min_tokens"


def test_stop_ids_at_every_place_of_a_burst(loaded):
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer)
    plain = SamplingParams(max_tokens=36, seed=8, ignore_eos=True)
    ids = ahead.generate(PROMPTS[:1], plain)[0].outputs[0].token_ids
    for place in (0, 1, 15, 30, 31, 32, 33, 35):
        if ids.index(ids[place]) != place:
            continue
        params = SamplingParams(max_tokens=36, seed=8, ignore_eos=True, stop_token_ids=[ids[place]])
        one, other = (e.generate(PROMPTS[:1], params)[0].outputs[0] for e in (ahead, stepwise))
        assert one.token_ids == other.token_ids == ids[: place + 1]
        assert (one.finish_reason, one.stop_reason) == ("stop", ids[place])


def test_slots_serve_again_where_they_are_large_enough(loaded):
    model, tokenizer = loaded
    engine, _ = both(model, tokenizer)
    engine.generate(PROMPTS, SamplingParams(n=4, max_tokens=40, seed=1))
    decoder = engine._decoder
    engine.generate(PROMPTS[:2], SamplingParams(n=4, max_tokens=20, seed=1))
    assert engine._decoder is decoder
    engine.generate(PROMPTS, SamplingParams(n=4, max_tokens=20, seed=1, repetition_penalty=1.1))
    assert engine._decoder is not decoder, "a penalty needs room to remember what was said"
    decoder = engine._decoder
    assert decoder.state.seen_BW.numel() > 0 == decoder.state.tally_BV.numel()
    engine.generate(PROMPTS, SamplingParams(n=4, max_tokens=20, seed=1, presence_penalty=0.1))
    assert engine._decoder is not decoder and engine._decoder.state.tally_BV.numel() > 0, "and one to count it"
    decoder = engine._decoder
    engine.release()
    engine.generate(PROMPTS, SamplingParams(n=4, max_tokens=20, seed=1))
    assert engine._decoder is not decoder, "its cache had been given back"


def test_logits_that_are_no_numbers_raise(tmp_path):
    model, tokenizer = load(tiny_llama(tmp_path))
    model.requires_grad_(False)
    engine, _ = both(model, tokenizer)
    params = SamplingParams(n=2, max_tokens=20, seed=1)
    expected = said(engine.generate(PROMPTS, params))
    weight = model.model.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[3] = float("nan")
    with pytest.raises(FloatingPointError, match="not numbers"):
        engine.generate(PROMPTS, params)
    assert engine.cache is None, "dropped"
    with torch.no_grad():
        weight.copy_(kept)
    assert said(engine.generate(PROMPTS, params)) == expected, "no NaN stays behind"


def test_buckets_hold_their_rows():
    assert [bucket_of(n) for n in (1, 3, 6, 17, 64, 65, 200)] == [1, 4, 8, 24, 64, 96, 256]
    called: list[int] = []
    Launched(called.append, 8).replay()
    assert called == [8]


@pytest.mark.parametrize("hold", [True, False], ids=["held-in-16-bits", "made-for-each-product"])
def test_four_bit_layers(tmp_path, monkeypatch, hold):
    model, tokenizer = from_pretrained(LoadConfig(str(tiny_llama(tmp_path)), load_in_4bit=True, max_seq_length=256))
    model = add_lora(model, r=8)
    fill(model, 3)
    monkeypatch.setattr("pronghorn.rollout.native.engine.memory_budget", lambda *_: 2**40 if hold else 0)
    ahead, stepwise = both(model, tokenizer)
    assert_same(ahead, stepwise, SETTINGS["drawn"])
    weights = ahead.held_bytes - ahead.cache.bytes
    # The groups of two layers in float32, once, with room for their adapters' ranks.
    sizes = [(128, 64, 24), (64, 64, 8), (256, 64, 16), (64, 128, 8)]
    assert weights == hold * 2 * 4 * sum((out + rank) * row_columns(inputs + rank) for out, inputs, rank in sizes)
    fill(model, 4)
    assert_same(ahead, stepwise, SETTINGS["drawn"])


def test_a_decoder_is_free_as_soon_as_it_is_released(loaded):
    """Its graphs and weights are memory that a cycle would keep until Python looks for such."""
    model, tokenizer = loaded
    engine = base.create("native", model, tokenizer, ahead=True)
    engine.generate([[5, 6, 7]], SamplingParams(max_tokens=2, ignore_eos=True))
    gone = weakref.ref(engine._decoder)
    gc.disable()
    try:
        engine.release()
        assert gone() is None
    finally:
        gc.enable()


KERNELS: dict[str, Any] = {
    "glu_forward": decode_walk,
    "add_norm_forward": decode_walk,
    "norm_forward": decode_walk,
    "head_logits": decode_walk,
    "rotate_and_attend": PagedDecode,
    "project": dense,
    "sample_step": decoder_module,
}


def perturb(monkeypatch: pytest.MonkeyPatch, owner: Any, kernel: str) -> list[str]:
    """Every second number that ``kernel`` gives is one part in a thousand larger. Its calls so far."""
    honest, calls = getattr(owner, kernel), []

    def perturbed(*args: Any, **kwargs: Any) -> Any:
        calls.append(kernel)
        out = honest(*args, **kwargs)
        first = out[0] if isinstance(out, tuple) else out
        if first is None:  # the sampling kernel writes into its rows' state
            first = args[1].out_policy_logps_BT
        first[:, ::2].mul_(1.001)
        return out

    monkeypatch.setattr(owner, kernel, perturbed)
    return calls


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_perturbed_kernel_of_the_decode_step_shows(loaded, monkeypatch, kernel):
    """One part in a thousand of one kernel's output is more than the tolerance of the comparisons above."""
    model, tokenizer = loaded
    ahead, stepwise = both(model, tokenizer)
    calls = perturb(monkeypatch, KERNELS[kernel], kernel)
    with pytest.raises(AssertionError):
        assert_same(ahead, stepwise, SETTINGS["drawn"])
    assert calls


def test_a_perturbed_product_of_the_adapters_shows(tmp_path, monkeypatch):
    model, tokenizer = from_pretrained(LoadConfig(str(tiny_llama(tmp_path)), load_in_4bit=True, max_seq_length=256))
    model = add_lora(model, r=8)
    fill(model, 3)
    ahead, stepwise = both(model, tokenizer)
    assert_same(ahead, stepwise, SETTINGS["drawn"])
    assert ahead._decoder.hold
    calls = perturb(monkeypatch, products, "low_rank")
    with pytest.raises(AssertionError):
        assert_same(ahead, stepwise, SETTINGS["drawn"])
    assert calls


def test_weights_that_were_replaced_are_read(tmp_path):
    """Graphs hold addresses: a head, norm or embedding that is another tensor takes another decoder."""
    model, tokenizer = load(tiny_llama(tmp_path))
    model.requires_grad_(False)
    ahead, stepwise = both(model, tokenizer)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    first = said(assert_same(ahead, stepwise, params))
    generator = torch.Generator().manual_seed(5)
    for owner in (model.lm_head, model.model.norm, model.model.embed_tokens):
        drawn = torch.randn(owner.weight.shape, generator=generator) * 0.05
        owner.weight = torch.nn.Parameter(drawn + (owner is model.model.norm), requires_grad=False)
        assert said(assert_same(ahead, stepwise, params)) != first


def test_held_weights_follow_codes_that_were_written_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_walk, "few_rows", lambda hold: 0)
    settings = LoadConfig.of(model_name=str(tiny_llama(tmp_path)), max_seq_length=256, load_in_4bit=True)
    model, tokenizer = from_pretrained(settings)
    ahead, stepwise = both(model, tokenizer)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    assert_same(ahead, stepwise, params)
    before = ahead._decoder
    for layer in model.model.layers:
        projection = layer.mlp.down_proj
        projection.load_weight(torch.randn(projection.out_features, projection.in_features) * 0.2)
    assert_same(ahead, stepwise, params)
    assert before.hold and ahead._decoder is not before


def test_more_rows_than_any_graph_holds_are_refused(loaded):
    with pytest.raises(ConfigError, match="max_num_seqs=2048 is out of range; give 1024 or less"):
        base.create("native", *loaded, max_num_seqs=2048)
