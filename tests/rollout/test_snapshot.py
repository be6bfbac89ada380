"""The policy as it was: the trainer's walk to the last bit, in memory of its own, and when it no longer serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.config.sampling import SamplingParams
from pronghorn.models.attention import PackedAttention
from pronghorn.models.forward import hidden_states, logits
from pronghorn.rollout import base
from pronghorn.rollout.native import engine as engine_module
from pronghorn.rollout.native.snapshot import Snapshot, why_no_snapshot
from tests.grpo.support import fill_lora, pronghorn_model

IDS, LENGTHS = torch.tensor([0, *range(40, 60), 0, 7, 8]), [21, 3]
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])


def walked(policy: Any) -> torch.Tensor:
    """Logits of two rows, under a model or a snapshot."""
    attention = PackedAttention(LENGTHS, "cpu")
    with torch.no_grad():
        if isinstance(policy, Snapshot):
            return policy.logits(policy.hidden_states(IDS, POSITIONS, attention))
        return logits(policy, hidden_states(policy, IDS, POSITIONS, attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_policy_of_its_moment_to_the_last_bit(dtype: torch.dtype) -> None:
    model = pronghorn_model(dtype).eval()
    snapshot, before = Snapshot(model), walked(model)
    assert torch.equal(walked(snapshot), before)
    fill_lora(model, seed=9)
    after = walked(model)
    assert torch.equal(walked(snapshot), before) and not torch.equal(after, before)
    snapshot.refresh()
    assert torch.equal(walked(snapshot), after)


def test_dropout_of_training_is_none_of_its_business() -> None:
    model = pronghorn_model(dropout=0.3).train()
    snapshot = Snapshot(model)
    assert snapshot.serves(model) and all(m.training for m in model.modules())
    assert torch.equal(walked(snapshot), walked(model.eval()))


def test_it_serves_until_the_model_is_made_of_something_else() -> None:
    model = pronghorn_model()
    snapshot = Snapshot(model)
    fill_lora(model, seed=9)
    assert snapshot.serves(model)
    handle = model.get_base_model().model.layers[0].register_forward_hook(lambda *_: None)
    assert not snapshot.serves(model) and "a hook on" in why_no_snapshot(model)
    handle.remove()
    assert snapshot.serves(model) and not why_no_snapshot(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert not snapshot.serves(model)


def test_what_it_cannot_serve_is_refused() -> None:
    model = pronghorn_model()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"lm_head\.weight \(1 such\), which trains .*; set rollout_overlap=False"):
        Snapshot(model)
    engine = base.create("native", model, model.get_base_model().pronghorn_state.tokenizer)
    with pytest.raises(ConfigError, match="lm_head"):
        engine.ready([[0, 5]], SamplingParams(max_tokens=2), 1.0)
    with pytest.raises(ConfigError, match="prompts is empty"):
        engine.ready([], SamplingParams(max_tokens=2), 1.0)
    assert engine.generate([[0, 5]], SamplingParams(max_tokens=2, seed=0))[0].outputs[0].token_ids


def test_a_model_that_changes_gets_a_snapshot_anew_and_other_adapters_none() -> None:
    model = pronghorn_model()
    engine = base.create("native", model, model.get_base_model().pronghorn_state.tokenizer)
    params = SamplingParams(n=2, max_tokens=8, seed=3)
    expected = engine.generate([[0, 5]], params)[0].outputs
    assert engine.ready([[0, 5]], params, 1.0)()[0].outputs == expected
    first = engine._snapshot
    assert engine.generate([[0, 5]], params)[0].outputs == expected and engine._snapshot is first
    without = engine.generate([[0, 5]], params, adapter=None)[0].outputs
    assert without != expected and engine._snapshot is None
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    assert engine.ready([[0, 5]], params, 1.0)()[0].outputs == expected


def test_a_cache_that_memory_cut_short_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making it anew for each generation would capture every graph anew."""
    model = pronghorn_model()
    engine = base.create("native", model, model.get_base_model().pronghorn_state.tokenizer)
    monkeypatch.setattr(engine_module, "capacity", lambda shape, size, needed, at_least, *_: min(needed, at_least))
    small, large = SamplingParams(n=4, max_tokens=40, seed=3), SamplingParams(n=4, max_tokens=100, seed=3)
    expected = engine.ready([[0, 5]], small, 1.0)()[0].outputs
    cache = engine.cache
    assert engine.ready([[0, 5]], small, 1.0)()[0].outputs == expected and engine.cache is cache
    engine.ready([[0, 5]], large, 1.0)()
    assert engine.cache is not cache
