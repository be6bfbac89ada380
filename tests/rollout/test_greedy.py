"""Greedy completions equal ``transformers.generate`` on the same weights, token for token, in float32."""

from __future__ import annotations

import pytest
import torch

from pronghorn import models
from pronghorn.config.sampling import SamplingParams
from pronghorn.rollout import base
from tests.helpers import tiny_llama
from tests.rollout.conftest import load, with_lora

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPES = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
    "wide-head": {"head_dim": 32},
}


def prompts(count=6) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 5, 16, 33, 47, 90][:count]
    return [[0, *torch.randint(6, 384, (n - 1,), generator=generator).tolist()] for n in lengths]


def reference(model, ids: list[int], new: int) -> list[int]:
    """What transformers' own ``generate`` says, with Pronghorn detached."""
    wrapped = models.unwrap(model)
    models.detach(model)
    training = [m for m in model.modules() if m.training]
    model.eval()
    out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=1)
    for module in training:
        module.training = True
    models.attach(wrapped)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lora", [False, True])
def test_greedy_equals_generate(tmp_path, shape, lora):
    model, tokenizer = load(tiny_llama(tmp_path, **SHAPES[shape]))
    if lora:
        model = with_lora(model)
    model.train()
    expected = [reference(model, ids, 40) for ids in prompts()]
    engine = base.create("native", model, tokenizer)
    outputs = engine.generate(prompts(), SamplingParams(temperature=0, max_tokens=40))
    assert [o.outputs[0].token_ids for o in outputs] == expected
    if lora:
        plain = engine.generate(prompts(), SamplingParams(temperature=0, max_tokens=40), adapter=None)
        assert [o.outputs[0].token_ids for o in plain] != expected
        with model.disable_adapter():
            assert [o.outputs[0].token_ids for o in plain] == [reference(model, ids, 40) for ids in prompts()]


@pytest.mark.parametrize(
    "options",
    [
        {"num_kv_blocks": 9},
        {"max_num_seqs": 2},
        {"max_prefill_tokens": 7},
        {"block_size": 3},
        {"block_size": 256},
        {"max_prefill_tokens": 5, "num_kv_blocks": 40, "block_size": 4},
    ],
    ids=str,
)
def test_greedy_does_not_depend_on_the_schedule(loaded, options):
    model, tokenizer = loaded
    expected = [reference(model, ids, 40) for ids in prompts()]
    engine = base.create("native", model, tokenizer, **options)
    outputs = engine.generate(prompts(), SamplingParams(temperature=0, max_tokens=40, n=2))
    for output, tokens in zip(outputs, expected):
        assert [c.token_ids for c in output.outputs] == [tokens, tokens]


def test_decode_through_block_tables_is_the_same(loaded, monkeypatch):
    """The GPU's decode path, on the CPU with its reference kernels."""
    from pronghorn.rollout.native.paged import PagedDecode
    from pronghorn.rollout.native.runner import Runner

    model, tokenizer = loaded
    monkeypatch.setattr(
        Runner,
        "_decode_attention",
        lambda self, rows: PagedDecode.of(self.cache, [r.table for r in rows], [len(r) for r in rows]),
    )
    expected = [reference(model, ids, 40) for ids in prompts()]
    outputs = base.create("native", model, tokenizer).generate(prompts(), SamplingParams(temperature=0, max_tokens=40))
    assert [o.outputs[0].token_ids for o in outputs] == expected


def test_prefill_through_the_cache_alone_is_the_same(loaded, monkeypatch):
    """The GPU's prefill, on the CPU with its reference kernel: whole prompts and chunks, keys found by their slots."""
    model, tokenizer = loaded
    expected = [reference(model, ids, 40) for ids in prompts()]
    monkeypatch.setattr("pronghorn.rollout.native.attention.in_order", lambda *kind: True)
    for options in ({}, {"max_prefill_tokens": 7, "block_size": 4}):
        engine = base.create("native", model, tokenizer, **options)
        outputs = engine.generate(prompts(), SamplingParams(temperature=0, max_tokens=40))
        assert [o.outputs[0].token_ids for o in outputs] == expected
