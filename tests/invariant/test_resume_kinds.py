"""Bit-exact resumes of runs with tools, with full fine-tuning, and with the best model loaded at the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pronghorn.config.load import LoadConfig
from pronghorn.grpo.checkpoint import whole_checkpoints
from pronghorn.loader import from_pretrained
from tests.grpo.support import adapter_weights, letters, prompts, pronghorn_model, trainer
from tests.grpo.test_tools import made_with
from tests.grpo.tool_support import tool_model
from tests.helpers import tiny_llama
from tests.invariant.test_resume import Interrupt, history

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "log_completions": True}


def weights(model: Any) -> dict[str, torch.Tensor]:
    """What trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_resumes(tmp_path: Path, build: Callable[[Path], Any], stop: int) -> Any:
    """Stopped at a step and resumed by a new trainer: weights, moments, metrics and samples. Returns the whole run."""
    whole = build(tmp_path / "whole")
    begun = weights(whole.model)
    whole.train()
    cut = build(tmp_path / "cut")
    cut.add_callback(Interrupt(stop))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    torch.manual_seed(77)  # whatever a new process starts with
    resumed = build(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    expected = weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(resumed.model).items())
    assert any(not torch.equal(weight, expected[name]) for name, weight in begun.items())
    moments = [made.optimizer.state_dict()["state"] for made in (whole, resumed)]
    assert moments[0]
    for i, state in moments[0].items():
        assert all(torch.equal(value, moments[1][i][name]) for name, value in state.items())
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    samples = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "cut")]
    assert samples[0] == samples[1] != ""
    return whole


@pytest.mark.parametrize("stop", [2, 3])
def test_with_tools(tmp_path: Path, stop: int) -> None:
    """From within a generation too, whose histories hold what a tool wrote."""

    def build(folder: Path) -> Any:
        return made_with(folder, model=tool_model(dropout=0.2), max_steps=4, steps_per_generation=2, **SAVING)

    whole = assert_resumes(tmp_path, build, stop)
    assert any(r.tool_mask for r in whole.position.buffer)
    assert whole.state.log_history[0]["tools/call_frequency"] > 0


@pytest.mark.parametrize("stop", [2, 3])
def test_with_full_fine_tuning(tmp_path: Path, stop: int) -> None:
    folder = tiny_llama(tmp_path)

    def build(output: Path) -> Any:
        model, _ = from_pretrained(
            LoadConfig.of(model_name=str(folder), load_in_4bit=False, full_finetuning=True, max_seq_length=256,
                          dtype=torch.float32)
        )  # fmt: skip
        return trainer(output, model, max_steps=4, steps_per_generation=2, beta=0.05, learning_rate=1e-3, **SAVING)

    assert_resumes(tmp_path, build, stop)


class Keep(TrainerCallback):
    """The adapter as it was behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.weights = adapter_weights(model)


def best_at_two(folder: Path, **overrides: Any) -> Any:
    """A run whose evaluation is best behind step 2, and whose oldest checkpoints go."""

    def reward(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        return [score - abs(trainer_state.global_step - 2) for score in letters(completions)]

    return trainer(
        folder, pronghorn_model(), rewards=reward, max_steps=5, eval_dataset=prompts(2), eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=4, load_best_model_at_end=True, metric_for_best_model="eval_reward",
        save_total_limit=2, **SAVING, **overrides,
    )  # fmt: skip


def test_the_best_model_at_the_end(tmp_path: Path) -> None:
    """Its checkpoint outlives the rotation, its weights are those of the live adapter; resumed, it is the same one."""
    made, keep = best_at_two(tmp_path / "whole"), Keep(2)
    made.add_callback(keep)
    live = dict(made.model.named_parameters())
    made.train()
    names = [path.name for path in whole_checkpoints(tmp_path / "whole")]
    assert names == ["checkpoint-2", "checkpoint-5"]
    assert made.state.best_global_step == 2 and made.state.best_model_checkpoint.endswith("checkpoint-2")
    ends = adapter_weights(made.model)
    assert len(ends) == 28 and all(torch.equal(weight, keep.weights[name]) for name, weight in ends.items())
    last = load_file(str(tmp_path / "whole" / "checkpoint-5" / "adapter_model.safetensors"))
    assert any(not torch.equal(last[name.replace(".default", "")], weight) for name, weight in ends.items())
    assert all(p is live[name] for name, p in made.model.named_parameters())  # in place: engine and optimizer see them

    cut = best_at_two(tmp_path / "cut", callbacks=[Interrupt(4)])
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    resumed = best_at_two(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert all(torch.equal(weight, ends[name]) for name, weight in adapter_weights(resumed.model).items())
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
