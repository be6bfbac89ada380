"""Samples depend on their seed alone, and their log-probs are the policy's own."""

from __future__ import annotations

import pytest
import torch

from pronghorn.config.sampling import SamplingParams
from pronghorn.models.attention import PackedAttention
from pronghorn.models.forward import hidden_states, logits
from pronghorn.rollout import base
from tests.helpers import tiny_llama
from tests.rollout.conftest import load, with_lora

PROMPTS = [[0, 9, 10, 11] * 5, [0, 40, 41], [0, *range(100, 137)], [0, 50, 51, 52]]


def seeded(**kw) -> list[SamplingParams]:
    return [SamplingParams(n=3, max_tokens=30, seed=100 + i, **kw) for i in range(len(PROMPTS))]


def ids(outputs) -> list[list[list[int]]]:
    return [[c.token_ids for c in o.outputs] for o in outputs]


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}], ids=str
)
def test_a_seed_gives_the_same_samples_in_any_company(loaded, settings):
    model, tokenizer = loaded
    engine = base.create("native", model, tokenizer)
    params = seeded(**settings)
    together = ids(engine.generate(PROMPTS, params))
    assert len({tuple(t) for group in together for t in group}) > 8, "samples differ from each other"
    alone = [ids(engine.generate([p], q))[0] for p, q in zip(PROMPTS, params)]
    assert alone == together
    assert ids(engine.generate(PROMPTS[::-1], params[::-1])) == together[::-1]
    tight = base.create("native", model, tokenizer, num_kv_blocks=30, block_size=4)
    assert ids(tight.generate(PROMPTS, params)) == together
    assert tight.scheduler.preemptions > 0, "the cache was small enough to preempt"
    narrow = base.create("native", model, tokenizer, max_num_seqs=2, max_prefill_tokens=6)
    assert ids(narrow.generate(PROMPTS, params)) == together
    fewer = [SamplingParams(**{**p.__dict__, "n": 1}) for p in params]
    assert ids(engine.generate(PROMPTS, fewer)) == [group[:1] for group in together]


def test_without_a_seed_torch_decides(loaded):
    model, tokenizer = loaded
    engine = base.create("native", model, tokenizer)
    params = SamplingParams(max_tokens=20, n=2)
    torch.manual_seed(5)
    first, second = ids(engine.generate(PROMPTS, params)), ids(engine.generate(PROMPTS, params))
    torch.manual_seed(5)
    assert ids(engine.generate(PROMPTS, params)) == first
    assert first != second
    torch.manual_seed(6)
    before = torch.get_rng_state()
    engine.generate(PROMPTS, seeded())
    assert torch.equal(torch.get_rng_state(), before), "seeded requests leave torch's generator alone"


def teacher_forced(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """Logits ``[N, V]`` that predict each of ``tokens``, by one forward over all of them."""
    row = torch.tensor(prompt + tokens)
    training = model.training
    model.eval()
    with torch.no_grad():
        hidden = hidden_states(model, row, torch.arange(len(row)), PackedAttention([len(row)], "cpu"))
        out = logits(model, hidden)[len(prompt) - 1 : -1]
    model.train(training)
    return out


@pytest.mark.parametrize("blocks", [None, 40])
def test_logprobs_equal_a_full_forward(tmp_path, blocks):
    model, tokenizer = load(tiny_llama(tmp_path, vocab_size=512))
    model = with_lora(model)
    engine = base.create("native", model, tokenizer, num_kv_blocks=blocks, block_size=4)
    params = [
        SamplingParams(n=3, max_tokens=40, seed=1),
        SamplingParams(n=2, max_tokens=40, seed=2, temperature=0.6),
        SamplingParams(max_tokens=40, seed=3, temperature=1.3, top_k=5, top_p=0.8, repetition_penalty=1.2),
        SamplingParams(max_tokens=40, temperature=0),
    ]
    for prompt, p, output in zip(PROMPTS, params, engine.generate(PROMPTS, params)):
        for c in output.outputs:
            raw = teacher_forced(model, prompt, c.token_ids)
            policy = (raw / (p.temperature or 1)).log_softmax(-1)
            expected = policy.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(c.policy_logprobs), expected, rtol=0, atol=1e-5)
            if p.top_k > 0:
                assert all(own > full for own, full in zip(c.token_logprobs, c.policy_logprobs))
            else:
                assert c.token_logprobs == c.policy_logprobs
            assert c.cumulative_logprob == pytest.approx(sum(c.token_logprobs))


def test_dropout_is_off_and_every_flag_comes_back(loaded, tmp_path):
    model, tokenizer = load(tiny_llama(tmp_path))
    model = with_lora(model, dropout=0.5)
    model.train()
    model.base_model.model.model.layers[0].eval()
    flags = [m.training for m in model.modules()]
    grads = [p.requires_grad for p in model.parameters()]
    engine = base.create("native", model, tokenizer)
    in_training = ids(engine.generate(PROMPTS, seeded()))
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.is_grad_enabled()
    model.eval()
    assert ids(engine.generate(PROMPTS, seeded())) == in_training


def test_an_optimizer_step_changes_what_the_next_rollout_says(tmp_path):
    model, tokenizer = load(tiny_llama(tmp_path))
    model = with_lora(model)
    engine = base.create("native", model, tokenizer)
    greedy = SamplingParams(temperature=0, max_tokens=20)
    before = engine.generate(PROMPTS, greedy)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    row = torch.tensor(PROMPTS[0])
    hidden = hidden_states(model, row, torch.arange(len(row)), PackedAttention([len(row)], "cpu"))
    logits(model, hidden).log_softmax(-1)[:, 7].mean().neg().backward()
    optimizer.step()
    engine.policy_changed()
    after = engine.generate(PROMPTS, greedy)
    assert ids(before) != ids(after)
    for prompt, output in zip(PROMPTS, after):
        tokens = output.outputs[0].token_ids
        assert teacher_forced(model, prompt, tokens).argmax(-1).tolist() == tokens
