"""SIGTERM anywhere in a run: a whole checkpoint, exit code 0, and a resumed run that is the uninterrupted one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from pronghorn.grpo import reference
from pronghorn.grpo.checkpoint import is_whole, whole_checkpoints
from pronghorn.grpo.stop_signal import StopRequested, StopSignal
from pronghorn.rollout.base import create
from tests.grpo.support import FakeEngine, adapter_weights, letters, prompts, pronghorn_model, trainer
from tests.invariant.test_resume import history

SETTINGS: dict[str, Any] = {
    "steps_per_generation": 2, "num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4,
    "num_generations": 4, "max_steps": 5, "save_strategy": "no", "log_completions": True, "log_completions_steps": 1000,
    "logging_steps": 2,
}  # fmt: skip


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class At(TrainerCallback):
    """Sends SIGTERM in one event of one step."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        setattr(self, event, self._send)

    def _send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            terminate()
            terminate()


class InEngine(FakeEngine):
    """Sends SIGTERM in its n-th generation."""

    nth = 2

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        if len(self.calls) + 1 == self.nth:
            terminate()
        return super().generate(*args, **kwargs)


def build(folder: Path, engine: type[FakeEngine] = FakeEngine, rewards: Any = letters, **settings: Any) -> Any:
    model = pronghorn_model(dropout=0.1)
    made = trainer(folder, model, rewards, prompts(5), **{**SETTINGS, **settings})
    made.sampling._engine = engine(model, made.processing_class)
    return made


def reward_that_stops(nth: int) -> Callable[..., list[float]]:
    calls = []

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        calls.append(1)
        if len(calls) == nth:
            try:
                terminate()
                raise AssertionError("a signal in a reward function waited for its end")
            except Exception:  # noqa: BLE001 - as a careless reward function does
                raise AssertionError("the reward function caught the stop") from None
        return letters(completions)

    reward.__name__ = "letters"
    return reward


WAYS: dict[str, dict[str, Any]] = {
    "before the first step": {"callbacks": [At("on_train_begin", 0)], "at": 0},
    "as a step begins": {"callbacks": [At("on_step_begin", 2)], "at": 2},
    "between micro-batches": {"callbacks": [At("on_substep_end", 2)], "at": 2},
    "before the optimizer": {"callbacks": [At("on_pre_optimizer_step", 2)], "at": 3},
    "behind the optimizer": {"callbacks": [At("on_optimizer_step", 2)], "at": 3},
    "as it logs": {"callbacks": [At("on_log", 2)], "at": 2},
    "as it saves": {"callbacks": [At("on_save", 3)], "at": 3, "save_strategy": "steps", "save_steps": 3},
    "at the edge of an epoch": {"callbacks": [At("on_epoch_end", 4)], "at": 4},
    "while it generates": {"engine": InEngine, "at": 2},
    "in a reward function": {"rewards": reward_that_stops(2), "at": 2},
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Any, str]:
    """Weights, metrics and samples."""
    folder = tmp_path_factory.mktemp("whole")
    whole = build(folder)
    whole.train()
    return adapter_weights(whole.model), history(folder), (folder / "completions.jsonl").read_text()


@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_resumed_is_uninterrupted(tmp_path: Path, way: str, uninterrupted: Any) -> None:
    settings = dict(WAYS[way])
    at, callbacks = settings.pop("at"), settings.pop("callbacks", [])
    stopped_only = {name: settings.pop(name) for name in ("engine", "rewards") if name in settings}
    before = signal.getsignal(signal.SIGTERM)
    made = build(tmp_path / "cut", callbacks=callbacks, **stopped_only, **settings)
    with pytest.raises(SystemExit) as stop:
        made.train()
    assert stop.value.code == 0 and signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in whole_checkpoints(tmp_path / "cut")] == [f"checkpoint-{at}"]
    torch.manual_seed(99)
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    weights, metrics, samples = uninterrupted
    assert all(torch.equal(weight, weights[name]) for name, weight in adapter_weights(resumed.model).items())
    assert history(tmp_path / "cut") == metrics
    assert (tmp_path / "cut" / "completions.jsonl").read_text() == samples != ""


