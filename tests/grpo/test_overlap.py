"""Generations drawn on a thread while earlier ones are trained on: the run without it, to the last bit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.config.sampling import SamplingParams
from pronghorn.rollout import base
from pronghorn.rollout.native.snapshot import Snapshot
from tests.grpo.support import adapter_weights, config, letters, prompts, pronghorn_model, trainer
from tests.grpo.test_sigterm import At, some_spread, terminate
from tests.invariant.test_resume import Interrupt, history

WAITS = ("sampling/scoring_wait", "sampling/generation_wait")


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())  # other tests of the same process may have left some
    yield
    assert not [t for t in threading.enumerate() if t.name.startswith("pronghorn-") and t not in before]


def build(folder: Path, overlap: bool = True, model: Any = None, **settings: Any) -> Any:
    """A trainer on the native engine, at a staleness of 1."""
    ahead = settings.pop("ahead", None)
    given = {"rollout_staleness": 1, "max_steps": 5, "log_completions": True, "log_completions_steps": 1000}
    model = pronghorn_model() if model is None else model
    made = trainer(folder, model, **{**given, **settings}, rollout_overlap=overlap)
    made.sampling._engine = base.create("native", model, made.processing_class, ahead=ahead)
    return made


def logs(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k not in WAITS} for record in history(folder)]


def assert_same(one: Any, other: Any) -> None:
    """Weights, metrics and samples."""
    expected = adapter_weights(other.model)
    assert all(torch.equal(w, expected[n]) for n, w in adapter_weights(one.model).items())
    one, other = Path(one.args.output_dir), Path(other.args.output_dir)
    assert logs(one) == logs(other)
    assert (one / "completions.jsonl").read_text() == (other / "completions.jsonl").read_text() != ""


class Gate:
    """Holds the walks of one named thread until it is opened, and notes who walked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, thread: str = "pronghorn-sampling") -> None:
        self.opened, self.reached, self.threads = threading.Event(), threading.Event(), []
        walk = Snapshot.hidden_states

        def held(snapshot: Snapshot, *args: Any) -> torch.Tensor:
            self.threads.append(threading.current_thread().name)
            if self.threads[-1] == thread:
                self.reached.set()
                assert self.opened.wait(60), "nobody opened the gate"
            return walk(snapshot, *args)

        monkeypatch.setattr(Snapshot, "hidden_states", held)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "reused": {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.04},
    "refilled": {
        "gradient_accumulation_steps": 2, "generation_batch_size": 8, "rewards": some_spread, "dynamic_sampling": True,
        "curriculum": True, "replay_buffer_size": 2,
    },
    "moving reference": {"rollout_staleness": 2, "sync_ref_model": True, "beta": 0.1, "ref_model_sync_steps": 2},
    "dropout": {"dropout": 0.2},
    "several steps a look": {"ahead": True},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_overlapped_run_is_the_sequential_one(tmp_path: Path, case: str) -> None:
    settings = {"max_steps": 9, **CASES[case]}
    dropout = settings.pop("dropout", 0.0)
    made = {}
    for name in ("overlapped", "sequential"):
        model = pronghorn_model(dropout=dropout)
        made[name] = build(tmp_path / name, name == "overlapped", model, data=prompts(24), **settings)
        made[name].train()
    if case == "refilled":
        assert any(log.get("sampling/refill_rounds") for log in history(tmp_path / "overlapped"))
    assert_same(made["overlapped"], made["sequential"])
    waits = [log["sampling/generation_wait"] for log in history(tmp_path / "overlapped") if "reward" in log]
    assert waits and min(waits) >= 0 and "sampling/generation_wait" not in str(history(tmp_path / "sequential"))


def test_sampling_and_training_run_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread samples only once a training step has ended, and that only once the thread has begun."""
    gate = Gate(monkeypatch)
    made = build(tmp_path, max_steps=3)
    step = made.training_step

    def watched(*args: Any, **kwargs: Any) -> Any:
        loss = step(*args, **kwargs)
        if not gate.opened.is_set():
            assert gate.reached.wait(60)
            gate.opened.set()
        return loss

    made.training_step = watched
    made.train()
    assert made.state.global_step == 3 and set(gate.threads) == {"MainThread", "pronghorn-sampling"}


def test_the_snapshot_is_the_policy_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masters, modes and rounded adapters change while the thread is held; what it says is the old policy's."""
    model = pronghorn_model()
    engine = base.create("native", model, model.pronghorn_state.tokenizer)
    ids, params = [[0, *range(40, 60)], [0, 7, 8]], SamplingParams(n=3, max_tokens=12, seed=5)
    before = engine.generate(ids, params)
    drawing, gate, said = engine.ready(ids, params, 1.0), Gate(monkeypatch), []
    thread = threading.Thread(target=lambda: said.append(drawing()), name="pronghorn-sampling")
    thread.start()
    drawing.wait_begun()
    assert gate.reached.wait(60)
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(-3.0)
    gate.opened.set()
    thread.join()
    after = engine.generate(ids, params)  # waited, and has the new policy
    assert [o.outputs for o in said[0]] == [o.outputs for o in before] != [o.outputs for o in after]
    assert model.training and all(m.training for m in model.modules())
    fresh = base.create("native", model, model.pronghorn_state.tokenizer)
    assert [o.outputs for o in after] == [o.outputs for o in fresh.generate(ids, params)]


