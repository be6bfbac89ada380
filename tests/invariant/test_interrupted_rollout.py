"""An interrupt in the middle of a rollout: the trainer stops whole, between two steps, and can go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pronghorn.rollout.native import decoder, stepwise
from tests.grpo.support import adapter_weights, pronghorn_model, trainer


class Kept(TrainerCallback):
    """The adapters after each step."""

    def __init__(self, model: Any) -> None:
        self.model, self.weights = model, [adapter_weights(model)]

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.weights.append(adapter_weights(self.model))


@pytest.mark.parametrize("ahead", [True, False], ids=["ahead", "stepwise"])
def test_a_trainer_stops_whole_and_goes_on(tmp_path, monkeypatch, ahead):
    model = pronghorn_model()
    kept = Kept(model)
    made = trainer(tmp_path, model, max_steps=3, callbacks=[kept])
    made.sampling._engine = None
    engine: Any = made.sampling.engine
    engine.ahead = ahead
    module, name = (decoder, "sample_step") if ahead else (stepwise, "sample")
    run, calls = getattr(module, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(made.state.global_step)
        if calls.count(1) == 4:  # the fourth token of the second step's rollout
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            made.train()
    assert made.state.global_step == 1 and calls[-1] == 1
    blocks = engine.scheduler.blocks
    assert blocks.available == blocks.num_blocks
    assert model.training and torch.is_grad_enabled()
    now = adapter_weights(model)
    assert all(torch.equal(now[n], w) for n, w in kept.weights[1].items()), "no step was half taken"
    assert any(not torch.equal(now[n], w) for n, w in kept.weights[0].items())
    made.train()
    assert made.state.global_step == 3
    assert (engine._decoder is not None) == ahead
