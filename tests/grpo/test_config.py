"""The blog's config as written, each translation, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest
import torch
from transformers import HfArgumentParser
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig

from pronghorn.config.errors import ConfigError
from pronghorn.grpo.config import GRPOConfig

BLOG: dict[str, Any] = {
    "use_vllm": True, "learning_rate": 5e-6, "adam_beta1": 0.9, "adam_beta2": 0.99, "weight_decay": 0.1,
    "warmup_ratio": 0.1, "lr_scheduler_type": "cosine", "optim": "paged_adamw_8bit", "logging_steps": 1,
    "bf16": True, "fp16": False, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
    "num_generations": 6, "max_prompt_length": 256, "max_completion_length": 200, "max_steps": 250, "save_steps": 250,
    "max_grad_norm": 0.1, "report_to": "none", "output_dir": "outputs",
}  # fmt: skip
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def values(config: GRPOConfig) -> dict[str, Any]:
    """Every field, but for the lines that were printed."""
    names = [f.name for f in dataclasses.fields(config) if f.init and f.name != "translations"]
    return {name: getattr(config, name) for name in names}


@no_gpu
def test_the_blogs_config_is_translated_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    config = GRPOConfig(**BLOG)
    lines = capsys.readouterr().out.splitlines()
    assert [f"Pronghorn: {line}" for line in config.translations] == lines
    for wanted in (
        "use_vllm=True -> rollout_engine",
        "warmup_ratio=0.1 -> warmup_steps=0.1",
        "max_prompt_length=256 -> ",
        "bf16=True -> float32",
        'optim="paged_adamw_8bit" -> optim="adamw_torch"',
        "per_device_train_batch_size=1 -> 6",
        "batch: 1 prompts x 6 completions = 6 completions a generation",
    ):
        assert sum(wanted in line for line in lines) == 1, wanted
    assert len(lines) == 7
    assert (config.warmup_steps, config.warmup_ratio, config.max_prompt_length) == (0.1, None, 256)
    assert (config.per_device_train_batch_size, config.generation_batch_size, config.bf16) == (6, 6, False)
    assert config.get_warmup_steps(250) == 25
    assert config.rollout_engine == "native" and config.vllm_importance_sampling_correction


@pytest.mark.parametrize("accumulation, completions", [(1, 6), (4, 24), (6, 6)])
def test_only_a_batch_that_trl_refuses_counts_prompts(accumulation: int, completions: int) -> None:
    config = GRPOConfig(**{**BLOG, "gradient_accumulation_steps": accumulation})
    assert config.per_device_train_batch_size * accumulation == completions
    assert f"{completions // 6} prompts x 6 completions = {completions} completions" in config.translations[-1]


def test_a_batch_that_trl_accepts_is_left_alone(tmp_path: Any) -> None:
    given = {"output_dir": str(tmp_path), "per_device_train_batch_size": 1, "generation_batch_size": 6,
             "num_generations": 6, "bf16": False}  # fmt: skip
    ours, theirs = GRPOConfig(**given), TRLGRPOConfig(**given)
    for name in ("per_device_train_batch_size", "generation_batch_size", "steps_per_generation"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_defaults_are_trls(tmp_path: Any) -> None:
    ours, theirs = GRPOConfig(str(tmp_path), bf16=False), TRLGRPOConfig(str(tmp_path), bf16=False)
    for f in dataclasses.fields(theirs):
        if f.init and f.name != "logging_dir":
            assert getattr(ours, f.name) == getattr(theirs, f.name), f.name


@pytest.mark.parametrize("again", ["replace", "to_dict", "deepcopy", "pickle"])
def test_an_already_translated_config_changes_nothing(again: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = GRPOConfig(**{**BLOG, "eval_strategy": "steps", "gradient_accumulation_steps": 4})
    capsys.readouterr()
    if again == "to_dict":
        second = GRPOConfig(**{**config.to_dict(), "hub_token": None})
    else:
        second = {
            "replace": dataclasses.replace,
            "deepcopy": copy.deepcopy,
            "pickle": lambda c: pickle.loads(pickle.dumps(c)),
        }[again](config)
    assert values(second) == values(config)
    assert second.translations == config.translations
    assert capsys.readouterr().out == ""


def test_evaluation_batches_hold_whole_groups() -> None:
    config = GRPOConfig(
        **{**BLOG, "eval_strategy": "steps", "per_device_eval_batch_size": 2, "num_generations_eval": 4}
    )
    assert config.per_device_eval_batch_size == 8
    assert any("per_device_eval_batch_size=2 -> 8" in line for line in config.translations)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"learing_rate": 1e-5}, "unknown field 'learing_rate'; did you mean 'learning_rate'"),
        ({"max_promt_length": 1}, "did you mean 'max_prompt_length'"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio=1.5 is out of range; give .* \[0, 1\)"),
        ({"warmup_steps": 10}, "warmup_ratio=0.1 and warmup_steps=10 both set the warm-up"),
        ({"max_prompt_length": 0}, "max_prompt_length=0 is out of range"),
        ({"loss_type": "ppo"}, "loss_type='ppo' is not supported yet; give 'grpo' or 'bnpo' or 'dr_grpo' or 'dapo'"),
        ({"multi_objective_aggregation": "sum"}, "multi_objective_aggregation='sum'"),
        ({"importance_sampling_level": "row"}, "importance_sampling_level='row'"),
        ({"vllm_importance_sampling_mode": "none"}, "vllm_importance_sampling_mode='none'"),
        ({"scale_rewards": "rows"}, "scale_rewards='rows'"),
        ({"max_completion_length": 0}, "max_completion_length=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_bad_fields_raise_with_the_remedy(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GRPOConfig(**{**BLOG, **bad})


def test_contradicting_batch_sizes_are_named() -> None:
    config = GRPOConfig(**BLOG)
    with pytest.raises(ConfigError, match="generation_batch_size=6 contradicts .* = 12"):
        dataclasses.replace(config, per_device_train_batch_size=12)


@pytest.mark.parametrize("given, kept", [(True, "group"), (False, "none"), ("batch", "batch")])
def test_scale_rewards_takes_trls_booleans(given: bool | str, kept: str) -> None:
    assert GRPOConfig(**{**BLOG, "scale_rewards": given}).scale_rewards == kept


def test_the_command_line_parser_reads_it() -> None:
    (config,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", "x", "--warmup_ratio", "0.2", "--max_prompt_length", "64", "--bf16", "false"]
    )
    assert config.warmup_steps == 0.2 and config.max_prompt_length == 64