def test_whoever_asks_meanwhile_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pronghorn_model()
    engine = base.create("native", model, model.pronghorn_state.tokenizer)
    params, order = SamplingParams(max_tokens=6, seed=1, temperature=0), []
    gate = Gate(monkeypatch)
    drawing = engine.ready([[0, 5, 6]], params, 1.0)
    first = threading.Thread(target=lambda: (drawing(), order.append("ready")), name="pronghorn-sampling")
    first.start()
    drawing.wait_begun()
    second = threading.Thread(target=lambda: (engine.generate([[0, 9]], params), order.append("asked")))
    second.start()
    assert gate.reached.wait(60)
    second.join(0.2)
    assert second.is_alive() and not order
    gate.opened.set()
    first.join()
    second.join()
    assert order == ["ready", "asked"]
    late = engine.ready([[0, 5, 6]], params, 1.0)
    engine.generate([[0, 9]], params)
    with pytest.raises(RuntimeError, match="another generation ran between"):
        late()


def test_an_error_while_sampling_stops_the_run_where_it_is_needed_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    walk, broken = Snapshot.hidden_states, threading.Event()

    def breaks(snapshot: Snapshot, *args: Any) -> torch.Tensor:
        sampling = threading.current_thread().name == "pronghorn-sampling"
        if sampling and made.state.global_step >= 1 and not broken.is_set():
            broken.set()
            raise FloatingPointError("logits that are no numbers")
        return walk(snapshot, *args)

    monkeypatch.setattr(Snapshot, "hidden_states", breaks)
    made = build(tmp_path)
    with caplog.at_level(logging.WARNING, logger="pronghorn"), pytest.raises(FloatingPointError, match="no numbers"):
        made.train()
    assert made.state.global_step in (1, 2) and "not used" not in caplog.text


def test_an_error_of_a_generation_that_is_not_used_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed, walk = threading.Event(), Snapshot.hidden_states

    def breaks(snapshot: Snapshot, *args: Any) -> torch.Tensor:
        if threading.current_thread().name == "pronghorn-sampling":
            failed.set()
            raise FloatingPointError("logits that are no numbers")
        return walk(snapshot, *args)

    monkeypatch.setattr(Snapshot, "hidden_states", breaks)
    made = build(tmp_path, max_steps=1)
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        made.train()
    assert failed.is_set() and "sampling of generation 1, sampled ahead and not used: FloatingPointError" in caplog.text


def test_the_end_of_a_run_stops_what_is_being_drawn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = build(tmp_path, max_steps=1, max_completion_length=200)
    looks: list[int] = []
    ready = made.sampling.engine.ready

    def watched(*args: Any) -> Any:
        drawing = ready(*args)
        look = drawing._look

        def slowly(finished: int, total: int, tokens: int) -> None:
            looks.append(tokens)
            if len(looks) == 3 and threading.current_thread().name == "pronghorn-sampling":
                third.set()
                assert over.wait(60)
            look(finished, total, tokens)

        if made.supply.pending:  # not the first, which the run itself waits for
            drawing._look, stop = slowly, drawing.stop
            drawing.stop = lambda: (stop(), over.set())  # so only a stop lets it go on
        return drawing

    third, over = threading.Event(), threading.Event()
    made.sampling.engine.ready = watched
    settle = made.supply.settle

    def settling() -> None:
        assert third.wait(60)  # or the run may be over before the drawing is under way
        settle()

    made.supply.settle = settling
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        made.train()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("pronghorn")]
    assert made.state.global_step == 1 and len(looks) == 3 and not said


@pytest.mark.parametrize("overlap", [True, False])
def test_a_run_leaves_nothing_behind(tmp_path: Path, overlap: bool) -> None:
    made = build(tmp_path, overlap, max_steps=2)
    made.train()
    assert not made.supply.pending and not made.supply._left


