"""The trainer as a whole: metrics, rewards, evaluation, bad input, what reaches the reward functions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig

from pronghorn.config.errors import ConfigError
from pronghorn.config.sampling import SamplingParams
from pronghorn.grpo import metrics as metrics_module
from pronghorn.grpo.config import GRPOConfig
from pronghorn.grpo.setup import as_model
from pronghorn.grpo.trainer import GRPOTrainer
from pronghorn.models import modes
from pronghorn.models.state import state_of
from pronghorn.rollout.base import create
from tests.grpo.support import (
    FakeEngine,
    adapter_weights,
    config,
    letters,
    llama,
    lora,
    prompts,
    pronghorn_model,
    trainer,
)
from tests.helpers import tiny_llama

TRL_NAMES = {
    "loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "step_time", "entropy", "reward", "reward_std",
    "frac_reward_zero_std", "rewards/letters/mean", "rewards/letters/std", "completions/mean_length",
    "completions/min_length", "completions/max_length", "completions/mean_terminated_length",
    "completions/min_terminated_length", "completions/max_terminated_length", "completions/clipped_ratio",
    "clip_ratio/low_mean", "clip_ratio/low_min", "clip_ratio/high_mean", "clip_ratio/high_max",
    "clip_ratio/region_mean", "sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max",
    "sampling/importance_sampling_ratio/min", "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
}  # fmt: skip
OURS = {"sampling/logp_diff_mean", "sampling/logp_diff_max", "sampling/kl", "prompts/truncated_ratio"}


def test_metrics_have_trls_names_and_reach_the_files(tmp_path: Path) -> None:
    made = trainer(tmp_path, beta=0.04, log_completions=True)
    made.train()
    assert set(made.state.log_history[0]) == TRL_NAMES | OURS | {"kl", "step"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2] and lines[0]["reward"] == made.state.log_history[0]["reward"]
    samples = [json.loads(line) for line in (tmp_path / "completions.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [1] * 4 + [2] * 4
    assert set(samples[0]) == {"step", "mode", "prompt", "completion", "rewards", "advantage", "extra"}
    assert lines[0]["sampling/sampling_logp_difference/max"] == pytest.approx(0, abs=1e-5)
    assert lines[0]["kl"] == 0 < lines[1]["kl"] and lines[0]["num_tokens"] > 0  # the first step is at the reference


def test_what_a_gpu_computes_is_read_behind_backward_and_logged_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logged(name: str) -> list[dict[str, Any]]:
        settings = {"gradient_accumulation_steps": 2, "use_adaptive_entropy": True, "beta": 0.04, "eval_steps": 1}
        made = trainer(tmp_path / name, eval_dataset=prompts(4), eval_strategy="steps", **settings)
        backward, train = made.accelerator.backward, made.metrics["train"]

        def watched(loss: torch.Tensor) -> None:
            before.append(len(train._coming))
            backward(loss)
            assert len(train._coming) == before[-1]

        made.accelerator.backward = watched
        made.train()
        assert not any(metrics._coming for metrics in made.metrics.values())
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        clocks = ("time", "runtime", "per_second")
        return [{key: value for key, value in line.items() if not key.endswith(clocks)} for line in lines]

    before: list[int] = []
    at_once = logged("at-once")
    assert before == [0] * 4
    monkeypatch.setattr(metrics_module, "_computing", lambda tensor: True)
    assert logged("late") == at_once and len(at_once) == 5
    assert min(before[4:]) > 15


def test_rewards_see_columns_and_may_log(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def reward(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):  # type: ignore[no-untyped-def]
        seen.update(prompts=prompts, completions=completions, answer=answer, step=trainer_state.global_step)
        log_extra("hint", ["h"] * len(prompts))
        log_metric("my/metric", 7.0)
        return [float(len(ids)) for ids in completion_ids]

    made = trainer(tmp_path, rewards=[reward, letters], reward_weights=[1.0, 0.0], max_steps=1)
    made.train()
    assert len(seen["prompts"]) == 4 == len(set(map(str, seen["completions"])))
    assert len(set(seen["prompts"])) == 1 and seen["answer"] == [seen["answer"][0]] * 4 and seen["step"] == 0
    log = made.state.log_history[0]
    assert log["my/metric"] == 7.0 and log["reward"] == log["rewards/reward/mean"] == log["completions/mean_length"]
    assert made.sampling.samples[0].extra == {"hint": "h"}


def test_chats_give_chats(tmp_path: Path) -> None:
    chats = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{i}?"}]} for i in range(4)])
    seen: list[Any] = []

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return [0.0, 1.0, 2.0, 3.0]

    made = trainer(tmp_path, rewards=reward, data=chats, max_steps=1)
    made.train()
    assert all(len(c) == 1 and c[0]["role"] == "assistant" and isinstance(c[0]["content"], str) for c in seen)
    ids, truncated = made.sampling.encoder([chats[0]["prompt"]])
    assert ids[0].count(0) == 1 and truncated == 0  # one BOS


def test_generation_serves_its_steps_and_iterations(tmp_path: Path) -> None:
    """Two steps a generation, each used twice: 6 steps take 2 generations, and old log-probabilities are kept."""
    made = trainer(tmp_path, steps_per_generation=2, num_iterations=2, max_steps=6)
    made.train()
    assert made.sampling.engine.calls == [2, 2]
    logs = made.state.log_history
    assert "reward" in logs[0] and "reward" in logs[4] and "reward" not in logs[1]
    assert max(log["clip_ratio/region_mean"] for log in logs[:6]) > 0  # later passes are off policy
    assert logs[0]["clip_ratio/region_mean"] == 0


def test_dropout_is_off_in_rollouts_and_on_in_training(tmp_path: Path) -> None:
    model = pronghorn_model(dropout=0.5)
    made = trainer(tmp_path, model, max_steps=1)
    assert made.loss_step.needs_old  # so that dropout's noise is not taken for a sampler mismatch
    made.sampling._engine = None  # the native engine, which sees to modes itself
    made.train()
    assert model.training
    assert made.state.log_history[0]["sampling/sampling_logp_difference/max"] == pytest.approx(0, abs=1e-5)


def test_a_generation_walks_the_modules_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That walk takes milliseconds for a large model, in which a GPU waits."""
    model = pronghorn_model()
    made = trainer(tmp_path, model)
    made.sampling._engine = create("native", model, made.processing_class)
    params = [SamplingParams(n=1, max_tokens=2, seed=0)]
    made.sampling.generate([[0, 5]], params)
    walks: list[str] = []

    def count(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def counted(walked: torch.nn.Module) -> Any:
            walks.extend([name] if walked is model else [])
            return own(walked)

        monkeypatch.setattr(owner, name, counted)

    count(torch.nn.Module, "modules")
    count(modes, "_modules")
    model.train()
    made.sampling.generate([[0, 5]], params)
    assert walks == ["_modules"] and model.training
    monkeypatch.undo()
    assert all(m.training for m in model.modules())


def test_a_mismatched_sampler_is_corrected_by_default(tmp_path: Path) -> None:
    """The sampler claims half the probability: ratios of 2^length; those over 3 leave the loss."""
    model = pronghorn_model()
    engine = FakeEngine(model, state_of(model).tokenizer, shift=-0.6931472)
    made = trainer(tmp_path, model, engine=engine, max_steps=1)
    made.train()
    log = made.state.log_history[0]
    assert log["sampling/sampling_logp_difference/mean"] == pytest.approx(0.693, abs=1e-3)
    assert log["sampling/kl"] == pytest.approx(2 - 1 - 0.6931, abs=1e-3)
    assert log["sampling/importance_sampling_ratio/min"] == 0 and log["sampling/importance_sampling_ratio/max"] <= 3
    before = adapter_weights(pronghorn_model())
    uncorrected = trainer(tmp_path / "off", engine=None, max_steps=1, vllm_importance_sampling_correction=False)
    uncorrected.train()
    assert "sampling/importance_sampling_ratio/mean" not in uncorrected.state.log_history[0]
    assert any(not torch.equal(w, before[n]) for n, w in adapter_weights(uncorrected.model).items())


def test_evaluation_samples_scores_and_leaves_training_alone(tmp_path: Path) -> None:
    kwargs: dict[str, Any] = {"max_steps": 4, "steps_per_generation": 2}
    plain = trainer(tmp_path / "plain", **kwargs)
    plain.train()
    evaluated = trainer(
        tmp_path / "eval", eval_dataset=prompts(3), eval_strategy="steps", eval_steps=1, num_generations_eval=2,
        per_device_eval_batch_size=2, **kwargs,
    )  # fmt: skip
    evaluated.train()
    for name, weight in adapter_weights(plain.model).items():
        assert torch.equal(weight, adapter_weights(evaluated.model)[name]), name
    logs = [log for log in evaluated.state.log_history if "eval_reward" in log]
    assert len(logs) == 4 and {"eval_loss", "eval_rewards/letters/mean", "eval_completions/mean_length"} <= set(logs[0])
    assert evaluated.sampling.engine.calls.count(1) == 12
    metrics = evaluated.evaluate(prompts(2))
    assert "eval_loss" in metrics and evaluated.model.training is False


def test_prompts_are_truncated_from_the_left_counted_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Dataset.from_dict({"prompt": ["short", "a very long question " * 5 + "END"] * 4})
    made = trainer(tmp_path, data=data, max_prompt_length=8, per_device_train_batch_size=8, max_steps=1)
    assert "4 of 8 prompts in train_dataset are over max_prompt_length=8" in capsys.readouterr().out
    ids, truncated = made.sampling.encoder(data["prompt"][:2])
    assert truncated == 1 and len(ids[1]) == 8
    assert made.processing_class.decode(ids[1]).endswith("END")
    made.train()
    assert 0 <= made.state.log_history[0]["prompts/truncated_ratio"] <= 1


def test_trls_config_is_converted(tmp_path: Path) -> None:
    args = TRLGRPOConfig(str(tmp_path), bf16=False, num_generations=4, max_completion_length=9, report_to="none")
    made = GRPOTrainer(pronghorn_model(), letters, args, prompts())
    assert isinstance(made.args, GRPOConfig) and made.args.num_generations == 4
    assert made.processing_class is state_of(made.model).tokenizer


def _fails(tmp_path: Path, message: str, **kwargs: Any) -> None:
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, **kwargs)


