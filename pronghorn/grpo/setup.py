"""Checks and preparation before a trainer exists, so that bad input fails before long work."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig

from ..config.errors import ConfigError
from ..config.load import LoadConfig
from ..config.lora import LoraDefaults
from ..lora.active import adapter_names
from ..models.state import state_of
from ..rewards.reward_model import with_reward_models
from ..rewards.runner import RewardRunner
from ..rollout import base as rollout
from .config import GRPOConfig
from .data import PromptEncoder
from .drawing import Drawer, SingleTurn
from .rollout_func import RolloutFuncDrawer
from .sampling_loop import SamplingLoop
from .tool_calls import Tools
from .tool_loop import ToolLoop
from .translate import plain


def as_config(args: Any, model: Any) -> GRPOConfig:
    """The trainer's config from ours, TRL's, or None (defaults, written to a folder named after the model).

    Raises:
        ConfigError: another type, or TRL settings that this trainer does not act on.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "model")
        return GRPOConfig(output_dir=f"{name.rstrip('/').split('/')[-1]}-GRPO")
    if isinstance(args, GRPOConfig):
        return args
    if isinstance(args, TRLGRPOConfig):
        return GRPOConfig(**{f.name: getattr(args, f.name) for f in fields(args) if f.init})
    raise ConfigError(f"args is a {type(args).__name__}; pass a GRPOConfig")


def as_model(model: Any, tokenizer: Any, args: GRPOConfig, peft_config: Any) -> tuple[Any, Any]:
    """``(model, tokenizer)``: loaded where ``model`` is a name, wrapped where a ``peft_config`` is given.

    Raises:
        ConfigError: the model was not loaded by Pronghorn, already has an adapter beside ``peft_config``, or is on
            another device than training.
    """
    if isinstance(model, str):
        from ..loader import from_pretrained

        settings = {"trust_remote_code": bool(args.trust_remote_code), **(args.model_init_kwargs or {})}
        model, loaded = from_pretrained(LoadConfig.of(model_name=model, **settings))
        tokenizer = tokenizer or loaded
    elif args.model_init_kwargs:
        raise ConfigError("GRPOConfig: model_init_kwargs has no effect on a model that is already loaded; leave it out")
    state = state_of(model)
    if peft_config is not None:
        from ..loader import get_peft_model

        model = get_peft_model(model, **_lora_settings(peft_config, model))
    tokenizer = tokenizer or state.tokenizer
    if tokenizer is None:
        raise ConfigError("processing_class=None and the model carries no tokenizer; pass processing_class=tokenizer")
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "no weight of the model trains; add LoRA with FastLanguageModel.get_peft_model, or load it with "
            "full_finetuning=True"
        )
    device = next(model.parameters()).device
    if device.type != args.device.type or (device.index or 0) != (args.device.index or 0):
        raise ConfigError(
            f"the model is on {device} but training would run on {args.device}; "
            f"{'pass use_cpu=True' if device.type == 'cpu' else 'choose the GPU by CUDA_VISIBLE_DEVICES'}"
        )
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    args._n_gpu = min(args.n_gpu, 1)  # transformers would spread the model over every GPU that it sees
    return model, tokenizer


def refuse_arguments(environment_factory: Any, quantization_config: Any) -> None:
    """Arguments of TRL's trainer that this one does not serve.

    Raises:
        ConfigError: one of them is given; with what serves in its place.
    """
    if environment_factory is not None:
        raise ConfigError(
            f"environment_factory={environment_factory!r} is not served; pass the environment's methods as tools=, or "
            "run its turns in a rollout_func="
        )
    if quantization_config is not None:
        raise ConfigError(
            "quantization_config is not served; load the model with FastLanguageModel.from_pretrained("
            "load_in_4bit=...), or give args.model_init_kwargs={'load_in_4bit': ...}"
        )


def reward_runner(reward_funcs: Any, processing_classes: Any, args: GRPOConfig) -> RewardRunner:
    """The reward functions, with reward models made functions, on the training device and in its precision."""
    mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    functions = with_reward_models(
        reward_funcs,
        processing_classes,
        device=args.device,
        autocast=mixed,
        template_kwargs=_template_kwargs(args),
        trust_remote_code=bool(args.trust_remote_code),
    )
    return RewardRunner(
        functions,
        weights=args.reward_weights,
        workers=args.reward_workers,
        timeout=args.reward_timeout,
        on_error=plain(args.reward_on_error),
    )


