"""A resumed run is the uninterrupted one, to the last bit: weights, metrics, samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from tests.grpo.support import adapter_weights, prompts, pronghorn_model, trainer

TIMES = (
    "step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "eval_runtime",
    "eval_samples_per_second", "eval_steps_per_second",
)  # fmt: skip
SETTINGS: list[dict[str, Any]] = [
    {},
    {"steps_per_generation": 2},
    {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.04, "logging_steps": 2},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 2},
    {"rows": 3},
    {"rows": 3, "steps_per_generation": 2, "logging_steps": 2},
    {"dropout": 0.3},
    {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2},
    {
        "use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef_delta": 0.05, "top_entropy_quantile": 0.5,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "num_generations": 2, "loss_type": "cispo",
    },
]  # fmt: skip


class Interrupt(TrainerCallback):
    """Stops the run as Ctrl-C would, at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(folder: Path, settings: dict[str, Any], stop: int | None = None, resume: Any = None) -> Any:
    settings = dict(settings)
    model = pronghorn_model(dropout=settings.pop("dropout", 0.0))
    data = prompts(settings.pop("rows", 12))
    made = trainer(
        folder, model, data=data, max_steps=6, save_strategy="steps", save_steps=1, log_completions=True,
        callbacks=[] if stop is None else [Interrupt(stop)], **settings,
    )  # fmt: skip
    if stop is None:
        made.train(resume_from_checkpoint=resume)
    else:
        with pytest.raises(KeyboardInterrupt):
            made.train(resume_from_checkpoint=resume)
    return made


def history(folder: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("stop", [3])
def test_resumed_is_uninterrupted(tmp_path: Path, settings: dict[str, Any], stop: int) -> None:
    whole = run(tmp_path / "whole", settings)
    run(tmp_path / "cut", settings, stop=stop)
    torch.manual_seed(1234)  # whatever a new process starts with
    resumed = run(tmp_path / "cut", settings, resume=True)
    assert resumed.state.global_step == whole.state.global_step == 6
    expected = adapter_weights(whole.model)
    for name, weight in adapter_weights(resumed.model).items():
        assert torch.equal(weight, expected[name]), name
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    samples = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "cut")]
    assert samples[0] == samples[1] != ""


def test_an_earlier_checkpoint_can_be_named(tmp_path: Path) -> None:
    """Going back to step 2 repeats steps 3 to 6 and replaces their checkpoints."""
    whole = run(tmp_path, {"steps_per_generation": 2})
    expected, log = adapter_weights(whole.model), history(tmp_path)
    again = run(tmp_path, {"steps_per_generation": 2}, resume=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(again.model).items())
    assert history(tmp_path) == log
