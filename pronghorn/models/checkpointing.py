"""Gradient checkpointing, owned by Pronghorn: which layers are recomputed in backward.

transformers' own flag stays off. On some of its versions that flag wraps an instance's ``forward``, on others not, so
a block could be recomputed twice or not at all; here one function decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config.errors import ConfigError
from ..config.lora import CHECKPOINTING


def resolve(choice: bool | str, device: torch.device) -> bool:
    """Whether ``use_gradient_checkpointing=choice`` recomputes layers: "auto" does on a GPU, not on the CPU."""
    if choice not in CHECKPOINTING:
        raise ConfigError(
            f"use_gradient_checkpointing={choice!r} is unknown; give one of {', '.join(map(repr, CHECKPOINTING))}"
        )
    if choice == "auto":
        return device.type != "cpu"
    return choice not in (False, "off")


def should_recompute(layer: nn.Module) -> bool:
    """Whether this layer's forward, now, keeps its inputs only."""
    return bool(getattr(layer, "pronghorn_recompute", False)) and layer.training and torch.is_grad_enabled()


def run(layer: nn.Module, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """``function(*args, **kwargs)``, recomputed in backward where the plan says so for ``layer``."""
    if not should_recompute(layer):
        return function(*args, **kwargs)
    result: torch.Tensor = checkpoint(function, *args, use_reentrant=False, **kwargs)
    return result


def set_recompute(layers: Iterable[nn.Module], on: bool) -> None:
    """Set the plan of every layer: recompute it in backward, or keep what it computed."""
    for layer in layers:
        layer.pronghorn_recompute = on  # type: ignore[assignment]