def test_bad_input_fails_at_construction(tmp_path: Path) -> None:
    _fails(tmp_path, "no 'prompt' column, only \\['promt'\\]; rename 'promt'", data=Dataset.from_dict({"promt": ["a"]}))
    _fails(tmp_path, "train_dataset is a NoneType|train_dataset is a int", data=3)
    stream = IterableDataset.from_generator(lambda: iter([{"prompt": "a"}]))
    _fails(tmp_path, "IterableDataset", data=stream)
    _fails(tmp_path, "has 1 rows, fewer than the 2 prompts", data=prompts(1), per_device_train_batch_size=8)
    _fails(
        tmp_path, "max_seq_length=256 is too small for max_prompt_length=250 \\+ max_completion_length=12 = 262",
        max_prompt_length=250,
    )  # fmt: skip
    _fails(tmp_path, "max_seq_length=256 is too small for a prompt \\+", max_completion_length=256)
    long = Dataset.from_dict({"prompt": ["word " * 400]})
    _fails(tmp_path, "leaves no room for the completion: at most 244 fit", data=long)
    _fails(tmp_path, "was not loaded by Pronghorn", model=llama())
    _fails(tmp_path, "one for each", reward_weights=[1.0, 2.0])
    _fails(tmp_path, "generation_kwargs|unknown field 'max_token'", generation_kwargs={"max_token": 3})
    frozen = pronghorn_model()
    frozen.requires_grad_(False)
    _fails(tmp_path, "no weight of the model trains", model=frozen)


