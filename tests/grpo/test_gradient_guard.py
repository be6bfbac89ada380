"""Gradients that are NaN or inf: nothing of them reaches the weights or the optimizer, and what broke is kept."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pronghorn.config.errors import ConfigError
from pronghorn.grpo import gradient_guard
from pronghorn.grpo.checkpoint import is_whole, whole_checkpoints
from pronghorn.grpo.gradient_guard import NonFiniteGradients
from pronghorn.grpo.guarding import GuardMixin, Trained
from pronghorn.grpo.logprobs import score
from pronghorn.grpo.skipped import load_batch
from tests.grpo.support import adapter_weights, config, letters, pronghorn_model, trainer
from tests.invariant.test_resume import history

PARAMETER = "layers.0.self_attn.q_proj.lora_A"


class Break(TrainerCallback):
    """Puts ``value`` into one gradient entry at the end of the forward and backward of some steps (counted from 1)."""

    def __init__(self, *steps: int, value: float = math.nan) -> None:
        self.steps, self.value = steps, value
        self.hook: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        broken = state.global_step + 1 in self.steps

        def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
            if not broken:
                return None
            gradient = gradient.clone()
            gradient[1, 2] = self.value
            return gradient

        if self.hook is not None:
            self.hook.remove()
        (parameter,) = [p for n, p in model.named_parameters() if PARAMETER in n]
        self.hook = parameter.register_hook(spoil)


def moments(made: Any) -> list[torch.Tensor]:
    """The optimizer's state, its step counts included."""
    states = made.optimizer.state_dict()["state"]
    return [value.clone() for i in sorted(states) for _, value in sorted(states[i].items())]


@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_skipped_moves_nothing(tmp_path: Path, value: float, max_grad_norm: float) -> None:
    """Weights, moments and step counts of the optimizer are those that the step found; the next one moves them."""
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[f"before {state.global_step + 1}"] = (adapter_weights(made.model), moments(made))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen[f"after {state.global_step}"] = (adapter_weights(made.model), moments(made))

    made = trainer(
        tmp_path, max_steps=4, callbacks=[Break(2, value=value), Look()], max_grad_norm=max_grad_norm, weight_decay=0.1
    )
    made.train()
    (weights, states), (weights_after, states_after) = seen["before 2"], seen["after 2"]
    assert all(torch.equal(weight, weights_after[name]) for name, weight in weights.items())
    assert len(states) == len(states_after) > 0
    assert all(torch.equal(a, b) for a, b in zip(states, states_after))
    assert any(not torch.equal(a, seen["after 3"][0][name]) for name, a in seen["after 2"][0].items())
    logs = [log for log in made.state.log_history if "loss" in log]
    assert [log.get("skipped_steps") for log in logs] == [None, 1, 1, 1]
    assert [math.isfinite(log["grad_norm"]) for log in logs] == [True, False, True, True]
    assert logs[1]["learning_rate"] != logs[2]["learning_rate"]  # a function of the step number, skipped or not


def test_the_batch_is_kept_for_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(
        tmp_path, max_steps=2, beta=0.04, callbacks=[Break(2)], per_device_train_batch_size=2,
        gradient_accumulation_steps=2, num_iterations=2, mask_truncated_completions=True,
    )  # fmt: skip
    made.train()
    folder = tmp_path / "skipped" / "step-2"
    assert "step 2 is skipped: its gradient norm is nan (losses [" in capsys.readouterr().out
    batch = load_batch(folder)
    assert [len(part) for part in batch.micro_batches] == [2, 2]
    for saved, held in zip(sum(batch.micro_batches, []), sum(made._step_parts, [])):
        assert (saved.prompt_ids, saved.completion_ids) == (held.prompt_ids, held.completion_ids)
        assert (saved.sampler_logps, saved.advantage) == (held.sampler_logps, held.advantage)
        assert (saved.truncated, saved.scored) == (held.truncated, held.scored)
        for a, b in ((saved.old_logps, held.old_logps), (saved.ref_logps, held.ref_logps)):
            assert (a is None) == (b is None) == (not held.scored)
            assert a is None or torch.equal(a, b)
    # step 2 was not taken, so the model still is what it was scored under
    part = batch.micro_batches[0]
    made.model.eval()
    with torch.no_grad():
        expected = score(made.model, made.loss_step.pack(part), made.args.temperature)[0]
    found = [logps for logps in batch.logps[0] if logps is not None]
    assert torch.allclose(torch.cat(found), expected, atol=1e-6)
    assert batch.facts["step"] == 2 and math.isnan(batch.facts["grad_norm"]) and len(batch.facts["losses"]) == 2
    assert len(batch.facts["parameters"]) == 1 and PARAMETER in batch.facts["parameters"][0]
    assert "entropy" in batch.facts["metrics"]
    with pytest.raises(ConfigError, match="has no batch.safetensors; give a folder under <output_dir>/skipped"):
        load_batch(tmp_path)


