"""``rollout_precision="exact"`` in the trainer: refused where it cannot hold, and every token's bits looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.grpo import exact, loss_step
from pronghorn.grpo.batch import pack
from pronghorn.grpo.config import GRPOConfig
from pronghorn.grpo.rollouts import Rollout
from tests.grpo.support import FakeEngine, pronghorn_model, trainer


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer's refusal of the CPU, off: the fake engine's log-probs are the trainer's own."""
    monkeypatch.setattr(loss_step, "check_device", lambda *_: None)


def test_the_cpu_is_refused_at_construction(tmp_path):
    with pytest.raises(ConfigError, match="rollout_precision='exact' with a model on cpu.*1e-5.*'auto'"):
        trainer(tmp_path, rollout_precision="exact")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rollout_precision": "Exact"}, "rollout_precision='Exact' is unknown; give 'auto' or 'exact'"),
        ({"rollout_precision": "exact", "rollout_engine": "vllm"}, "rollout_precision='exact' with rollout_engine='vl"),
        ({"rollout_oom_retry": True, "rollout_engine": "vllm"}, "rollout_oom_retry=True with rollout_engine='vllm'"),
        ({"rollout_keep_share": 1.5}, "rollout_keep_share=1.5 is no share"),
        ({"rollout_presicion": "exact"}, "did you mean 'rollout_precision'"),
    ],
)
def test_what_no_engine_would_act_on_is_refused(tmp_path, given, words):
    with pytest.raises(ConfigError, match=words):
        GRPOConfig(output_dir=str(tmp_path), bf16=False, **given)


def batch(sampler: list[float]) -> Any:
    return pack([Rollout([0, 7], [8, 9], sampler[:2]), Rollout([0, 7], [10, 11, 12], sampler[2:])], "cpu")


def test_the_first_token_that_differs_is_named():
    given = batch([-1.0, -2.0, -3.0, -4.0, -5.0])
    exact.require_equal(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]), given)
    other = torch.tensor([-1.0, -2.0, -3.0, torch.nextafter(torch.tensor(-4.0), torch.tensor(0.0)), -4.5])
    with pytest.raises(ArithmeticError, match=r"of 5 tokens in 2 completions, 2 .*token 1 of completion 1 \(id 11\)"):
        exact.require_equal(other, given)
    with pytest.raises(ArithmeticError, match=r"token 0 of completion 0 \(id 8\): nan"):
        exact.require_equal(torch.tensor([torch.nan, -2.0, -3.0, -4.0, -5.0]), given)


def test_rollouts_of_an_earlier_policy_are_left_out():
    old = Rollout([0, 7], [8, 9], [-1.0, -2.0])
    old.age = 1
    given = pack([old, Rollout([0, 7], [10], [-3.0])], "cpu")
    exact.require_equal(torch.tensor([-1.5, torch.nan, -3.0]), given)
    with pytest.raises(ArithmeticError, match="token 0 of completion 1"):
        exact.require_equal(torch.tensor([-1.5, torch.nan, -3.5]), given)


class Exact(FakeEngine):
    """Log-probs of the very batches that the trainer scores: one forward over all completions of a step."""

    asked = 0

    def check_exact(self) -> None:
        self.asked += 1

    def _one(self, ids: list[int], params: Any) -> Any:
        out = super()._one(ids, params)
        for c in out.outputs:
            c.policy_logprobs = torch.tensor(c.policy_logprobs).float().tolist()
        return out


def one_batch(folder: Any, shift: float = 0.0, **overrides: Any) -> tuple[Any, Exact]:
    """A step is one group, packed as the engine packed it: bits are equal on the CPU too."""
    model = pronghorn_model()
    made = trainer(folder, model, rollout_precision="exact", learning_rate=0.02, max_steps=3, **overrides)
    made.sampling._engine = Exact(model, made.processing_class, shift)
    return made, made.sampling._engine


def test_equal_bits_train_and_log_a_difference_of_zero(tmp_path, as_on_a_gpu):
    made, _ = one_batch(tmp_path)
    made.train()
    logs = [log for log in made.state.log_history if "loss" in log]
    assert len(logs) == 3
    for log in logs:
        assert log["sampling/logp_diff_max"] == log["sampling/logp_diff_mean"] == log["sampling/kl"] == 0.0
        assert log["sampling/sampling_logp_difference/max"] == 0.0


def test_one_bit_stops_the_run(tmp_path, as_on_a_gpu):
    made, _ = one_batch(tmp_path, shift=1e-6)
    with pytest.raises(ArithmeticError, match="rollout_precision='exact' is broken.*token 0 of completion 0"):
        made.train()
    assert made.state.global_step == 0


def test_the_same_bit_is_measured_by_default(tmp_path):
    model = pronghorn_model()
    made = trainer(tmp_path, model, max_steps=1)
    made.sampling._engine = FakeEngine(model, made.processing_class, shift=0.01)
    made.train()
    log = made.state.log_history[0]
    assert log["sampling/logp_diff_mean"] == pytest.approx(0.01, rel=1e-3)
    assert log["sampling/logp_diff_max"] == pytest.approx(0.01, rel=1e-2)
    assert log["sampling/logp_diff_mean"] == log["sampling/sampling_logp_difference/mean"]
    assert log["sampling/kl"] == pytest.approx(0.01**2 / 2, rel=0.05)


def test_the_differences_are_logged_before_anything_is_clipped(tmp_path):
    model = pronghorn_model()
    made = trainer(tmp_path, model, max_steps=1, vllm_importance_sampling_clip_max=1.0, epsilon=1e-4)
    made.sampling._engine = FakeEngine(model, made.processing_class, shift=-0.5)
    made.train()
    log = made.state.log_history[0]
    assert log["sampling/logp_diff_mean"] == pytest.approx(0.5, rel=1e-3)
    assert log["sampling/kl"] == pytest.approx(2.718281828**0.5 - 1 - 0.5, rel=1e-3)
    assert log["sampling/importance_sampling_ratio/max"] == 0.0, "and every completion was masked"


def test_the_engine_is_asked_before_it_samples(tmp_path, as_on_a_gpu, monkeypatch):
    from pronghorn.grpo import sampling_loop

    model = pronghorn_model()
    made = trainer(tmp_path, model, rollout_precision="exact", rollout_oom_retry=True)
    engine, given = Exact(model, made.processing_class), {}
    made.sampling._engine = None
    monkeypatch.setattr(sampling_loop.rollout, "engine_of", lambda *_, **kw: given.update(kw) or engine)
    made.train()
    assert engine.asked == 1 and given == {"oom_retry": True}


def test_the_engine_rests_after_each_generation(tmp_path):
    model = pronghorn_model()
    made = trainer(tmp_path, model, rollout_keep_share=0.25)
    engine = FakeEngine(model, made.processing_class)
    shares: list[float] = []
    engine.rest = lambda share: bool(shares.append(share))
    made.sampling._engine = engine
    made.train()
    assert shares == [0.25, 0.25]
