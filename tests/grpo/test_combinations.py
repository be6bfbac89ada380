"""Settings of the loss: what raises, with the remedy, and what is said in a line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig

from pronghorn.config.errors import ConfigError
from pronghorn.grpo.config import GRPOConfig
from pronghorn.grpo.losses import LOSSES

ADAPTIVE: dict[str, Any] = {"use_adaptive_entropy": True}
OFF: dict[str, Any] = {"vllm_importance_sampling_correction": False}
SYNC: dict[str, Any] = {"sync_ref_model": True, "beta": 0.04}


def config(folder: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(str(folder), bf16=False, report_to="none", **settings)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"loss_type": "sapo", "delta": 2.0}, "delta=2.0 has no effect with loss_type='sapo'; leave it at None"),
        ({"loss_type": "cispo", "delta": 2.0, "epsilon_high": 5.0}, "delta=2.0 has no effect"),
        ({"loss_type": "vespo", "epsilon_high": 0.3}, "epsilon_high=0.3 has no effect"),
        ({"sapo_temperature_neg": 2.0}, "sapo_temperature_neg=2.0 has no effect with loss_type='dapo'.*'sapo'"),
        ({"loss_type": "sapo", "vespo_k_pos": 1.0}, "vespo_k_pos=1.0 has no effect"),
        ({"ref_model_sync_steps": 8}, "ref_model_sync_steps=8 has no effect without sync_ref_model=True"),
        ({"entropy_target": 1.0}, "entropy_target=1.0 has no effect without use_adaptive_entropy=True"),
        ({"sync_ref_model": True}, "sync_ref_model=True with beta=0.0"),
        ({**SYNC, "ref_model_mixup_alpha": 0.0}, "ref_model_mixup_alpha=0.0 never moves"),
        ({**SYNC, "ref_model_mixup_alpha": 1.1}, "ref_model_mixup_alpha=1.1 is out of range; give a number from 0.0"),
        ({**SYNC, "ref_model_sync_steps": 0}, "ref_model_sync_steps=0 is out of range; give 1 or more"),
        ({**ADAPTIVE, "entropy_coef": 2.0}, "entropy_coef=2.0 is not between entropy_coef_min=0.0 and"),
        ({**ADAPTIVE, "entropy_coef_min": 0.5, "entropy_coef_max": 0.1}, "entropy_coef=0.0 is not between"),
        ({**ADAPTIVE, "entropy_coef_delta": -0.1}, "entropy_coef_delta=-0.1 is out of range"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "none"}, "scale_rewards='none' has no"),
        ({"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": False}, "scale_rewards='none' has no"),
        ({"top_entropy_quantile": 1.2}, "top_entropy_quantile=1.2 is out of range; give a number from 0.0 to 1.0"),
        ({"top_entropy_quantile": -0.1}, "top_entropy_quantile=-0.1"),
        ({"off_policy_mask_threshold": 0.0}, "off_policy_mask_threshold=0.0 is out of range; give more than 0.0"),
        ({"delta": 0.9}, "delta=0.9 is out of range; give 1.0 or more"),
        ({"beta": -0.1}, "beta=-0.1 is out of range"),
        ({"epsilon": -0.2}, "epsilon=-0.2 is out of range"),
        ({"num_iterations": 0}, "num_iterations=0 is out of range"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, "sapo_temperature_pos=0.0 is out of range; give more"),
        ({"loss_type": "vespo", "vespo_lambda_neg": -1.0}, "vespo_lambda_neg=-1.0 is out of range"),
        ({"loss_type": "sapo", "epsilon": 0.1}, "epsilon=0.1 has no effect with loss_type='sapo'; leave it at 0.2, or"),
        ({"loss_type": "vespo", "epsilon": 0.1}, "epsilon=0.1 has no effect with loss_type='vespo'"),
        (
            {"loss_type": "cispo", "epsilon": 0.1, "epsilon_high": 5.0},
            "epsilon=0.1 has no effect with .*epsilon_high=5",
        ),
        ({"use_bias_correction_kl": False}, "use_bias_correction_kl=False has no effect without a beta above 0; set"),
        ({**OFF, "vllm_importance_sampling_mode": "token_mask"}, "mode='token_mask' has no effect without vllm_impor"),
        ({**OFF, "vllm_importance_sampling_clip_max": 0.5}, "clip_max=0.5 has no effect without vllm_importance_sampl"),
        ({**OFF, "vllm_importance_sampling_clip_min": 0.5}, "clip_min=0.5 has no effect without .*leave .* at None"),
        ({"dynamic_sampling_max_rounds": 3}, "max_rounds=3 has no effect without dynamic_sampling=True; .* at 10"),
        ({"replay_max_age": 2}, "replay_max_age=2 has no effect without a replay_buffer_size of 1 or more"),
        ({"curriculum_solved_at": 2.0}, "curriculum_solved_at=2.0 has no effect without curriculum=True"),
        ({"curriculum_floor": 0.5}, "curriculum_floor=0.5 has no effect without curriculum=True"),
        (
            {"outcome_reward": "right"},
            "='right' has no effect without dynamic_sampling=True or a replay_buffer_size .* or",
        ),
        ({"log_completions_steps": 3}, "log_completions_steps=3 has no effect without log_completions=True"),
        ({"num_completions_to_print": 3}, "num_completions_to_print=3 has no effect without log_completions=True"),
        ({"log_unique_prompts": True}, "log_unique_prompts=True has no effect without log_completions=True"),
        ({"rollout_engine": "vllm", "rollout_keep_share": 0.3}, "rollout_keep_share=0.3 with rollout_engine='vllm'"),
        (
            {"vllm_mode": "server"},
            "vllm_mode='server' has no effect: completions are sampled .* leave it at 'colocate'",
        ),
        ({"use_vllm": True, "vllm_server_host": "10.0.0.1"}, "vllm_server_host='10.0.0.1' has no effect: no server"),
        ({"vllm_server_base_url": "http://x"}, "vllm_server_base_url='http://x' has no effect"),
        ({"vllm_server_port": 80}, "vllm_server_port=80 has no effect"),
        ({"vllm_server_timeout": 9.0}, "vllm_server_timeout=9.0 has no effect"),
        ({"vllm_group_port": 80}, "vllm_group_port=80 has no effect"),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size=2 has no effect: one GPU"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of=8 is not supported"),
        ({"ds3_gather_for_generation": False}, "ds3_gather_for_generation=False"),
        ({"log_multimodal": False}, "log_multimodal=False"),
        ({"transformers_continuous_batching_config": {"a": 1}}, "transformers_continuous_batching_config="),
        ({"vllm_importance_sampling_clip_max": 0.8}, "clip_max=0.8 leave out 1"),
        ({"vllm_importance_sampling_clip_min": 1.5}, "clip_min=1.5 and .* leave out 1"),
        ({"loss_type": "vespo", "use_vllm": True}, "mode='sequence_mask' with loss_type=\"vespo\".*token_truncate"),
    ],
    ids=str,
)
def test_combinations_that_mean_nothing_raise(tmp_path: Path, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(tmp_path, **bad)


@pytest.mark.parametrize(
    "bad",
    [
        {"vllm_importance_sampling_clip_min": 2.0, "vllm_importance_sampling_clip_max": 1.0},
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None},
        {"num_generations": 1},
    ],
    ids=str,
)
def test_what_trls_config_refuses_is_refused(tmp_path: Path, bad: dict[str, Any]) -> None:
    for kind in (GRPOConfig, TRLGRPOConfig):
        with pytest.raises(ValueError):
            kind(str(tmp_path), bf16=False, report_to="none", **bad)


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0},
        {"loss_type": "vespo", "vespo_k_pos": 1.5, "vllm_importance_sampling_mode": "token_mask"},
        {"loss_type": "cispo", "epsilon_high": 5.0},
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "delta": 1.5},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {**SYNC, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 16},
        {**ADAPTIVE, "entropy_target": 3.0, "entropy_coef": 0.1},
        {"entropy_coef": -0.01},
        {"top_entropy_quantile": 0.0, "off_policy_mask_threshold": 0.5},
        OFF,
        {"loss_type": "sapo", **OFF},
        {"beta": 0.04, "use_bias_correction_kl": False},
        {"outcome_reward": "right", "replay_buffer_size": 4, "replay_max_age": 2},
        {"outcome_reward": "right", "curriculum": True, "curriculum_solved_at": 2.0, "curriculum_floor": 0.5},
        {"outcome_reward": "right", "dynamic_sampling": True, "dynamic_sampling_max_rounds": 2},
        {
            "log_completions": True,
            "log_completions_steps": 5,
            "num_completions_to_print": 2,
            "log_unique_prompts": True,
        },
    ],
    ids=str,
)
def test_papers_settings_are_taken_without_a_word(tmp_path: Path, settings: dict[str, Any]) -> None:
    assert len(config(tmp_path, **settings).translations) == 1  # the batch's line


@pytest.mark.parametrize(
    "settings, line",
    [
        ({"loss_type": "luspo"}, 'its paper takes importance_sampling_level="sequence"'),
        ({"importance_sampling_level": "sequence"}, 'with loss_type="dapo" weighs a sequence by its length'),
        ({"loss_type": "cispo"}, "epsilon=0.2 is taken"),
        ({"loss_type": "vespo"}, 'vllm_importance_sampling_mode="sequence_mask" -> "token_mask"'),
        (
            {"loss_type": "vespo", "vllm_importance_sampling_mode": "sequence_truncate"},
            'vllm_importance_sampling_mode="sequence_truncate" -> "token_truncate"',
        ),
        (
            {
                "loss_type": "vespo",
                "importance_sampling_level": "sequence",
                "vllm_importance_sampling_correction": False,
            },
            "touches its KL term alone",
        ),
        ({"loss_type": "cispo", "epsilon": 0.1}, "epsilon=0.1 is taken"),
        ({"top_entropy_quantile": 0.2, "gradient_accumulation_steps": 2}, "spans the optimizer step"),
        ({"vllm_gpu_memory_utilization": 0.5}, "vllm_gpu_memory_utilization=0.5 -> gpu_memory_utilization of"),
        ({"vllm_max_model_length": 512}, "vllm_max_model_length=512 -> max_seq_length of"),
        ({"vllm_model_impl": "transformers"}, "vllm_model_impl='transformers' -> the model that trains"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode=True -> rollout_keep_share=0.0"),
    ],
    ids=str,
)
def test_lines_that_are_said(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    made = config(tmp_path, **settings)
    assert sum(line in said for said in made.translations) == 1 and len(made.translations) == 2
    again = dataclasses.replace(made)
    assert again.translations == made.translations and again.loss_type == made.loss_type


def test_trls_settings_of_a_colocated_vllm_go_on_working(tmp_path: Path) -> None:
    """A script for vLLM on the trainer's GPU, as TRL's pages write it: one line for each setting, none raises."""
    colocated = {
        "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.5, "vllm_enable_sleep_mode": True,
        "vllm_tensor_parallel_size": 1, "vllm_max_model_length": 512,
    }  # fmt: skip
    made = config(tmp_path, **colocated)
    assert len(made.translations) == 5 and made.rollout_keep_share == 0.0
    assert config(tmp_path, rollout_engine="vllm", vllm_enable_sleep_mode=True).rollout_keep_share == 0.1
    assert dataclasses.replace(made).translations == made.translations


NUMBERS = [
    f.name
    for f in dataclasses.fields(GRPOConfig)
    if f.init and ("float" in str(f.type) or isinstance(f.default, float)) and "dict" not in str(f.type)
]


def test_the_fields_that_hold_numbers_are_found() -> None:
    assert {"reward_weights", "entropy_coef", "learning_rate", "rollout_keep_share", "reward_timeout"} <= set(NUMBERS)
    assert len(NUMBERS) > 45


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", NUMBERS)
def test_no_field_takes_what_is_no_finite_number(tmp_path: Path, name: str, value: float) -> None:
    """`reward_weights=[nan]` would train on rewards of 0, `entropy_coef=nan` on a loss that is none."""
    for given in [value, -value, [value]] if name != "reward_weights" else [[value], [1.0, -value]]:
        with pytest.raises(
            ConfigError, match=f"GRPOConfig: {name}=.*(nan|inf).* is out of range; give .* leave it out"
        ):
            config(tmp_path, **{name: given})


def test_every_loss_is_accepted(tmp_path: Path) -> None:
    for name in LOSSES:
        assert config(tmp_path, loss_type=name).loss_type == name
