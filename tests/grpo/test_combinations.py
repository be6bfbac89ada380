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
        {"vllm_importance_sampling_correction": False, "vllm_importance_sampling_clip_max": 0.5},
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
        ({"top_entropy_quantile": 0.2, "gradient_accumulation_steps": 2}, "spans the optimizer step"),
    ],
    ids=str,
)
def test_lines_that_are_said(tmp_path: Path, settings: dict[str, Any], line: str) -> None:
    made = config(tmp_path, **settings)
    assert sum(line in said for said in made.translations) == 1 and len(made.translations) == 2
    again = dataclasses.replace(made)
    assert again.translations == made.translations and again.loss_type == made.loss_type


def test_every_loss_is_accepted(tmp_path: Path) -> None:
    for name in LOSSES:
        assert config(tmp_path, loss_type=name).loss_type == name