def test_a_second_signal_within_the_save_destroys_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(tmp_path, callbacks=[At("on_step_begin", 2)])
    save = type(made)._save_rng_state

    def slow(self: Any, folder: str) -> None:
        terminate()
        save(self, folder)
        terminate()

    monkeypatch.setattr(type(made), "_save_rng_state", slow)
    with pytest.raises(SystemExit) as stop:
        made.train()
    assert stop.value.code == 0
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert is_whole(tmp_path / "checkpoint-2")


def test_behind_the_last_step_it_saves_the_end(tmp_path: Path) -> None:
    """SIGTERM when all is trained: nothing is lost even where ``save_strategy`` is "no"."""
    with pytest.raises(SystemExit):
        build(tmp_path, callbacks=[At("on_train_end", 5)]).train()
    assert is_whole(tmp_path / "checkpoint-5")


def test_a_checkpoint_of_weights_alone_is_made_whole_by_a_stop(tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    with pytest.raises(SystemExit):
        build(tmp_path, callbacks=[At("on_step_begin", 2)], **settings).train()
    assert (tmp_path / "checkpoint-2" / "optimizer.pt").is_file()
    build(tmp_path).train(resume_from_checkpoint=True)


def test_what_came_before_the_first_step_is_kept(tmp_path: Path) -> None:
    """``eval_on_start``: its record stays through a stop before the first step, and it is not done again."""
    settings = {"eval_on_start": True, "eval_dataset": prompts(2), "num_generations_eval": 2}
    settings |= {"per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 3}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(SystemExit):
        build(tmp_path / "cut", callbacks=[At("on_step_begin", 0)], **settings).train()
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.args.eval_on_start
    records = history(tmp_path / "cut")
    assert records == history(tmp_path / "whole")
    assert [record["step"] for record in records if "eval_loss" in record] == [0, 3, 5]


def test_a_run_that_went_back_saves_its_own_step(tmp_path: Path) -> None:
    """Resumed from step 1 with another norm to clip at, stopped at step 3: the checkpoint-3 of before gives way."""
    build(tmp_path, save_strategy="steps", save_steps=1).train()
    before = (tmp_path / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
    made = build(tmp_path, callbacks=[At("on_step_begin", 3)], max_grad_norm=0.01)
    with pytest.raises(SystemExit):
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").read_bytes() != before
    assert whole_checkpoints(tmp_path)[-1].name == "checkpoint-3"


def test_the_handler_of_before_is_back_whatever_ends_the_run(tmp_path: Path) -> None:
    got = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        build(tmp_path / "a").train()
        assert signal.getsignal(signal.SIGTERM) is mine

        def broken(**kwargs: Any) -> list[float]:
            raise ValueError("broken")

        with pytest.raises(Exception, match="broken"):
            build(tmp_path / "b", rewards=broken).train()
        terminate()
        assert signal.getsignal(signal.SIGTERM) is mine and got == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_elsewhere_than_in_the_main_thread_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    stop = StopSignal()

    def listen() -> None:
        with stop.listening(), stop.interruptible():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert "outside the main thread, so SIGTERM saves no checkpoint" in capsys.readouterr().out


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        stop = StopSignal()
        with stop.listening(), stop.interruptible():
            terminate()
        assert not stop.requested
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_forked_child_dies_of_it_as_ever() -> None:
    stop = StopSignal()
    with stop.listening():
        child = os.fork()
        if child == 0:
            with stop.interruptible():
                terminate()
            os._exit(5)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM and not stop.requested


def test_noted_where_it_must_not_break_raised_where_it_may() -> None:
    stop, done = StopSignal(), []
    with stop.listening():
        with stop.interruptible():
            done.append("a step")
        terminate()
        done.append("the optimizer")
        with pytest.raises(StopRequested), stop.interruptible():
            done.append("never")
    assert done == ["a step", "the optimizer"] and stop.requested
    with stop.listening(), pytest.raises(StopRequested), stop.interruptible():  # noqa: PT012
        with stop.deferred():
            terminate()
            done.append("what must not be cut")
        done.append("never")
    assert done[2:] == ["what must not be cut"]


def test_while_the_reference_stands_in_the_policys_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With beta and a trained adapter, a copy of it changes places with the weights, tensor by tensor: a stop in
    between must not save a mixture of both."""
    settings = {"beta": 0.1, "save_strategy": "steps", "save_steps": 1}
    build(tmp_path / "whole", **settings).train()
    exchange, calls = reference._exchange, []

    def cut(a: torch.Tensor, b: torch.Tensor) -> None:
        calls.append(1)
        kept = a.detach().clone()
        a.data.copy_(b)
        if len(calls) == made_calls + 5:
            terminate()
        b.copy_(kept)

    made_calls = 2 * sum(1 for _ in adapter_weights(pronghorn_model()))  # of the first generation, there and back
    monkeypatch.setattr(reference, "_exchange", cut)
    with pytest.raises(SystemExit):
        build(tmp_path / "cut", **settings, save_total_limit=9).train()
    monkeypatch.setattr(reference, "_exchange", exchange)
    name = whole_checkpoints(tmp_path / "cut")[-1].name
    assert name == "checkpoint-2" and len(calls) == 2 * made_calls
    for file in ("adapter_model.safetensors", "reference.safetensors"):
        found, expected = (load_file(str(tmp_path / run / name / file)) for run in ("cut", "whole"))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_a_rollout_that_was_interrupted_leaves_an_engine_that_works(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM amid the native engine's decoding: model, adapters and cache are as before, and the same
    trainer goes on from its checkpoint as if nothing had been."""

    def native(folder: Path) -> Any:
        made = build(folder, save_strategy="steps", save_steps=1)
        made.sampling._engine = create("native", made.model, made.processing_class, max_seq_length=256)
        return made

    whole = native(tmp_path / "whole")
    whole.train()
    made = native(tmp_path / "cut")
    engine, generate, calls = made.sampling.engine, made.sampling.engine.generate, []

    def cut(prompts: Any, params: Any) -> Any:
        calls.append(1)

        def progress(finished: int, total: int, tokens: int) -> None:
            if len(calls) == 2 and tokens > 5:
                raise KeyboardInterrupt
            if len(calls) == 4 and tokens > 5:
                terminate()

        return generate(prompts, params, progress=progress)

    engine.generate = cut
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert made.model.training and engine.scheduler is not None and engine.scheduler.next_step() is None
    with pytest.raises(SystemExit):
        made.train(resume_from_checkpoint=True)  # the third and the fourth generation
    assert len(calls) == 4
    made.train(resume_from_checkpoint=True)
    expected = adapter_weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(made.model).items())
    assert history(tmp_path / "cut") == history(tmp_path / "whole")


def slow_in_a_worker(completions: list[Any], **kwargs: Any) -> list[float]:
    time.sleep(30)
    return [0.0] * len(completions)


def test_while_a_worker_scores(tmp_path: Path) -> None:
    """A reward function in a process of its own keeps nothing waiting, and its process is gone."""
    made = build(tmp_path, rewards=slow_in_a_worker, reward_workers=1)
    timer = threading.Timer(3.0, terminate)
    timer.start()
    before = time.monotonic()
    with pytest.raises(SystemExit):
        made.train()
    timer.join()
    assert time.monotonic() - before < 25 and is_whole(tmp_path / "checkpoint-0")
    made.sampling.runner.close()
    assert not [
        child for child in psutil.Process().children(recursive=True) if "forkserver" not in str(child.cmdline())
    ]


def some_spread(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """Two prompts of three are flat, so that groups are drawn in addition."""
    numbers = [int(prompt.split()[2]) for prompt in prompts]
    return [0.0 if n % 3 else score for n, score in zip(numbers, letters(completions))]


@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_drawn_in_addition_within_the_stopped_step_are_drawn_again(tmp_path: Path, staleness: int) -> None:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_generations": 4, "gradient_accumulation_steps": 2,
        "generation_batch_size": 8, "max_steps": 6, "dynamic_sampling": True, "rollout_staleness": staleness,
    }  # fmt: skip

    def run(folder: str, **more: Any) -> Any:
        return trainer(tmp_path / folder, pronghorn_model(), some_spread, prompts(24), **settings, **more)

    whole = run("whole")
    whole.train()
    cut = run("cut", callbacks=[At("on_substep_end", 2)])
    with pytest.raises(SystemExit):
        cut.train()
    assert not [t for t in threading.enumerate() if t.name.startswith("pronghorn-scoring")]
    resumed = run("cut")
    resumed.train(resume_from_checkpoint=True)
    expected = adapter_weights(whole.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed.model).items())
    assert resumed.supply.stream.cursor == whole.supply.stream.cursor
