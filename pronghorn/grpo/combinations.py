"""Which settings of the loss go together: what has no effect or makes no sense raises, what TRL warns of is said."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

from ..config.errors import ConfigError
from .losses import LOSSES

if TYPE_CHECKING:
    from .config import GRPOConfig

_CLIPPED = tuple(name for name, kind in LOSSES.items() if kind.clips)

# Settings that act under some losses only.
_ACTS_UNDER: dict[str, tuple[str, ...]] = {
    "delta": _CLIPPED,
    "epsilon": (*_CLIPPED, "cispo"),
    "epsilon_high": (*_CLIPPED, "cispo"),
    "sapo_temperature_pos": ("sapo",),
    "sapo_temperature_neg": ("sapo",),
    "vespo_k_pos": ("vespo",),
    "vespo_lambda_pos": ("vespo",),
    "vespo_k_neg": ("vespo",),
    "vespo_lambda_neg": ("vespo",),
}

# Settings that act where another one is on, or one of several.
_ACTS_WITH: dict[str, tuple[str, ...]] = {
    "ref_model_mixup_alpha": ("sync_ref_model",),
    "ref_model_sync_steps": ("sync_ref_model",),
    "use_bias_correction_kl": ("beta",),
    "entropy_coef_min": ("use_adaptive_entropy",),
    "entropy_coef_max": ("use_adaptive_entropy",),
    "entropy_coef_delta": ("use_adaptive_entropy",),
    "entropy_target": ("use_adaptive_entropy",),
    "vllm_importance_sampling_mode": ("vllm_importance_sampling_correction",),
    "vllm_importance_sampling_clip_min": ("vllm_importance_sampling_correction",),
    "vllm_importance_sampling_clip_max": ("vllm_importance_sampling_correction",),
    "dynamic_sampling_max_rounds": ("dynamic_sampling",),
    "replay_max_age": ("replay_buffer_size",),
    "curriculum_solved_at": ("curriculum",),
    "curriculum_floor": ("curriculum",),
    "outcome_reward": ("dynamic_sampling", "replay_buffer_size", "curriculum"),
    "log_completions_steps": ("log_completions",),
    "num_completions_to_print": ("log_completions",),
    "log_unique_prompts": ("log_completions",),
}

# How a switch that is a number is said to be on.
_ON = {"beta": "a beta above 0", "replay_buffer_size": "a replay_buffer_size of 1 or more"}

# Lowest and highest value that a setting may have, and whether these themselves are allowed; None is never checked.
_RANGES: dict[str, tuple[float, float, bool]] = {
    "beta": (0.0, math.inf, True),
    "num_iterations": (1, math.inf, True),
    "epsilon": (0.0, math.inf, True),
    "epsilon_high": (0.0, math.inf, True),
    "delta": (1.0, math.inf, True),
    "sapo_temperature_pos": (0.0, math.inf, False),
    "sapo_temperature_neg": (0.0, math.inf, False),
    "vespo_k_pos": (0.0, math.inf, True),
    "vespo_lambda_pos": (0.0, math.inf, True),
    "vespo_k_neg": (0.0, math.inf, True),
    "vespo_lambda_neg": (0.0, math.inf, True),
    "top_entropy_quantile": (0.0, 1.0, True),
    "off_policy_mask_threshold": (0.0, math.inf, False),
    "ref_model_mixup_alpha": (0.0, 1.0, True),
    "ref_model_sync_steps": (1, math.inf, True),
    "entropy_coef_delta": (0.0, math.inf, True),
}


def _default(config: GRPOConfig, name: str) -> Any:
    (field,) = [f for f in fields(config) if f.name == name]
    assert field.default is not MISSING
    return field.default


def check_finite(config: GRPOConfig) -> None:
    """Refuse NaN and infinities in every field: a NaN passes each comparison that a range check is made of.

    Raises:
        ConfigError: naming the field, its value and the remedy.
    """
    for field in fields(config):
        value = getattr(config, field.name, None)
        numbers = value if isinstance(value, list | tuple) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            remedy = "0 to clip nothing" if field.name == "max_grad_norm" else "a finite number"
            raise ConfigError(f"GRPOConfig: {field.name}={value!r} is out of range; give {remedy}, or leave it out")


def check_combinations(config: GRPOConfig) -> None:
    """Refuse what cannot mean anything.

    Raises:
        ConfigError: naming the field, its value and the remedy.
    """
    for name, (low, high, inclusive) in _RANGES.items():
        value = getattr(config, name)
        if value is not None and not (low <= value <= high if inclusive else low < value < high):
            raise ConfigError(f"GRPOConfig: {name}={value} is out of range; give {_span(low, high, inclusive)}")
    _check_effects(config)
    _check_reference(config)
    _check_aggregation(config)
    _check_entropy(config)
    _check_correction(config)


def _check_effects(config: GRPOConfig) -> None:
    """A setting that is not at its default is one that acts."""
    for name in dict.fromkeys([*_ACTS_UNDER, *_ACTS_WITH]):
        value, default = getattr(config, name), _default(config, name)
        if value == default:
            continue
        losses, switches = _ACTS_UNDER.get(name, tuple(LOSSES)), _ACTS_WITH.get(name, ())
        if config.loss_type not in losses:
            raise ConfigError(
                f"GRPOConfig: {name}={value!r} has no effect with loss_type={config.loss_type!r}; leave it at "
                f"{default!r}, or choose {' or '.join(map(repr, losses))}"
            )
        if switches and not any(getattr(config, switch) for switch in switches):
            wanted = " or ".join(_ON.get(switch, f"{switch}=True") for switch in switches)
            raise ConfigError(
                f"GRPOConfig: {name}={value!r} has no effect without {wanted}; set that, or leave {name} at {default!r}"
            )
    epsilon, default = config.epsilon, _default(config, "epsilon")
    if config.loss_type == "cispo" and config.epsilon_high is not None and epsilon != default:
        raise ConfigError(
            f"GRPOConfig: epsilon={epsilon} has no effect with loss_type='cispo' and "
            f"epsilon_high={config.epsilon_high}, which is the bound; leave epsilon at {default}"
        )


def _span(low: float, high: float, inclusive: bool) -> str:
    if high == math.inf:
        return f"{low} or more" if inclusive else f"more than {low}"
    return f"a number from {low} to {high}"


def _check_reference(config: GRPOConfig) -> None:
    if config.sync_ref_model and config.beta == 0.0:
        raise ConfigError(
            "GRPOConfig: sync_ref_model=True with beta=0.0, where there is no reference policy; give a beta, or leave "
            "sync_ref_model out"
        )
    if config.sync_ref_model and config.ref_model_mixup_alpha == 0.0:
        raise ConfigError(
            "GRPOConfig: ref_model_mixup_alpha=0.0 never moves the reference policy; give more than 0, or leave "
            "sync_ref_model out"
        )


def _check_aggregation(config: GRPOConfig) -> None:
    if config.multi_objective_aggregation == "normalize_then_sum" and config.scale_rewards != "group":
        raise ConfigError(
            f"GRPOConfig: scale_rewards={config.scale_rewards!r} has no effect with "
            "multi_objective_aggregation='normalize_then_sum', which scales each function by group and their sum by "
            "batch; leave it at 'group'"
        )


def _check_entropy(config: GRPOConfig) -> None:
    low, high = config.entropy_coef_min, config.entropy_coef_max
    if config.use_adaptive_entropy and not low <= config.entropy_coef <= high:
        raise ConfigError(
            f"GRPOConfig: entropy_coef={config.entropy_coef} is not between entropy_coef_min={low} and "
            f"entropy_coef_max={high}, within which use_adaptive_entropy moves it; give one that is"
        )


def _check_correction(config: GRPOConfig) -> None:
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if not config.vllm_importance_sampling_correction:
        return
    if (low is not None and low > 1) or (high is not None and high < 1):
        raise ConfigError(
            f"GRPOConfig: vllm_importance_sampling_clip_min={low} and vllm_importance_sampling_clip_max={high} leave "
            "out 1, the ratio of a sampler that agrees with the trainer; give bounds around 1"
        )


def advice(config: GRPOConfig) -> list[str]:
    """Lines on settings that work and may not be what was meant: TRL's warnings, and where a span is not TRL's."""
    loss, level, lines = config.loss_type, config.importance_sampling_level, []
    if loss == "luspo" and level != "sequence":
        lines.append('loss_type="luspo" by tokens: its paper takes importance_sampling_level="sequence"')
    if loss == "vespo" and level != "token":
        lines.append(
            'loss_type="vespo" weighs sequences itself: importance_sampling_level="sequence" touches its KL term alone'
        )
    if level == "sequence" and loss in ("bnpo", "dr_grpo", "dapo", "cispo"):
        lines.append(
            f'importance_sampling_level="sequence" with loss_type="{loss}" weighs a sequence by its length; GSPO\'s '
            'setup is loss_type="grpo"'
        )
    if loss == "cispo" and config.epsilon_high is None:
        lines.append(
            f'loss_type="cispo" bounds the weight at epsilon_high, which is not given: epsilon={config.epsilon} is '
            "taken (ScaleRL takes epsilon_high=5.0)"
        )
    if config.top_entropy_quantile < 1.0 and config.gradient_accumulation_steps > 1:
        lines.append(
            f"top_entropy_quantile={config.top_entropy_quantile} spans the optimizer step, not each micro-batch as in "
            "TRL: one more forward pass without gradients"
        )
    return lines
