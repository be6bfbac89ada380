"""Gradient checkpointing, owned by Pronghorn: what each layer keeps for its backward pass.

transformers' own flag stays off. On some of its versions that flag wraps an instance's ``forward``, on others not, so
a block could be recomputed twice or not at all; here one plan decides, for every layer (:mod:`pronghorn.models.plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..config.errors import ConfigError
from ..config.lora import CHECKPOINTING
from .keep import Keep
from .plan.plan import LayerPlan, TrainingPlan
from .planner import Planner, on_cpu
from .tree import layers, unwrap

PLANNER = "pronghorn_planner"
"""Attribute of the transformers model: the :class:`Planner` of its training steps."""

LAYER_PLAN, STEP_PLAN = "pronghorn_plan", "pronghorn_step_plan"
"""Attributes of a decoder layer: its own :class:`LayerPlan`, and the :class:`TrainingPlan` that it is part of."""

_WHOLE = LayerPlan(Keep.ALL)


def mode_of(choice: bool | str) -> str:
    """``use_gradient_checkpointing=choice`` as "auto", "memory" or "off".

    Raises:
        ConfigError: an unknown choice.
    """
    if choice not in CHECKPOINTING:
        raise ConfigError(
            f"use_gradient_checkpointing={choice!r} is unknown; give one of {', '.join(map(repr, CHECKPOINTING))}"
        )
    if isinstance(choice, str):
        return "memory" if choice == "unsloth" else choice
    return "memory" if choice else "off"


def set_mode(model: nn.Module, choice: bool | str) -> None:
    """Plan ``model``'s steps anew by this ``use_gradient_checkpointing``.

    Until the first training step is planned, and for walks that are not packed, layers keep their inputs, or with "off"
    (on the CPU: unless "memory") everything. Where the choice is the one that holds already, its plans stay.
    """
    mode, base = mode_of(choice), unwrap(model)
    planner: Planner | None = base.__dict__.get(PLANNER)
    if planner is not None and planner.mode == mode:
        return
    base.__dict__[PLANNER] = Planner(mode)
    cautious = LayerPlan(Keep.ALL if mode == "off" else Keep.INPUT)
    set_plans(layers(base), on_cpu(mode) if base.device.type == "cpu" else cautious)


def ensure_plan(model: nn.Module, row_lengths: Sequence[int]) -> TrainingPlan | None:
    """Plan the training step over rows of these lengths, and give every layer its part.

    To be called before a training step's first activation. Without gradients, in evaluation mode, or on a model that
    carries no planner, nothing happens and None comes back.
    """
    base = unwrap(model)
    planner: Planner | None = base.__dict__.get(PLANNER)
    if planner is None or not base.training or not torch.is_grad_enabled():
        return None
    before = planner.current
    plan = planner.plan(model, row_lengths)
    if plan is not before:
        for layer, part in zip(layers(base), plan.layers):
            layer.__dict__[LAYER_PLAN], layer.__dict__[STEP_PLAN] = part, plan
    return plan


def plan_for(layer: nn.Module) -> LayerPlan:
    """What this layer's forward, now, keeps: its part of the plan in training, everything where nothing trains."""
    if not (layer.training and torch.is_grad_enabled()):
        return _WHOLE
    plan: LayerPlan = layer.__dict__.get(LAYER_PLAN, _WHOLE)
    return plan


def step_plan_for(layer: nn.Module) -> TrainingPlan | None:
    """The plan of the whole step that ``layer`` is part of (MLP tile, weights held in 16 bits), or None before one."""
    return layer.__dict__.get(STEP_PLAN)


def should_recompute(layer: nn.Module) -> bool:
    """Whether this layer's forward, now, keeps less than everything."""
    return plan_for(layer).keep is not Keep.ALL


def run(layer: nn.Module, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    """``function(*args, **kwargs)``, recomputed in backward unless the plan keeps everything of ``layer``."""
    if not should_recompute(layer):
        return function(*args, **kwargs)
    result: torch.Tensor = checkpoint(function, *args, use_reentrant=False, **kwargs)
    return result


def set_plans(of: Iterable[nn.Module], plan: LayerPlan) -> None:
    """Give every layer this plan, apart from any step's."""
    for layer in of:
        layer.__dict__.pop(STEP_PLAN, None)
        layer.__dict__[LAYER_PLAN] = plan


def forget(model: nn.Module) -> None:
    """Take every plan off ``model``."""
    base = unwrap(model)
    base.__dict__.pop(PLANNER, None)
    for layer in layers(base):
        layer.__dict__.pop(LAYER_PLAN, None)
        layer.__dict__.pop(STEP_PLAN, None)
