"""Tiny models for the rollout tests, attached as the loader attaches them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM

from pronghorn import models
from pronghorn.models.state import ATTRIBUTE, ModelState
from tests.helpers import tiny_llama


def load(folder, dtype=torch.float32, max_seq_length=256) -> tuple[Any, Any]:
    """The model in ``folder`` with Pronghorn's forward and state, and its tokenizer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
    setattr(model, ATTRIBUTE, ModelState(max_seq_length=max_seq_length, compute_dtype=dtype))
    models.attach(model)
    return model, AutoTokenizer.from_pretrained(folder)


def with_lora(model: Any, seed: int = 0, dropout: float = 0.0) -> Any:
    """``model`` under PEFT with every B nonzero, large enough to change what is said."""
    peft = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return peft


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[Any, Any]:
    return load(tiny_llama(tmp_path_factory.mktemp("llama")))
