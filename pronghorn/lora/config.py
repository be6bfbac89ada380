"""From the settings of ``get_peft_model`` to a ``peft.LoraConfig`` that uses Pronghorn's layer."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from torch import nn

from ..config.errors import ConfigError, nearest
from ..config.lora import LoraDefaults
from ..quant.linear4bit import Linear4bit
from .layer import LoraLinear

# What reset_lora_parameters knows; PEFT's other starts rewrite the frozen base or need its dense weights.
INITS = (True, False, "gaussian")
_KEYS = (
    "r", "lora_alpha", "lora_dropout", "bias", "use_rslora", "use_dora", "modules_to_save", "layers_to_transform",
    "layers_pattern", "exclude_modules", "init_lora_weights", "task_type",
)  # fmt: skip


def register(config: LoraConfig) -> LoraConfig:
    """Make ``config`` build :class:`LoraLinear` over ``Linear4bit`` and ``nn.Linear``; nothing of it is saved.

    PEFT asks the registered classes first, so its own linear never gets hold of a 4-bit one.
    """
    config._register_custom_module({Linear4bit: LoraLinear, nn.Linear: LoraLinear})
    return config


def lora_config(model: nn.Module, settings: LoraDefaults, max_rank: int) -> LoraConfig:
    """The checked LoraConfig of ``settings`` for ``model``.

    Raises:
        ConfigError: a rank over ``max_rank``, an unknown target module (naming the known ones), bias or start.
    """
    ranks = [settings.r, *(settings.rank_pattern or {}).values()]
    if max(ranks) > max_rank:
        raise ConfigError(
            f"get_peft_model: r={max(ranks)} is over max_lora_rank={max_rank}; "
            f"pass max_lora_rank={max(ranks)} to from_pretrained"
        )
    if settings.init_lora_weights not in INITS:
        raise ConfigError(
            f"get_peft_model: init_lora_weights={settings.init_lora_weights!r} would change the frozen base; "
            f"give one of {', '.join(map(repr, INITS))}"
        )
    if settings.bias not in ("none", "all", "lora_only"):
        raise ConfigError(f"get_peft_model: bias={settings.bias!r} is unknown; give 'none', 'all' or 'lora_only'")
    targets = settings.target_modules
    if isinstance(targets, list | tuple | set | frozenset):
        targets = sorted(targets)
        _check_names(model, "target_modules", targets)
    if settings.modules_to_save:
        _check_names(model, "modules_to_save", settings.modules_to_save)
    given: dict[str, Any] = {key: getattr(settings, key) for key in _KEYS}
    given["modules_to_save"] = list(settings.modules_to_save) if settings.modules_to_save else None
    config = LoraConfig(
        **given,
        target_modules=targets,
        rank_pattern=dict(settings.rank_pattern or {}),
        alpha_pattern=dict(settings.alpha_pattern or {}),
    )
    return register(config)


def _check_names(model: nn.Module, field: str, given: list[str]) -> None:
    """Every given name must be, or end, the name of a module; a typing error would otherwise adapt less in silence."""
    full = [
        name for name, module in model.named_modules() if name and (field != "target_modules" or _adaptable(module))
    ]
    for name in given:
        if not any(known == name or known.endswith("." + name) for known in full):
            leaves = sorted({known.rpartition(".")[2] for known in full if not known.rpartition(".")[2].isdigit()})
            close = nearest(name, leaves)
            hint = f"did you mean {close!r}? " if close else ""
            raise ConfigError(f"get_peft_model: {field} has {name!r}, unknown here; {hint}known: {', '.join(leaves)}")


def _adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding)
