"""Resumed from any step, of any cut into micro-batches, generations, iterations and epochs, a run is the uninterrupted
one to the last bit; with dropout, rewards that draw from every generator of the process, and a part with a state."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from pronghorn.config.errors import ConfigError
from pronghorn.grpo.stateful import StatefulParts
from tests.grpo.support import adapter_weights, letters, prompts, pronghorn_model, trainer
from tests.invariant.test_resume import history

STEPS = 7


class Drift:
    """A reward that changes with every call, and draws from Python's, numpy's and torch's generators."""

    __name__ = "drift"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, completions: list[Any], **kwargs: Any) -> list[float]:
        self.calls += 1
        drawn = [random.random() + float(np.random.rand()) + float(torch.rand(())) for _ in completions]
        return [
            score + 0.1 * x + 0.01 * self.calls * i for i, (score, x) in enumerate(zip(letters(completions), drawn))
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def build(folder: Path, rows: int, **settings: Any) -> Any:
    reward = Drift()
    made = trainer(
        folder, pronghorn_model(dropout=0.2), reward, prompts(rows), max_steps=STEPS, save_strategy="steps",
        save_steps=1, log_completions=True, log_completions_steps=1000, per_device_train_batch_size=2,
        num_generations=2, max_completion_length=6, **settings,
    )  # fmt: skip
    made.stateful.add("drift", reward)
    return made


def cases(count: int, seed: int = 0) -> list[tuple[int, int, int, int, int, int]]:
    """(accumulation, steps_per_generation, num_iterations, rows, logging_steps, step to resume from)."""
    rng, found = random.Random(seed), set[tuple[int, int, int, int, int, int]]()
    while len(found) < count:
        per_generation = rng.choice([1, 2, 3, 4])
        rows = rng.randint(per_generation, 7)
        found.add(
            (
                rng.choice([1, 2, 3]),
                per_generation,
                rng.choice([1, 1, 2, 3]),
                rows,
                rng.choice([1, 3]),
                rng.randint(1, STEPS - 1),
            )
        )
    return sorted(found)


def kinds(case: tuple[int, int, int, int, int, int]) -> set[str]:
    """Where in the run a checkpoint of this case lies."""
    accumulation, per_generation, iterations, rows, logging, step = case
    reuse = per_generation * iterations
    batches = rows // per_generation * reuse
    steps_an_epoch = -(-batches // accumulation)
    micro = step // steps_an_epoch * batches + step % steps_an_epoch * accumulation
    found = set()
    if micro % reuse:
        found.add("within a generation")
    if step % steps_an_epoch == 0:
        found.add("at an epoch's edge")
    if batches % accumulation:
        found.add("epochs end in a short accumulation")
    if accumulation % reuse and reuse % accumulation:
        found.add("a step spans generations")
    if step % logging:
        found.add("between two logs")
    return found


CASES = cases(9)


def test_the_cases_reach_everywhere() -> None:
    reached = set().union(*map(kinds, CASES))
    assert reached == {
        "within a generation", "at an epoch's edge", "epochs end in a short accumulation", "a step spans generations",
        "between two logs",
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resumed_is_uninterrupted(tmp_path: Path, case: tuple[int, ...]) -> None:
    accumulation, per_generation, iterations, rows, logging, step = case
    settings = {
        "gradient_accumulation_steps": accumulation, "steps_per_generation": per_generation,
        "num_iterations": iterations, "logging_steps": logging, "rows": rows,
    }  # fmt: skip
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(tmp_path / "cut" / f"checkpoint-{later}")
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(4321)  # whatever a new process starts with
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(resumed, whole, tmp_path)


def assert_equal(resumed: Any, whole: Any, tmp_path: Path) -> None:
    """Weights, optimizer, schedule, position, metrics and samples, bit for bit."""
    expected = adapter_weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed.model).items())
    states = [made.optimizer.state_dict()["state"] for made in (whole, resumed)]
    assert all(torch.equal(states[0][i][key], states[1][i][key]) for i in states[0] for key in states[0][i])
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    assert resumed.position.micro_steps == whole.position.micro_steps
    assert resumed.stateful.state_dict() == whole.stateful.state_dict()
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    samples = [(tmp_path / name / "completions.jsonl").read_text() for name in ("whole", "cut")]
    assert samples[0] == samples[1] != ""


@pytest.mark.parametrize("step", [2, 4])
def test_what_belongs_to_the_end_of_an_epoch_is_not_lost(tmp_path: Path, step: int) -> None:
    """A run that is killed right behind a checkpoint at an epoch's edge has evaluated and logged that epoch: the
    checkpoint of its last step is written when that is done."""
    settings: dict[str, Any] = {
        "rows": 2, "logging_strategy": "epoch", "eval_strategy": "epoch", "eval_dataset": prompts(2),
        "num_generations_eval": 2, "per_device_eval_batch_size": 2, "num_train_epochs": 4,
    }  # fmt: skip
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    held: list[int] = []

    class Killed(BaseException):
        """The process ends right behind the checkpoint."""

    class Kill(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                held.extend(r["step"] for r in history(tmp_path / "cut") if "eval_loss" in r)
                raise Killed

    with pytest.raises(Killed):
        build(tmp_path / "cut", callbacks=[Kill()], **settings).train()
    assert held == list(range(2, step + 1, 2))
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_equal(resumed, whole, tmp_path)


def test_a_finished_run_says_so(tmp_path: Path) -> None:
    """By steps and by epochs; it must not train 0 steps and look like a success."""
    build(tmp_path, rows=3).train()
    with pytest.raises(ConfigError, match="is at step 7 and max_steps=7: nothing is left to train; raise max_steps"):
        build(tmp_path, rows=3).train(resume_from_checkpoint=True)
    made = trainer(tmp_path / "epochs", max_steps=-1, num_train_epochs=1, save_strategy="epoch", data=prompts(3))
    made.train()
    assert made.state.global_step == 3
    for epochs in (1, 0.5):
        again = trainer(tmp_path / "epochs", max_steps=-1, num_train_epochs=epochs, data=prompts(3))
        with pytest.raises(
            ConfigError, match=f"step 3 and num_train_epochs={epochs} ends at step .*raise num_train_ep"
        ):
            again.train(resume_from_checkpoint=True)
    trainer(tmp_path / "epochs", max_steps=-1, num_train_epochs=2, data=prompts(3)).train(resume_from_checkpoint=True)


def test_what_cannot_go_on_exactly_is_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path / "only", save_only_model=True, **settings).train()
    with pytest.raises(ConfigError, match="has no optimizer.pt .save_only_model=True writes none."):
        trainer(tmp_path / "only", max_steps=2).train(resume_from_checkpoint=True)
    trainer(tmp_path / "rows", **settings).train()
    with pytest.raises(ConfigError, match="written with len.train_dataset.=12, now it is 11"):
        trainer(tmp_path / "rows", data=prompts(11), max_steps=2).train(resume_from_checkpoint=True)
    made = trainer(tmp_path / "rows", max_steps=2)
    made.stateful.add("drift", Drift())
    with pytest.raises(ConfigError, match="was written without 'drift', which is on now"):
        made.train(resume_from_checkpoint=True)
    parts = StatefulParts()
    with pytest.raises(ConfigError, match="was written with 'drift', which is off now"):
        parts.check({"drift": {}}, "checkpoint-1")
    parts.add("drift", Drift())
    with pytest.raises(ConfigError, match="'drift' is there already"):
        parts.add("drift", Drift())


def test_interrupted_and_resumed_in_the_same_process_by_the_same_trainer(tmp_path: Path) -> None:
    """As in a notebook: Ctrl-C between the micro-batches of a step, then train(resume_from_checkpoint=True)."""
    settings = {"gradient_accumulation_steps": 3, "steps_per_generation": 2, "rows": 5}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    made = build(tmp_path / "cut", **settings)
    forward = made.loss_step.pack

    def pack(rollouts: Any) -> Any:
        if made.state.global_step == 2 and len(made._step_losses) == 1:
            raise KeyboardInterrupt
        return forward(rollouts)

    made.loss_step.pack = pack
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.loss_step.pack = forward
    made.train(resume_from_checkpoint=True)
    assert_equal(made, whole, tmp_path)
