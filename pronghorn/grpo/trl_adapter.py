"""``trl.GRPOTrainer`` and ``trl.GRPOConfig`` by name: scripts that import them from TRL get Pronghorn's.

Only names are set; no source is rewritten, and TRL's own classes stay where they are defined
(``trl.trainer.grpo_trainer``, ``trl.trainer.grpo_config``). A name that a script imported before the call stays TRL's.
"""

from __future__ import annotations

from typing import Any

import trl
import trl.trainer
import trl.trainer.grpo_trainer as trl_grpo

from ..config.errors import ConfigError
from .config import GRPOConfig
from .trainer import GRPOTrainer
from .trl_generation import PronghornGeneration, probe

_OURS = {"GRPOTrainer": GRPOTrainer, "GRPOConfig": GRPOConfig}
_PLACES = (trl, trl.trainer)
_SYMBOL = "VLLMGeneration"
MODES = ("native", "stock")


def patch(mode: str = "native") -> None:
    """Set the names; the other mode's are given back. Calling it twice changes nothing.

    Args:
        mode: ``"native"``: Pronghorn's trainer on Pronghorn's engine. ``"stock"``: TRL's own trainer, which samples
            with Pronghorn's engine where its config says ``use_vllm=True`` (vLLM need not be installed). In this mode
            one symbol changes: ``trl.trainer.grpo_trainer.VLLMGeneration``.

    Raises:
        ConfigError: another mode, or a TRL whose ``VLLMGeneration`` is not the one that is known.
    """
    if mode not in MODES:
        raise ConfigError(f"PatchFastRL: mode={mode!r} is not offered; give {' or '.join(map(repr, MODES))}")
    if mode == "stock":
        probe(_home())
    unpatch()
    if mode == "stock":
        setattr(trl_grpo, _SYMBOL, PronghornGeneration)
        return
    for place in _PLACES:
        for name, ours in _OURS.items():
            setattr(place, name, ours)


def unpatch() -> None:
    """Give TRL its names back."""
    from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer as TRLGRPOTrainer

    for place in _PLACES:
        place.GRPOTrainer, place.GRPOConfig = TRLGRPOTrainer, TRLGRPOConfig  # type: ignore[attr-defined]
    if getattr(trl_grpo, _SYMBOL, None) is PronghornGeneration:
        setattr(trl_grpo, _SYMBOL, _home())


def is_patched() -> bool:
    """Whether the names are Pronghorn's now."""
    return all(getattr(place, name) is ours for place in _PLACES for name, ours in _OURS.items())


def _home() -> Any:
    """TRL's own ``VLLMGeneration``, where it is defined.

    Raises:
        ConfigError: it is not there, or TRL's trainer does not take it from there.
    """
    try:
        from trl.generation.vllm_generation import VLLMGeneration
    except ImportError as error:
        raise ConfigError(f"PatchFastRL(mode='stock'): TRL's VLLMGeneration is not where it was: {error}") from error
    if getattr(trl_grpo, _SYMBOL, None) not in (VLLMGeneration, PronghornGeneration):
        raise ConfigError(
            "PatchFastRL(mode='stock'): trl.trainer.grpo_trainer.VLLMGeneration is not TRL's own; leave it as it is, "
            "or give mode='native'"
        )
    return VLLMGeneration
