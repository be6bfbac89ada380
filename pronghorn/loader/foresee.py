"""``pronghorn.plan``: peak memory and time of a training step, foreseen from a model or from its config.json alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.errors import ConfigError
from ..config.plan import PlanSettings
from ..models.checkpointing import mode_of
from ..models.plan import CannotFit, Card, ModelShape, TrainingPlan, card_named, card_of, choose, known_cards
from ..models.plan.budget import Budget, gpu_budget, host_budget, less_reserve, named_budget
from ..models.plan.constants import GIB, HOST_SHARE, PLANNED_HOST_BYTES
from ..models.plan.read import read_shape
from ..models.registry import spec_for
from ..weights.locate import locate
from .pretrained import _read_config


def plan(model: Any, settings: PlanSettings) -> TrainingPlan:
    """The plan of one training step: forward and backward of a micro-batch, and the optimizer.

    Args:
        model: a live Pronghorn model, a transformers config, a folder or file with a config.json, or a hub name.
        settings: batch, length, GPU and the rest.

    Raises:
        ConfigError: a bad value, an unknown card, no GPU to plan for, or a step that does not fit: with the smallest
            peak it could have, and the batch or length that would fit.
    """
    shape = _shape(model, settings)
    card, budget = _card(settings)
    if isinstance(model, nn.Module):  # the shape counts the model's own bytes
        own = min(shape.weight_bytes + shape.adapter_bytes, budget.allocated)
        budget = replace(budget, allocated=budget.allocated - own)
    host = _host(settings)
    mode = mode_of(settings.use_gradient_checkpointing)

    def attempt(batch: int, length: int) -> TrainingPlan:
        room = budget.peak - budget.allocated
        return choose(shape, card, batch * length, length, room, host, mode, limit_bytes=budget.limit)

    try:
        found = attempt(settings.batch_size, settings.seq_length)
    except CannotFit as none:
        raise ConfigError(_does_not_fit(none.smallest, settings, attempt)) from None
    if not found.fits:
        raise ConfigError(
            f"plan: use_gradient_checkpointing={settings.use_gradient_checkpointing!r} keeps everything, which takes "
            f"{found.peak_bytes / GIB:.1f} GB of the {found.total_bytes / GIB:.1f} GB of {card.name}; give 'auto' or "
            "'memory', or lower batch_size or seq_length"
        )
    return found


def _shape(model: Any, settings: PlanSettings) -> ModelShape:
    if isinstance(model, nn.Module):
        return read_shape(model, settings.optimizer)
    config = model if hasattr(model, "model_type") else _config(model, settings)
    spec_for(config)
    in_4bit = settings.load_in_4bit or getattr(config, "quantization_config", None) is not None
    return ModelShape.from_config(
        config,
        load_in_4bit=in_4bit,
        r=settings.r,
        target_modules=settings.target_modules,
        optimizer=settings.optimizer,
        full_finetuning=settings.full_finetuning,
    )


def _config(name: Any, settings: PlanSettings) -> Any:
    """The transformers config of a folder, of a config.json, or of a hub repository."""
    if not isinstance(name, str | Path):
        raise ConfigError(
            f"plan: model={type(name).__name__} is none; give a loaded model, a transformers config, a folder with a "
            "config.json, or a hub name"
        )
    path = Path(name).expanduser()
    folder = path.parent if path.name == "config.json" and path.is_file() else path
    located = locate(
        str(folder), code=settings.trust_remote_code, local_files_only=settings.local_files_only
    )  # no weights
    return _read_config(located, settings.trust_remote_code)


def _card(settings: PlanSettings) -> tuple[Card, Budget]:
    """The card to plan for, and what may be allocated on it."""
    if settings.gpu is not None:
        card = card_named(settings.gpu)
        budget = named_budget(card)
    elif torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        card, budget = card_of(torch.cuda.get_device_properties(device)), gpu_budget(device)
    else:
        raise ConfigError(f"plan: gpu=None, and no GPU is visible; name one of {', '.join(known_cards())}")
    if settings.memory_gb is None:
        return card, budget
    limit = int(settings.memory_gb * GIB)
    return card, replace(budget, peak=min(budget.peak, less_reserve(limit)), limit=min(budget.limit, limit))


def _host(settings: PlanSettings) -> int:
    if settings.host_memory_gb is not None:
        return int(HOST_SHARE * settings.host_memory_gb * GIB)
    return host_budget() if settings.gpu is None else int(HOST_SHARE * PLANNED_HOST_BYTES)


def _does_not_fit(smallest: TrainingPlan, settings: PlanSettings, attempt: Callable[[int, int], TrainingPlan]) -> str:
    """What to say: the smallest peak there is, and the largest batch, or else length, that fits."""
    batch = _largest(settings.batch_size, lambda n: attempt(n, settings.seq_length))
    length = 0 if batch else _largest(settings.seq_length // 64, lambda n: attempt(1, 64 * n)) * 64
    if batch:
        remedy = f"lower batch_size to {batch}"
    elif length:
        remedy = f"lower seq_length to {length}{' and batch_size to 1' if settings.batch_size > 1 else ''}"
    elif not settings.load_in_4bit:
        remedy = "give load_in_4bit=True, or a larger GPU: the weights leave no room for a step of any size"
    else:
        remedy = "give a larger GPU or a smaller model: the weights leave no room for a step of any size"
    return (
        f"plan: batch_size={settings.batch_size} x seq_length={settings.seq_length} takes at least "
        f"{smallest.peak_bytes / GIB:.1f} GB, more than {smallest.card} has to give "
        f"({smallest.total_bytes / GIB:.1f} GB in all); {remedy}"
    )


def _largest(below: int, attempt: Callable[[int], TrainingPlan]) -> int:
    """The largest n under ``below`` that fits, by bisection; 0 where none does."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        try:
            attempt(middle)
            low = middle
        except CannotFit:
            high = middle
    return low