def test_so_many_in_a_row_end_the_run_and_the_checkpoint_is_whole(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    made = trainer(tmp_path, callbacks=[Break(1, 3, 4, 6, 7, 8)], **settings)
    with pytest.raises(NonFiniteGradients) as stop:
        made.train()
    assert made.state.global_step == 7  # the eighth was the third in a row
    text = str(stop.value)
    assert "of 3 optimizer steps in a row" in text and "max_consecutive_skipped_steps=3" in text
    assert "at step 8 the norm is nan" in text and "1 parameters have NaN or inf, " in text and PARAMETER in text
    assert str(tmp_path / "skipped" / "step-8") in text and "resume_from_checkpoint=True" in text
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert is_whole(tmp_path / "checkpoint-6")
    # two were skipped behind checkpoint-5, one of them before it was written: the count goes on from there
    again = trainer(tmp_path, callbacks=[Break(7, 8)], **settings)
    with pytest.raises(NonFiniteGradients, match="at step 8"):
        again.train(resume_from_checkpoint=True)
    mended = trainer(tmp_path, **settings)
    mended.train(resume_from_checkpoint=True)
    assert [log["skipped_steps"] for log in mended.state.log_history if "loss" in log][-1] == 4
    assert all(weight.isfinite().all() for weight in adapter_weights(mended.model).values())


def test_a_broken_reward_weight_is_caught_too(tmp_path: Path) -> None:
    """NaN in the loss itself: from an advantage, here."""
    made = trainer(tmp_path, max_steps=2, max_consecutive_skipped_steps=1)
    broken_advantage(made)
    before = adapter_weights(made.model)
    with pytest.raises(NonFiniteGradients, match="losses are \\[nan\\]"):
        made.train()
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(made.model).items())


def test_only_so_many_batches_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_guard, "KEPT", 2)
    trainer(tmp_path, max_steps=6, callbacks=[Break(1, 2, 4, 5)]).train()
    assert sorted(path.name for path in (tmp_path / "skipped").iterdir()) == ["step-1", "step-2"]


def test_resumed_across_skipped_steps_is_uninterrupted(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", callbacks=[Break(2, 5)], **settings)
    whole.train()
    trainer(tmp_path / "cut", callbacks=[Break(2, 5)], **settings).train()
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    resumed = trainer(tmp_path / "cut", callbacks=[Break(2, 5)], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert json.dumps(history(tmp_path / "cut")) == json.dumps(history(tmp_path / "whole"))  # NaN equals itself there
    expected = adapter_weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed.model).items())


def broken_advantage(made: Any) -> None:
    """Every generation's first completion gets NaN for its advantage."""
    supply = made.supply.next

    def spoiled(*args: Any) -> Any:
        rollouts = supply(*args)
        rollouts[0].advantage = math.nan
        return rollouts

    made.supply.next = spoiled


