"""Settings of older configurations, and of machines without a GPU, in today's terms: one printed line for each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..config.errors import ConfigError
from .vllm_settings import vllm_lines

if TYPE_CHECKING:
    from .config import GRPOConfig

# bitsandbytes' AdamW variants: they page to and quantize in CUDA memory.
_CUDA_ADAMW = ("paged_adamw_8bit", "paged_adamw_32bit", "paged_adamw", "adamw_8bit", "adamw_bnb_8bit")


def plain(value: Any) -> Any:
    """The value behind an enum member, or ``value`` itself."""
    return getattr(value, "value", value)


def before_checks(config: GRPOConfig) -> list[str]:
    """Rewrite the fields that TRL or transformers would refuse; returns one line for each change.

    A value that is already in today's terms is left alone, so translating twice changes nothing.
    """
    steps = (
        _engine,
        _warmup,
        _prompt_length,
        _precision,
        _optimizer,
        _derived_batch,
        _train_batch,
        _eval_batch,
        _vespo,
        _sigterm,
    )
    return [*(line for step in steps if (line := step(config))), *vllm_lines(config)]


def _engine(config: GRPOConfig) -> str | None:
    if config.use_vllm and config.rollout_engine == "native":
        return 'use_vllm=True -> rollout_engine="native": Pronghorn samples (rollout_engine="vllm" asks for vLLM)'
    return None


def _warmup(config: GRPOConfig) -> str | None:
    ratio = config.warmup_ratio
    if ratio is None:
        return None
    if not 0 <= ratio < 1:
        raise ConfigError(f"GRPOConfig: warmup_ratio={ratio} is out of range; give a fraction of the steps in [0, 1)")
    if config.warmup_steps:
        raise ConfigError(
            f"GRPOConfig: warmup_ratio={ratio} and warmup_steps={config.warmup_steps} both set the warm-up; give one"
        )
    config.warmup_ratio = None
    config.warmup_steps = ratio
    return f"warmup_ratio={ratio} -> warmup_steps={ratio} (below 1 it is a ratio of all steps)"


def _prompt_length(config: GRPOConfig) -> str | None:
    length = config.max_prompt_length
    if length is None:
        return None
    if length < 1:
        raise ConfigError(
            f"GRPOConfig: max_prompt_length={length} is out of range; give 1 or more, or None for no limit"
        )
    return f"max_prompt_length={length} -> longer prompts keep their last {length} tokens (truncated from the left)"


def _without_gpu(config: GRPOConfig) -> bool:
    return bool(config.use_cpu) or not torch.cuda.is_available()


def _precision(config: GRPOConfig) -> str | None:
    if not _without_gpu(config):
        return None
    given = [name for name in ("bf16", "fp16") if getattr(config, name)]
    config.bf16 = config.fp16 = False
    return f"{given[0]}=True -> float32 (training runs without a GPU)" if given else None


def _optimizer(config: GRPOConfig) -> str | None:
    name = plain(config.optim)
    if name not in _CUDA_ADAMW or not _without_gpu(config):
        return None
    config.optim = "adamw_torch"
    return f'optim="{name}" -> optim="adamw_torch" (bitsandbytes\' optimizer needs a GPU)'


def _derived_batch(config: GRPOConfig) -> None:
    """Drop a ``generation_batch_size`` that was derived from ``steps_per_generation``: TRL takes only one of them."""
    if config.generation_batch_size is None or config.steps_per_generation is None:
        return
    derived = config.per_device_train_batch_size * config.steps_per_generation
    if config.generation_batch_size != derived:
        raise ConfigError(
            f"GRPOConfig: generation_batch_size={config.generation_batch_size} contradicts "
            f"per_device_train_batch_size x steps_per_generation = {derived}; "
            "give one of generation_batch_size and steps_per_generation"
        )
    config.generation_batch_size = None


def _train_batch(config: GRPOConfig) -> str | None:
    group = config.num_generations or 0
    if config.generation_batch_size is not None or group < 2:
        return None
    given = config.per_device_train_batch_size
    completions = given * (config.steps_per_generation or config.gradient_accumulation_steps)
    if completions % group == 0:
        return None
    config.per_device_train_batch_size = given * group
    return (
        f"per_device_train_batch_size={given} -> {given * group}: {completions} completions are no whole group of "
        f"num_generations={group}, so the batch counts prompts ({given} prompts x {group} completions)"
    )


def _eval_batch(config: GRPOConfig) -> str | None:
    group = config.num_generations_eval or config.num_generations or 0
    given = config.per_device_eval_batch_size
    if group < 2 or plain(config.eval_strategy) == "no" or given % group == 0:
        return None
    config.per_device_eval_batch_size = given * group
    return (
        f"per_device_eval_batch_size={given} -> {given * group}: the batch counts prompts "
        f"({given} prompts x {group} completions)"
    )


def _vespo(config: GRPOConfig) -> str | None:
    mode = config.vllm_importance_sampling_mode
    if config.loss_type != "vespo" or not config.vllm_importance_sampling_correction or not mode.startswith("sequence"):
        return None
    if config.use_vllm:  # what TRL refuses too
        raise ConfigError(
            f'GRPOConfig: vllm_importance_sampling_mode={mode!r} with loss_type="vespo", which weighs sequences '
            'itself; give "token_truncate" or "token_mask"'
        )
    config.vllm_importance_sampling_mode = "token_" + mode.removeprefix("sequence_")
    return (
        f'vllm_importance_sampling_mode="{mode}" -> "{config.vllm_importance_sampling_mode}": '
        'loss_type="vespo" weighs sequences itself, with the sampler\'s correction in that weight'
    )


def _sigterm(config: GRPOConfig) -> str | None:
    if not config.enable_jit_checkpoint:
        return None
    config.enable_jit_checkpoint = False
    return "enable_jit_checkpoint=True -> Pronghorn's own: SIGTERM always saves a whole checkpoint and exits"


def batch_line(config: GRPOConfig) -> str:
    """What one generation holds and what one optimizer step takes, in prompts x completions."""
    group, generated = config.num_generations, config.generation_batch_size
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return (
        f"batch: {generated // group} prompts x {group} completions = {generated} completions a generation, "
        f"{step} completions an optimizer step"
    )
