"""TRL's settings of vLLM: those of sampling elsewhere raise, those of a vLLM beside the trainer become a line."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from ..config.errors import ConfigError

if TYPE_CHECKING:
    from .config import GRPOConfig

# They say on which machine or GPUs completions are made: a script that sets one counts on it.
_ELSEWHERE = {
    "vllm_mode": "completions are sampled in the trainer's process",
    "vllm_server_base_url": "no server is asked for completions",
    "vllm_server_host": "no server is asked for completions",
    "vllm_server_port": "no server is asked for completions",
    "vllm_server_timeout": "no server is asked for completions",
    "vllm_group_port": "no weights are sent to a server",
    "vllm_tensor_parallel_size": "one GPU samples and trains",
}

# Memory and speed of a vLLM beside the trainer. Scripts for `vllm_mode="colocate"` set them, and mean the same without.
_OTHERWISE = {
    "vllm_gpu_memory_utilization": "gpu_memory_utilization of FastLanguageModel.from_pretrained: the sampler's weights "
    "are the trainer's",
    "vllm_max_model_length": "max_seq_length of FastLanguageModel.from_pretrained bounds prompt and completion",
    "vllm_model_impl": "the model that trains is the one that samples",
}


def vllm_lines(config: GRPOConfig) -> list[str]:
    """One line for each of vLLM's settings that says how fast or how large, not where; sleep mode is served.

    Raises:
        ConfigError: a setting says that completions are made elsewhere than here.
    """
    defaults = {f.name: f.default for f in fields(config)}
    for name, instead in _ELSEWHERE.items():
        value = getattr(config, name)
        if value != defaults[name]:
            raise ConfigError(f"GRPOConfig: {name}={value!r} has no effect: {instead}; leave it at {defaults[name]!r}")
    lines = [
        f"{name}={getattr(config, name)!r} -> {instead}"
        for name, instead in _OTHERWISE.items()
        if getattr(config, name) != defaults[name]
    ]
    if config.vllm_enable_sleep_mode:
        config.vllm_enable_sleep_mode = False
        if config.rollout_engine == "native":
            config.rollout_keep_share = 0.0
            lines.append("vllm_enable_sleep_mode=True -> rollout_keep_share=0.0 (nothing is kept between rollouts)")
        else:
            lines.append(f"vllm_enable_sleep_mode=True -> rollout_engine={config.rollout_engine!r} always sleeps")
    return lines