def _template_kwargs(args: GRPOConfig) -> dict[str, Any]:
    kwargs = args.chat_template_kwargs or {}
    if not isinstance(kwargs, dict):
        raise ConfigError(f"GRPOConfig: chat_template_kwargs={kwargs!r} is a {type(kwargs).__name__}; give a dict")
    return kwargs


def _lora_settings(config: Any, model: nn.Module) -> dict[str, Any]:
    if adapter_names(model):
        raise ConfigError("peft_config is given, but the model already has an adapter; pass one or the other")
    if not isinstance(config, LoraConfig):
        raise ConfigError(f"peft_config is a {type(config).__name__}; pass a peft.LoraConfig")
    known = {f.name for f in fields(LoraDefaults)}
    plain, settings = LoraConfig().to_dict(), config.to_dict()
    ignored = {"peft_type", "base_model_name_or_path", "inference_mode", "peft_version", "task_type", "auto_mapping"}
    for name, value in settings.items():
        if name not in known | ignored and value != plain[name]:
            raise ConfigError(f"peft_config: {name}={value!r} is not supported; leave it at {plain[name]!r}")
    chosen = {name: settings[name] for name in known & set(settings) if settings[name] is not None}
    if chosen.get("loftq_config") == {}:
        del chosen["loftq_config"]
    return {**chosen, "task_type": "CAUSAL_LM"}


def prompt_encoder(args: GRPOConfig, model: nn.Module, tokenizer: Any, tools: Tools | None = None) -> PromptEncoder:
    """The encoder of prompts, once it is sure that prompt and completion fit the model's length."""
    limit, completion, prompt = state_of(model).max_seq_length, args.max_completion_length or 0, args.max_prompt_length
    if completion + (prompt or 1) > limit:
        wanted = f"max_prompt_length={prompt} + " if prompt else "a prompt + "
        raise ConfigError(
            f"max_seq_length={limit} is too small for {wanted}max_completion_length={completion}"
            f"{f' = {prompt + completion}' if prompt else ''}; load with a larger max_seq_length, or lower them"
        )
    kwargs = _template_kwargs(args)
    if tools is not None:
        kwargs = {**kwargs, "tools": tools.schemas}
    return PromptEncoder(tokenizer, prompt, limit - completion, kwargs)


def choose_drawer(loop: SamplingLoop, tools: Tools | None, rollout_func: Any, trainer: Any) -> Drawer:
    """What makes the completions: one turn of the engine, a loop of turns with tools, or the user's function.

    Raises:
        ConfigError: tools beside a ``rollout_func``, a chat template that is not fit for tools, or a limit on calls
            without anything that could be called.
    """
    most = loop.args.max_tool_calling_iterations
    if most is not None and tools is None and rollout_func is None:
        raise ConfigError(
            f"GRPOConfig: max_tool_calling_iterations={most} has no effect without tools; pass tools=, or leave it out"
        )
    if rollout_func is not None:
        if tools is not None:
            raise ConfigError("tools and rollout_func are both given; rollout_func runs its own turns: give one")
        return RolloutFuncDrawer(loop, rollout_func, trainer)
    if tools is not None:
        return ToolLoop(loop, tools, state_of(loop.model).max_seq_length)
    return SingleTurn(loop)


def check_overlap(loop: SamplingLoop) -> None:
    """Refuse ``rollout_overlap`` where generations cannot be drawn beside training.

    Raises:
        ConfigError: completions that are not made in one turn, or a model of which more trains than LoRA's matrices.
    """
    if not loop.args.rollout_overlap:
        return
    if not isinstance(loop.drawer, SingleTurn):
        raise ConfigError(
            "GRPOConfig: rollout_overlap=True with tools or a rollout_func, which would be called beside training; set "
            "rollout_overlap=False"
        )
    reason = rollout.why_no_overlap(loop.model)
    if reason:
        raise ConfigError(
            f"GRPOConfig: rollout_overlap=True cannot serve {reason}: generations drawn beside training read a copy of "
            "LoRA's A and B of the layers' projections, and nothing else may train or be called; set "
            "rollout_overlap=False"
        )


def has_dropout(model: nn.Module) -> bool:
    """Whether a forward in training mode draws dropout."""
    return any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())


def check_precision(model: nn.Module, args: GRPOConfig) -> None:
    """fp16 scales the loss, which needs float32 gradients; LoRA's masters have them, 16-bit trained weights do not."""
    if args.fp16 and any(p.requires_grad and p.dtype == torch.float16 for p in model.parameters()):
        raise ConfigError("GRPOConfig: fp16=True cannot train float16 weights; load the model with dtype=torch.float32")
