"""Each warning through a trainer that goes wrong in its way: a metric under another name would silence one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from pronghorn import AccuracyCallback, AccuracyEval, SamplingParams
from pronghorn.rollout import base
from tests.grpo.support import FakeEngine, letters, prompts, pronghorn_model, trainer

LENGTH, DRIFT = "hit max_completion_length", "sampler and trainer differ by"
ENTROPY, SPREAD, ACCURACY = "entropy collapsed", "have no spread", "held-out accuracy fell"
ALL = (LENGTH, DRIFT, ENTROPY, SPREAD, ACCURACY)


def said(made: Any, capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Which warnings came, and at which step; each is printed and kept once."""
    made.train()
    out = capsys.readouterr().out
    lines = [json.loads(line) for line in (Path(made.args.output_dir) / "metrics.jsonl").read_text().splitlines()]
    kept = [(line["step"], line["warning"]) for line in lines if "warning" in line]
    found = {kind: step for kind in ALL for step, text in kept if kind in text}
    assert len(found) == len(kept) == out.count("Pronghorn warning"), kept
    return found


def native(made: Any) -> Any:
    """The trainer on the engine that samples from the model itself."""
    made.sampling._engine = base.create("native", made.model, made.processing_class, max_seq_length=256)
    return made


def test_a_run_that_is_fine_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What the tests below change is what they warn of."""
    assert said(trainer(tmp_path, max_steps=6, watch={"window": 2, "clipped": 0.9}), capsys) == {}


def test_completions_that_are_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One token each: it would have to be the end of sequence."""
    spread = lambda completions, **_: [float(i) for i, _ in enumerate(completions)]  # noqa: E731
    made = native(trainer(tmp_path, rewards=spread, max_completion_length=1, max_steps=3, watch={"window": 2}))
    assert said(made, capsys) == {LENGTH: 2}


@pytest.mark.parametrize("shift, expected", [(0.3, {DRIFT: 2}), (0.02, {})])
def test_a_sampler_that_reports_other_probabilities(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shift: float, expected: dict[str, int]
) -> None:
    made = trainer(tmp_path, max_steps=3, watch={"window": 2, "clipped": 1.0})
    made.sampling._engine = FakeEngine(made.model, made.processing_class, shift=shift)
    assert said(made, capsys) == expected


class Sharpen(TrainerCallback):
    """Makes the policy all but deterministic from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            with torch.no_grad():
                model.get_base_model().lm_head.weight.mul_(1000.0)


def test_a_policy_that_collapses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps of a random policy are the first window; what follows says one thing only."""
    made = native(
        trainer(
            tmp_path, pronghorn_model(), max_steps=4, learning_rate=1e-6, callbacks=[Sharpen(2)],
            watch={"window": 2, "clipped": 1.0, "no_spread": 1.0, "drift": 100.0},
        )
    )  # fmt: skip
    found = said(made, capsys)
    assert found.pop(ENTROPY) == 4 and set(found) <= {SPREAD, LENGTH}


def test_groups_that_earn_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, rewards=lambda completions, **_: [1.0] * len(completions), max_steps=3,
                   watch={"window": 2, "clipped": 1.0})  # fmt: skip
    assert said(made, capsys) == {SPREAD: 2}


@pytest.mark.parametrize("rises, expected", [(True, {ACCURACY: 12}), (False, {})])
def test_a_reward_that_is_earned_without_being_right(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rises: bool, expected: dict[str, int]
) -> None:
    """The reward rises with every step; held-out answers are right before the first one and wrong ever after."""

    def reward(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
        return [score + rises * trainer_state.global_step for score in letters(completions)]

    problems = Dataset.from_list([{"prompt": row["prompt"], "answer": "1"} for row in prompts(8)])
    made = native(trainer(tmp_path, rewards=reward, max_steps=12, watch={"window": 4, "clipped": 1.0}))
    asked = AccuracyEval(
        problems, params=SamplingParams(temperature=0.0, max_tokens=1), every=6, extract=lambda text: text,
        is_right=lambda given, answer: made.state.global_step == 0,
    )  # fmt: skip
    made.add_callback(AccuracyCallback(asked, made.log_apart))
    found = said(made, capsys)
    assert {kind: step for kind, step in found.items() if kind == ACCURACY} == expected
