"""Which adapter acts: the live one, none, or one loaded from a folder, for the length of a ``with`` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config.adapters import LIVE, AdapterChoice, LoraHandle
from ..config.errors import ConfigError

Wrapper = Any
"""A module that PEFT put around another one: a LoRA layer, or a ``modules_to_save`` wrapper."""


def adapter_names(model: nn.Module) -> list[str]:
    """Names of the adapters on ``model``; empty without PEFT."""
    return list(getattr(model, "peft_config", {}))


def wrappers(model: nn.Module) -> list[Wrapper]:
    """Every PEFT wrapper in ``model``."""
    return [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def live_names(model: Any) -> list[str]:
    """The adapters that are being trained (normally one, "default"): those active outside any :func:`adapter` block.

    Raises:
        ConfigError: ``model`` has no adapter.
    """
    if not adapter_names(model):
        raise ConfigError(f"model={type(model).__name__} has no LoRA adapter; call get_peft_model first")
    active = model.active_adapter
    return [active] if isinstance(active, str) else list(active)


def set_active(wrapper: Wrapper, names: list[str]) -> None:
    """Make ``names`` the active adapters of one wrapper, without touching what requires gradients.

    PEFT's own ``set_adapter`` flips ``requires_grad``, which would take parameters from the optimizer's hands.
    """
    if isinstance(wrapper, AuxiliaryTrainingWrapper):
        names = [name for name in names if name in wrapper._adapters]
    wrapper._active_adapter = names


@contextmanager
def adapter(model: Any, which: AdapterChoice) -> Iterator[None]:
    """Run inference under ``which`` adapter, then restore everything, also after an exception.

    Args:
        model: a model with or without PEFT.
        which: ``LIVE`` leaves the active adapter as it is; ``None`` is the base model; a :class:`LoraHandle` is that
            loaded adapter. ``requires_grad`` of every parameter stays as it is.

    Raises:
        ConfigError: the handle's adapter is not on this model, the base model cannot be had (trained biases, merged
            adapters), or ``which`` is none of the three.
    """
    if which is LIVE or (which is None and not adapter_names(model)):
        yield
        return
    if which is not None and not isinstance(which, LoraHandle):
        raise ConfigError(
            f"adapter={which!r} is a {type(which).__name__}; give what load_lora returned, None for the base model, or "
            "leave lora_request out for the live adapter"
        )
    touched = wrappers(model)
    _check(model, touched, which)
    before = [(w, w._disable_adapters, w._active_adapter) for w in touched]
    try:
        for wrapper in touched:
            if which is None:
                wrapper._disable_adapters = True
            else:
                wrapper._disable_adapters = False
                set_active(wrapper, [which.name])
        yield
    finally:
        for wrapper, disabled, active in before:
            wrapper._disable_adapters = disabled
            wrapper._active_adapter = active


def _check(model: Any, touched: list[Wrapper], which: LoraHandle | None) -> None:
    if which is not None and which.name not in adapter_names(model):
        raise ConfigError(
            f"adapter={which.name!r} (from {which.path!r}) is not on this model, or its folder changed and was loaded "
            "anew; load it with model.load_lora"
        )
    merged = sorted({name for wrapper in touched for name in wrapper.merged_adapters})
    if merged:
        raise ConfigError(
            f"adapter={which!r}: {', '.join(merged)} is merged into the base; call model.unmerge_adapter()"
        )
    biased = [name for name in live_names(model) if model.peft_config[name].bias != "none"]
    if biased:
        raise ConfigError(
            f"adapter={which!r}: adapter {biased[0]!r} trains the base's biases (bias="
            f'{model.peft_config[biased[0]].bias!r}), so the base model is gone; train with bias="none"'
        )