def test_settling_that_is_interrupted_is_taken_up_again(tmp_path: Path) -> None:
    made = build(tmp_path, max_steps=2)
    settle = made.supply.settle

    def settling() -> None:
        last, end = made.supply.pending[-1], made.supply.pending[-1].end
        last.end = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            settle()
        assert made.supply._left == [last]
        last.end = end
        settle()

    made.supply.settle = settling
    made.train()
    assert not made.supply.pending and not made.supply._left


@pytest.mark.parametrize("case", ["plain", "reused", "refilled"])
def test_resumed_is_uninterrupted(tmp_path: Path, case: str) -> None:
    settings = {**CASES[case], "max_steps": 6, "save_strategy": "steps", "save_steps": 1, "data": prompts(24)}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    cut = build(tmp_path / "cut", callbacks=[Interrupt(3)], **settings)
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    torch.manual_seed(99)
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


@pytest.mark.parametrize("event", ["on_substep_end", "on_step_end"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path: Path, event: str) -> None:
    settings: dict[str, Any] = {**CASES["refilled"], "max_steps": 6, "data": prompts(24)}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    cut = build(tmp_path / "cut", callbacks=[At(event, 2)], **settings)
    with pytest.raises(SystemExit):
        cut.train()
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_a_stop_while_the_thread_draws_ends_that_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_steps": 4}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    gate, cut = Gate(monkeypatch), build(tmp_path / "cut", **settings)
    pack, settle = cut.loss_step.pack, cut.supply.settle
    ended: list[BaseException | None] = []

    def packing(rollouts: list[Any]) -> Any:
        assert gate.reached.wait(60)
        terminate()
        return pack(rollouts)

    def settling() -> None:
        gate.opened.set()
        (begun,) = [pending for pending in cut.supply._left if pending.drawing is not None]
        settle()
        ended.append(begun.drawing.end())

    cut.loss_step.pack, cut.supply.settle = packing, settling
    with pytest.raises(SystemExit):
        cut.train()
    assert isinstance(ended[0], base.DrawingStopped)
    resumed = build(tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert_same(resumed, whole)


def test_evaluation_meanwhile_waits_and_changes_nothing(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "eval_dataset": prompts(2), "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4,
    }  # fmt: skip
    made = {}
    for name in ("overlapped", "sequential"):
        made[name] = build(tmp_path / name, name == "overlapped", **settings)
        made[name].train()
    assert_same(made["overlapped"], made["sequential"])
    assert any("eval_reward" in log for log in history(tmp_path / "overlapped"))


def test_it_needs_generations_that_are_sampled_ahead_and_the_native_engine() -> None:
    for given, match in [
        ({}, "rollout_overlap=True with rollout_staleness=0"),
        ({"rollout_staleness": 1, "rollout_engine": "vllm"}, "rollout_overlap=True with rollout_engine='vllm'"),
        ({"rollout_staleness": 1, "rollout_oom_retry": True}, "rollout_oom_retry=True with rollout_overlap=True"),
    ]:
        with pytest.raises(ConfigError, match=match):
            config(Path("unused"), rollout_overlap=True, **given)
    assert not config(Path("unused")).rollout_overlap


@pytest.mark.parametrize("what", ["norm", "hook", "projection hook", "head", "rollout_func"])
def test_what_cannot_be_drawn_beside_training_is_refused_before_the_run(tmp_path: Path, what: str) -> None:
    model, match = pronghorn_model(), "rollout_overlap=True cannot serve "
    inner = model.get_base_model()
    if what == "norm":
        inner.model.norm.weight.requires_grad_(True)
        match += r".*model\.norm\.weight \(1 such\), which trains"
    elif what == "hook":
        inner.model.layers[1].register_forward_hook(lambda *_: None)
        match += "a hook on LlamaDecoderLayer"
    elif what == "projection hook":
        inner.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
        match += "a hook on LoraLinear"
    elif what == "head":
        inner.lm_head.register_forward_hook(lambda *_: None)
        match += "an output head"
    if what == "rollout_func":
        from pronghorn.grpo.trainer import GRPOTrainer

        args = config(tmp_path, rollout_staleness=1, rollout_overlap=True)
        with pytest.raises(ConfigError, match="rollout_overlap=True with tools or a rollout_func"):
            GRPOTrainer(model, letters, args, prompts(), rollout_func=lambda prompts, trainer: {})
        return
    with pytest.raises(ConfigError, match=match):
        build(tmp_path, model=model)
