"""The native engine on a GPU in 16 bits, with LoRA: close to a full forward, and its memory given back."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from pronghorn.config.sampling import SamplingParams
from pronghorn.kernels import launch
from pronghorn.kernels.sample_state import SampleState
from pronghorn.lora.config import register
from pronghorn.models.attention import PackedAttention
from pronghorn.models.forward import hidden_states, logits
from pronghorn.rollout import base
from pronghorn.rollout.native import engine as engine_module
from pronghorn.rollout.native.decoder import Decoder
from pronghorn.rollout.native.look import Look
from pronghorn.rollout.native.request import Prompt, Sequence
from tests.grpo.support import fill_lora, lora
from tests.helpers import tiny_llama
from tests.rollout.conftest import load, with_lora

PROMPTS = [[0, *range(40, 40 + n)] for n in (3, 17, 64, 100)]


def made(folder, dtype, adapt):
    path = tiny_llama(folder, vocab_size=2048, hidden_size=256, num_hidden_layers=4)
    model, tokenizer = load(path, dtype=dtype)
    return adapt(model).cuda(), tokenizer


def fused(model):
    """Under Pronghorn's own LoRA, B nonzero: layers are one node each, and decode steps are graphs."""
    peft = get_peft_model(model, register(lora(r=8)))
    fill_lora(peft)
    return peft


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def graphs(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("graphs"), request.param, fused)


@pytest.fixture(scope="module", params=[(torch.bfloat16, fused), (torch.float16, fused), (torch.bfloat16, with_lora)])
def on_gpu(request, tmp_path_factory):
    """The last has PEFT's own LoRA layers, so that its steps are launched one by one."""
    return made(tmp_path_factory.mktemp("gpu"), *request.param)


def forced(model, prompt, tokens):
    row = torch.tensor(prompt + tokens, device="cuda")
    model.eval()
    with torch.no_grad():
        attention = PackedAttention([len(row)], "cuda", ordered=True)  # as GRPO scores
        hidden = hidden_states(model, row, torch.arange(len(row), device="cuda"), attention)
        return logits(model, hidden)[len(prompt) - 1 : -1].float()


def test_log_probs_are_close_to_the_trainers(on_gpu):
    model, tokenizer = on_gpu
    engine = base.create("native", model, tokenizer)
    params = SamplingParams(n=8, max_tokens=100, temperature=0.8, top_p=0.95, seed=1, ignore_eos=True)
    differences = []
    for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, params)):
        for c in output.outputs:
            policy = (forced(model, prompt, c.token_ids) / 0.8).log_softmax(-1)
            expected = policy.gather(1, torch.tensor(c.token_ids, device="cuda")[:, None])[:, 0].cpu()
            differences.append((torch.tensor(c.policy_logprobs) - expected).abs())
    # Products, attention and roundings are the trainer's; the two add up a row's probabilities in different kernels.
    assert torch.cat(differences).mean() <= 1e-5


def test_greedy_takes_a_likeliest_token(on_gpu):
    """Exactly equal logits are common in 16 bits, so: at least 95% the argmax, never far from it."""
    model, tokenizer = on_gpu
    outputs = base.create("native", model, tokenizer).generate(
        PROMPTS, SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    )
    agree, worst = [], 0.0
    for prompt, output in zip(PROMPTS, outputs):
        tokens = torch.tensor(output.outputs[0].token_ids, device="cuda")
        full = forced(model, prompt, tokens.tolist())
        agree.append((full.argmax(-1) == tokens).float())
        worst = max(worst, (full.amax(-1) - full.gather(1, tokens[:, None])[:, 0]).max().item())
    assert torch.cat(agree).mean() >= 0.95
    assert worst < 0.3


def test_the_schedule_changes_nothing_but_rounding(on_gpu):
    model, tokenizer = on_gpu
    params = SamplingParams(n=4, max_tokens=60, seed=2, ignore_eos=True)
    plain = base.create("native", model, tokenizer).generate(PROMPTS, params)
    tight = base.create("native", model, tokenizer, num_kv_blocks=48, max_prefill_tokens=32)
    pairs = [(x, y) for a, b in zip(plain, tight.generate(PROMPTS, params)) for x, y in zip(a.outputs, b.outputs)]
    # Rounding moves the bounds between tokens by a little, so now and then a draw falls on the other side.
    first = [(x, y) for x, y in pairs if x.token_ids[0] == y.token_ids[0]]
    assert len(first) >= 0.9 * len(pairs) - 1
    assert all(abs(x.policy_logprobs[0] - y.policy_logprobs[0]) < 0.1 for x, y in first)
    assert tight.scheduler.preemptions > 0


