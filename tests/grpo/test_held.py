"""Drawings that nobody waits for any more: they end at once, and a checkpoint can have them drawn again bit for bit."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pronghorn.config.errors import ConfigError
from pronghorn.config.sampling import SamplingParams
from pronghorn.grpo.checkpoint import whole_checkpoints
from pronghorn.grpo.evaluation import AccuracyEval
from pronghorn.grpo.run_state import RunState
from pronghorn.grpo.trainer import GRPOTrainer
from pronghorn.models import state_of
from pronghorn.rollout import base
from tests.grpo.support import adapter_weights, fill_lora, letters, prompts, pronghorn_model
from tests.grpo.test_overlap import CASES, _no_thread_is_left, assert_same, build
from tests.grpo.test_sigterm import At, terminate
from tests.invariant.test_resume import history

__all__ = ["_no_thread_is_left"]  # a fixture of every test here, too
PATIENCE = 20.0
"""Seconds that a drawing waits to be stopped; one that is not goes on, and the test says so."""


class Stuck:
    """Holds the drawings that a thread of its own draws, from the n-th on, at one look until they are stopped.

    Attributes:
        stopped: of each that was held, or stopped before that look, whether it was stopped.
    """

    def __init__(self, made: Any, nth: int, at: int = 3) -> None:
        self.nth, self.at, self.reached, self.stopped = nth, at, threading.Event(), []
        self._ready, self._calls = made.sampling.engine.ready, 0
        made.sampling.engine.ready = self._readied

    def _readied(self, *args: Any) -> Any:
        drawing = self._ready(*args)
        look, looks = drawing._look, []

        def held(finished: int, total: int, tokens: int) -> None:
            looks.append(tokens)
            if threading.current_thread().name == "pronghorn-sampling":
                self._calls += len(looks) == 1
                if self._calls >= self.nth and (len(looks) == self.at or drawing._stopped):
                    self.reached.set()
                    began = time.monotonic()
                    while not drawing._stopped and time.monotonic() - began < PATIENCE:
                        time.sleep(0.005)
                    self.stopped.append(drawing._stopped)
            look(finished, total, tokens)

        drawing._look = held
        return drawing


def by_state(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
    """Rewards that depend on what the reward function saw of the run when its generation was begun."""
    seen = trainer_state.global_step + 0.001 * trainer_state.num_input_tokens_seen
    return [score * (1.0 + 0.1 * seen) + 0.01 * i * seen for i, score in enumerate(letters(completions))]


def by_step(completions: list[Any], trainer_state: Any, **kwargs: Any) -> list[float]:
    """The same, of the log history too."""
    history = trainer_state.log_history
    shift = 0.1 * len(history) + sum(entry.get("reward", 0.0) for entry in history)
    return [
        score * (1.0 + 0.1 * shift) + 0.01 * i * shift for i, score in enumerate(by_state(completions, trainer_state))
    ]


def pending_of(checkpoint: Path) -> list[Any]:
    return RunState.load(checkpoint).parts["supply"]["pending"]


class Later(TrainerCallback):
    """SIGTERM some time after an event of a step, while the main thread does what follows."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._begin)

    def _begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            threading.Timer(0.5, terminate).start()