@pytest.fixture
def with_scaler(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes trainers under fp16's loss scaler, on the CPU: accelerate unscales before clipping under "fp16" only."""

    def make(folder: Path, scale: float, *broken: int, **settings: Any) -> Any:
        made = trainer(folder, callbacks=[Break(*broken, value=math.inf)], **settings)
        monkeypatch.setattr(type(made.accelerator), "mixed_precision", property(lambda self: "fp16"))
        made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        made.accelerator.native_amp = True
        return made

    return make


def test_an_overflow_of_fp16s_scaler_is_its_own_affair(tmp_path: Path, with_scaler: Any) -> None:
    made = with_scaler(tmp_path, 1024.0, 2, 3, 4, max_steps=5)
    made.train()
    logs = [log for log in made.state.log_history if "loss" in log]
    assert all("skipped_steps" not in log for log in logs) and not (tmp_path / "skipped").exists()
    assert made.accelerator.scaler.get_scale() == 128.0  # halved for each overflow
    assert [math.isfinite(log["grad_norm"]) for log in logs] == [True, False, False, False, True]


def test_what_no_smaller_scale_can_mend_counts(tmp_path: Path, with_scaler: Any) -> None:
    """At scale 1 an inf is the gradient's own; and a loss that is NaN before it is scaled is no overflow."""
    made = with_scaler(tmp_path / "one", 1.0, 2, 3, 4, max_steps=5)
    with pytest.raises(NonFiniteGradients, match="at step 4"):
        made.train()
    made = with_scaler(tmp_path / "loss", 1024.0, max_steps=5, max_consecutive_skipped_steps=2)
    broken_advantage(made)
    before = adapter_weights(made.model)
    with pytest.raises(NonFiniteGradients, match="at step 2"):
        made.train()
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(made.model).items())


def test_the_limit_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_consecutive_skipped_steps=0 is out of range"):
        config(tmp_path, max_consecutive_skipped_steps=0)


def test_models_and_rewards_here_are_sound(tmp_path: Path) -> None:
    """Without a fault nothing is skipped and no folder is made."""
    made = trainer(tmp_path, pronghorn_model(), letters)
    made.train()
    assert made.guard.state_dict() == {"skipped": 0, "in_a_row": 0} and not (tmp_path / "skipped").exists()


def test_what_may_have_gradients_is_found_once_and_again_for_another_optimizer() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    model[0].requires_grad_(False)
    some = Trained(model, list(model[1].parameters()))
    assert [name for name, _ in some.named_parameters()] == ["1.weight", "1.bias"]
    assert [id(p) for p in some.parameters()] == [id(p) for p in model[1].parameters()]
    # Those that train count in the norm, as in transformers, whether the optimizer has them or not; frozen ones that
    # the optimizer has may train later.
    both = Trained(model, [model[0].weight])
    assert [name for name, _ in both.named_parameters()] == ["0.weight", "1.weight", "1.bias"]

    class Trainer(GuardMixin):
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)

    trainer = Trainer()
    first = trainer._trained_of(model)
    assert trainer._trained_of(model) is first
    trainer.optimizer.add_param_group({"params": [model[0].bias]})
    assert [name for name, _ in trainer._trained_of(model).named_parameters()] == ["0.bias", "1.weight", "1.bias"]
    # What is unfrozen later counts at once, and a weight that was replaced is looked at where it is now.
    model[0].weight.requires_grad_(True)
    third = trainer._trained_of(model)
    assert [name for name, _ in third.named_parameters()] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    model[0].weight.requires_grad_(False)
    assert trainer._trained_of(model) is third  # it may train again
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone(), requires_grad=False)
    trainer._trained = None
    assert "0.weight" not in dict(trainer._trained_of(model).named_parameters())
    model[0].weight = torch.nn.Parameter(model[0].weight.detach().clone())
    assert "0.weight" in dict(trainer._trained_of(model).named_parameters())


class Unfreezes(TrainerCallback):
    """The last norm's weight trains from the second step on; what the norm of the gradients then is."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight, self.norms = weight, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weight.requires_grad_(state.global_step >= 1)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


def test_the_norm_is_of_all_that_trains_though_it_trains_later(tmp_path: Path) -> None:
    model = pronghorn_model()
    callback = Unfreezes(model.get_base_model().model.norm.weight)
    made = trainer(tmp_path, model, max_steps=3, max_grad_norm=1e9, callbacks=[callback])
    made.train()
    norms = [log["grad_norm"] for log in made.state.log_history if "grad_norm" in log]
    assert norms == pytest.approx(callback.norms, rel=1e-5)