def test_nothing_waits_for_the_gpu_but_taking_a_look(graphs, monkeypatch):
    """Many chunks, shared blocks that are copied, penalties and bursts, rows that leave and move, and looks that begin:
    torch raises where the host would wait."""
    model, tokenizer = graphs
    engine = base.create("native", model, tokenizer, max_prefill_tokens=32)
    shared = {"n": 3, "ignore_eos": True, "repetition_penalty": 1.1, "presence_penalty": 0.2}
    params = [SamplingParams(max_tokens=n, seed=n, **shared) for n in (20, 20, 60, 60)]
    expected = [o.outputs for o in engine.generate(PROMPTS, params)]  # compiles, and captures graphs
    run, begin, take, move = engine_module.run_ahead, Decoder.begin_look, Look.take, SampleState.move
    looks, moves = [], []

    def running(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def beginning(self, sequences):
        looks.append([s.unseen for s in sequences])
        return begin(self, sequences)

    def taking(self):
        torch.cuda.set_sync_debug_mode("default")
        drawn = take(self)
        torch.cuda.set_sync_debug_mode("error")
        return drawn

    def moving(self, source, target):
        moves.append(len(source))
        move(self, source, target)

    monkeypatch.setattr(engine_module, "run_ahead", running)
    monkeypatch.setattr(SampleState, "move", moving)
    monkeypatch.setattr(Decoder, "begin_look", beginning)
    monkeypatch.setattr(Look, "take", taking)
    assert [o.outputs for o in engine.generate(PROMPTS, params)] == expected
    assert looks[0] == [9] * 12, "six chunks of 32 tokens and a burst"
    assert looks == [[9] * 12, [8] * 12, [8] * 12, *[[8] * 6] * 4, [3] * 6]
    assert moves == [4], "the last rows move to the first slots"


LONG = 400_000_000
"""Cycles, some 0.2 s: much longer than the host takes for a burst."""


def test_a_burst_is_launched_while_the_one_before_it_runs(graphs, monkeypatch):
    """The GPU is held up before each burst. The host is through with the next launch long before the look at this one
    is there, and has taken this look long before the next burst has run."""
    model, tokenizer = graphs
    engine = base.create("native", model, tokenizer)
    params = SamplingParams(n=3, max_tokens=40, seed=2, ignore_eos=True, repetition_penalty=1.1)
    expected = [o.outputs for o in engine.generate(PROMPTS, params)]  # compiles, and captures graphs
    run, take, ends, early, in_flight = Decoder.run, Look.take, [], [], []

    def running(self, sequences, steps):
        torch.cuda._sleep(LONG)
        run(self, sequences, steps)
        ends.append(torch.cuda.current_stream().record_event())

    def taking(self):
        early.append(not self._ready.query())
        drawn = take(self)
        in_flight.append(not ends[-1].query())
        return drawn

    monkeypatch.setattr(Decoder, "run", running)
    monkeypatch.setattr(Look, "take", taking)
    assert [o.outputs for o in engine.generate(PROMPTS, params)] == expected
    assert len(ends) == 5, "1 + 8, 8, 8, 8 and 7 tokens"
    assert early == [True] * 5, "no launch waits for what was launched before"
    assert in_flight == [True] * 4 + [False], "no look waits for what was launched after it"


def test_block_tables_that_wait_to_be_copied_are_not_written_over(graphs):
    model, tokenizer = graphs
    engine = base.create("native", model, tokenizer)
    engine.generate(PROMPTS, SamplingParams(max_tokens=8, seed=2, ignore_eos=True))
    decoder, row = engine._decoder, Sequence(0, 0, 0, Prompt([0]), SamplingParams(), max_new=8)
    decoder.slot_of[id(row)] = 0
    found = []
    torch.cuda._sleep(LONG)
    for block in (3, 5, 7):
        row.table = [block]
        decoder._write_tables([row], 1)
        found.append(decoder.table_BN[0, 0].clone())
    assert [block.item() for block in found] == [3, 5, 7]
    decoder.clear()


def test_steps_that_begin_early_give_the_same_bits(graphs, monkeypatch):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("launches are chained from compute capability 9.0 on")
    model, tokenizer = graphs
    params = SamplingParams(n=4, max_tokens=100, temperature=0.8, top_p=0.95, seed=5, ignore_eos=True)
    found, asked = {}, []
    for chained in (True, False):
        monkeypatch.setattr(launch, "_can_chain", lambda index, chained=chained: asked.append(chained) or chained)
        engine = base.create("native", model, tokenizer)  # graphs of its own
        found[chained] = [o.outputs for o in engine.generate(PROMPTS, params)]
        engine.release()
    assert {True, False} <= set(asked), "no launch asked whether it may be chained"
    assert found[True] == found[False]


def test_memory_is_released(on_gpu):
    model, tokenizer = on_gpu
    engine = base.create("native", model, tokenizer)
    params = SamplingParams(n=16, max_tokens=100, seed=1)
    for _ in range(2):
        for _ in range(2):  # the second time prompts are a graph
            engine.generate(PROMPTS, params)
        engine.release()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        for _ in range(2):
            engine.generate(PROMPTS, params)
        assert torch.cuda.memory_allocated() > before
        engine.release()
        assert torch.cuda.memory_allocated() == before