SETTINGS: dict[str, Any] = {"max_steps": 6, "rewards": by_step, "data": prompts(24)}
STOPS: dict[str, tuple[dict[str, Any], TrainerCallback]] = {
    "as a step begins": ({}, At("on_step_begin", 2)),
    "while it waits for the drawing": ({}, Later("on_step_begin", 2)),
    "within a generation's steps": (CASES["reused"], At("on_step_end", 2)),
    "refilled": ({**CASES["refilled"], "rewards": by_step}, At("on_step_end", 2)),
    "two ahead": ({"rollout_staleness": 2}, At("on_step_begin", 2)),
    "several steps a look": ({"ahead": True, "max_completion_length": 200}, At("on_step_begin", 2)),
    "while it saves": ({"save_strategy": "steps", "save_steps": 3}, Later("on_step_end", 3)),
    "while it evaluates": (
        {"eval_dataset": prompts(2), "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4},
        Later("on_step_end", 2),
    ),
}


@pytest.mark.parametrize("way", STOPS)
def test_sigterm_waits_for_no_drawing_and_the_resumed_run_is_the_uninterrupted_one(tmp_path: Path, way: str) -> None:
    given, callback = STOPS[way]
    settings = {**SETTINGS, **given}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    cut = build(tmp_path / "cut", callbacks=[callback], **settings)
    first = settings.get("rollout_staleness", 1)  # so many are drawn beside the first generation's steps
    stuck = Stuck(cut, first if way == "within a generation's steps" else first + callback.step - 1)
    step = cut.training_step

    def stepping(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        if cut.state.global_step + 1 == callback.step:
            assert stuck.reached.wait(60)
        return loss

    cut.training_step = stepping
    began = time.monotonic()
    with pytest.raises(SystemExit):
        cut.train()
    assert stuck.stopped == [True] and time.monotonic() - began < PATIENCE
    assert not cut.supply.pending and not cut.supply._left
    newest = whole_checkpoints(tmp_path / "cut")[-1]
    assert ["policy" in made for _, _, _, made in pending_of(newest)] == [False] * (first - 1) + [True]
    torch.manual_seed(99)
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def stopped(folder: Path, resume: bool, **settings: Any) -> Path:
    """A run that SIGTERM stops amid a drawing at step 2; its checkpoint."""
    cut = build(folder, callbacks=[At("on_step_begin", 2)], **settings)
    if not resume:
        Stuck(cut, settings.get("rollout_staleness", 1) + 1)
    with pytest.raises(SystemExit):
        cut.train(resume_from_checkpoint=resume or None)
    return whole_checkpoints(folder)[-1]


def test_one_that_is_to_be_drawn_again_outlives_further_stops(tmp_path: Path) -> None:
    """Before it has begun again, and amid that: the checkpoint keeps what draws it."""
    whole = build(tmp_path / "whole", **SETTINGS)
    whole.train()
    before = pending_of(stopped(tmp_path / "cut", False, **SETTINGS))
    again = pending_of(stopped(tmp_path / "cut", True, **SETTINGS))
    cut = build(tmp_path / "cut", **SETTINGS)
    stuck = Stuck(cut, 1)
    threading.Thread(target=lambda: (stuck.reached.wait(60), terminate())).start()
    with pytest.raises(SystemExit):
        cut.train(resume_from_checkpoint=True)
    assert stuck.stopped == [True]
    for ((*said, made),) in (again, pending_of(whole_checkpoints(tmp_path / "cut")[-1])):
        assert said == before[0][:3] and made["seen"] == before[0][3]["seen"]
        assert all(torch.equal(a, b) for a, b in zip(made["policy"], before[0][3]["policy"], strict=True))
    resumed = build(tmp_path / "cut", **SETTINGS)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


@pytest.mark.parametrize("case", ["plain", "refilled", "moving reference"])
def test_a_run_without_overlap_draws_it_too(tmp_path: Path, case: str) -> None:
    settings = {**SETTINGS, **CASES[case], "rewards": by_step}
    whole = build(tmp_path / "whole", overlap=False, **settings)
    whole.train()
    stopped(tmp_path / "cut", False, **settings)
    resumed = build(tmp_path / "cut", overlap=False, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_what_cannot_draw_it_again_says_so(tmp_path: Path) -> None:
    newest = stopped(tmp_path, False, **SETTINGS)
    assert newest.name == "checkpoint-2"
    made = build(tmp_path, overlap=False, **SETTINGS)
    other = GRPOTrainer(
        made.model, by_step, made.args, SETTINGS["data"], processing_class=made.processing_class,
        rollout_func=lambda prompts, trainer: {},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="tools or a rollout_func cannot do"):
        other.train(resume_from_checkpoint=True)


def test_a_policy_is_drawn_by_until_the_next_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pronghorn_model()
    engine = base.create("native", model, state_of(model).tokenizer)
    params = SamplingParams(n=2, max_tokens=8, seed=3)
    expected = engine.generate([[0, 5]], params)[0].outputs
    for keep in (False, True):
        drawing = engine.ready([[0, 5]], params, 1.0)
        drawing.stop(keep=keep)
        drawing.stop()
        with pytest.raises(base.DrawingStopped) as kept:
            drawing()
        assert (kept.value.policy is not None) == keep
    policy = kept.value.policy
    fill_lora(model, seed=9)
    now = engine.generate([[0, 5]], params)[0].outputs
    assert now != expected
    for drawer in (engine, base.create("native", model, state_of(model).tokenizer)):
        assert drawer.ready([[0, 5]], params, 1.0, policy)()[0].outputs == expected
        assert drawer.generate([[0, 5]], params)[0].outputs == now
        assert drawer.ready([[0, 5]], params, 1.0)()[0].outputs == now
    with pytest.raises(ConfigError, match="do not fit the"):
        engine.ready([[0, 5]], params, 1.0, policy[1:])


def held_out(every: int) -> AccuracyEval:
    rows = [{"prompt": f"{i} + {i}?", "answer": str(2 * i)} for i in range(3)]
    return AccuracyEval(rows, params=SamplingParams(temperature=0.0, max_tokens=4), every=every)


def measured(folder: Path, every: int, **settings: Any) -> Any:
    """A trainer that is measured by the engine that its rollouts have, as a trainer by its defaults is."""
    made = build(folder, accuracy_eval=held_out(every), **settings)
    state_of(made.model).engine = made.sampling.engine
    return made


@pytest.mark.parametrize("when", ["at the last step", "behind it", "by the trainer itself"])
def test_the_last_measurement_waits_for_no_drawing(tmp_path: Path, when: str) -> None:
    settings: dict[str, Any] = {"max_steps": 2}
    if when == "by the trainer itself":
        settings |= {
            "eval_dataset": prompts(2), "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4,
        }  # fmt: skip
        made = build(tmp_path, **settings)
    else:
        made = measured(tmp_path, 2 if when == "at the last step" else 5, **settings)
    stuck = Stuck(made, 2)
    made.train()
    assert stuck.stopped == [True]
    name = "eval_reward" if when == "by the trainer itself" else "eval_accuracy"
    assert [record["step"] for record in history(tmp_path) if name in record][-1] == 2


SAVES: dict[str, dict[str, Any]] = {
    "due": {"max_steps": 2, "save_strategy": "steps", "save_steps": 2},  # then the drawing is needed, and waited for
    "by SIGTERM": {"max_steps": 2, "callbacks": [At("on_train_end", 2)]},
    "at the epoch's end": {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "epoch"},
}


@pytest.mark.parametrize("save", SAVES)
def test_a_checkpoint_of_the_end_has_what_the_last_measurement_let_go_of(tmp_path: Path, save: str) -> None:
    """A run that goes on from its end, ``max_steps`` raised, is the longer run."""
    # by_state, as the shorter run's history has a record of its end that the longer one's has not
    constant = {**SETTINGS, "rewards": by_state, "lr_scheduler_type": "constant", "data": prompts(2)}
    whole = measured(tmp_path / "whole", 2, **constant)
    whole.train()
    settings: dict[str, Any] = {**constant, **SAVES[save]}
    short = measured(tmp_path / "short", 2, **settings)
    stuck = None if save == "due" else Stuck(short, 2)
    with pytest.raises(SystemExit) if save == "by SIGTERM" else nullcontext():
        short.train()
    ((*_, made),) = pending_of(whole_checkpoints(tmp_path / "short")[-1])
    assert ("policy" in made) == (stuck is not None) and (stuck is None or stuck.stopped == [True])
    longer = measured(tmp_path / "short", 2, **constant)
    longer.train(resume_from_checkpoint=True)
    assert longer.state.global_step == 6
    expected = adapter_weights(whole.model)
    assert all(torch.equal(w, expected[n]) for n, w in adapter_weights(longer.model).items())