@pytest.mark.parametrize("fault", ["length", "type", "raise"])
def test_a_faulty_reward_stops_before_any_optimizer_step(tmp_path: Path, fault: str) -> None:
    def wrong(completions: list[Any], **kwargs: Any) -> Any:
        if fault == "raise":
            raise KeyError("answer")
        return [1.0] * 3 if fault == "length" else ["good"] * len(completions)

    model = pronghorn_model()
    before = adapter_weights(model)
    made = trainer(tmp_path, model, rewards=wrong)
    with pytest.raises(Exception, match="wrong"):
        made.train()
    assert made.state.global_step == 0
    assert all(torch.equal(w, before[n]) for n, w in adapter_weights(model).items())


def test_a_folder_and_a_peft_config_train_in_four_bits(tmp_path: Path) -> None:
    """``model`` as a path, ``peft_config`` as in TRL, the native engine, NF4 weights: the whole flow in one call."""
    folder = tiny_llama(tmp_path)
    args = config(tmp_path / "run", model_init_kwargs={"max_seq_length": 128, "load_in_4bit": True}, max_steps=2)
    made = GRPOTrainer(str(folder), letters, args, prompts(), peft_config=lora(r=3))
    frozen = {n: p.clone() for n, p in made.model.named_parameters() if "lora_" not in n}
    before = adapter_weights(made.model)
    assert before and all(w.dtype == torch.float32 and 3 in w.shape for w in before.values())
    made.train()
    assert all(torch.equal(p, frozen[n]) for n, p in made.model.named_parameters() if n in frozen)
    assert any(not torch.equal(w, before[n]) for n, w in adapter_weights(made.model).items())
    assert made.state.log_history[0]["sampling/sampling_logp_difference/max"] < 1e-3
    with pytest.raises(ConfigError, match="already has an adapter"):
        GRPOTrainer(made.model, letters, config(tmp_path), prompts(), peft_config=lora())
    with pytest.raises(ConfigError, match="peft_config: use_qalora=True is not supported"):
        as_model(str(folder), None, args, LoraConfig(use_qalora=True, target_modules=["q_proj"]))


def test_full_fine_tuning_trains_and_resumes(tmp_path: Path) -> None:
    init = {"max_seq_length": 128, "load_in_4bit": False, "full_finetuning": True}
    settings: dict[str, Any] = {"model_init_kwargs": init, "save_strategy": "steps", "save_steps": 1}
    folder, weights = tiny_llama(tmp_path), []
    for name in ("whole", "cut"):
        for stop in (2,) if name == "whole" else (1, 2):
            args = config(tmp_path / name, max_steps=stop, lr_scheduler_type="constant", **settings)
            made = GRPOTrainer(str(folder), letters, args, prompts())
            made.train(resume_from_checkpoint=stop == 2 and name == "cut")
        weights.append({n: p.detach().clone() for n, p in made.model.named_parameters()})
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name
