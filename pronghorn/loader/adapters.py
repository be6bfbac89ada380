"""``get_peft_model``: PEFT's, on Pronghorn's tree and with Pronghorn's layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import torch
from torch import nn

from ..config.errors import ConfigError
from ..config.lora import LoraDefaults
from ..lora.config import lora_config
from ..lora.masters import keep_masters
from ..models import attach, is_classifier, state_of, unwrap


def get_peft_model(model: nn.Module, **options: Any) -> Any:
    """Add a LoRA adapter, named "default", and leave it alone trainable.

    Args:
        model: what ``from_pretrained`` returned.
        options: fields of :class:`pronghorn.config.lora.LoraDefaults`.

    Returns:
        A ``peft.PeftModelForCausalLM`` in training mode. A, B and ``modules_to_save`` are float32 masters; A is drawn
        from ``random_state`` without moving torch's generator, B is zero. Of a classifier (``num_labels=``) a copy of
        the ``score`` head trains too, and the wrapper is PEFT's for sequence classification.

    Raises:
        ConfigError: an unknown option, target module or start, a rank over ``max_lora_rank``, a model that already
            has adapters or was loaded for full fine-tuning, or a parameter that would train in float16.
    """
    settings = LoraDefaults.of(**options)
    state = state_of(model)
    if hasattr(model, "peft_config"):
        raise ConfigError("get_peft_model: this model already has an adapter; load the base model again")
    if state.full_finetuning:
        raise ConfigError("get_peft_model: the model was loaded with full_finetuning=True; load it without")
    if is_classifier(model):
        if settings.task_type == "CAUSAL_LM":
            settings = replace(settings, task_type="SEQ_CLS")
        if "score" not in (settings.modules_to_save or []):
            settings = replace(settings, modules_to_save=[*(settings.modules_to_save or []), "score"])
    config = lora_config(model, settings, state.max_lora_rank)
    with torch.random.fork_rng(devices=[]):  # A is drawn on the CPU
        torch.manual_seed(settings.random_state)
        try:
            wrapped = peft.get_peft_model(model, config)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"get_peft_model: PEFT refuses these settings: {error}") from error
    keep_masters(wrapped)
    state.use_gradient_checkpointing = settings.use_gradient_checkpointing
    attach(unwrap(wrapped))  # sets the checkpointing plan anew
    return wrapped.train()
