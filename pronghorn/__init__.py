"""Pronghorn: fine-tune language models and train them by GRPO in one process, on one copy of the weights.

Public names load on first use, so that ``import pronghorn`` is quick and imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "AccuracyCallback": "pronghorn.grpo.accuracy_callback",
    "AccuracyEval": "pronghorn.grpo.evaluation",
    "FastLanguageModel": "pronghorn.api",
    "PatchFastRL": "pronghorn.api",
    "plan": "pronghorn.api",
    "is_bfloat16_supported": "pronghorn.env",
    "SamplingParams": "pronghorn.config.sampling",
    "ConfigError": "pronghorn.config.errors",
    "GRPOConfig": "pronghorn.grpo.config",
    "GRPOTrainer": "pronghorn.grpo.trainer",
    "train_on_responses_only": "pronghorn.sft.responses",
}

_MODULES = ("optim",)

__all__ = ["AccuracyCallback", "AccuracyEval", "ConfigError", "FastLanguageModel", "GRPOConfig", "GRPOTrainer",
           "PatchFastRL", "SamplingParams", "is_bfloat16_supported", "optim", "plan",
           "train_on_responses_only"]  # fmt: skip

if TYPE_CHECKING:
    from . import optim
    from .api import FastLanguageModel, PatchFastRL, plan
    from .config.errors import ConfigError
    from .config.sampling import SamplingParams
    from .env import is_bfloat16_supported
    from .grpo.accuracy_callback import AccuracyCallback
    from .grpo.config import GRPOConfig
    from .grpo.evaluation import AccuracyEval
    from .grpo.trainer import GRPOTrainer
    from .sft.responses import train_on_responses_only


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"pronghorn.{name}")  # the import binds the name
    if name not in _PUBLIC:
        raise AttributeError(f"module 'pronghorn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC, *_MODULES})
