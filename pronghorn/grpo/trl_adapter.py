"""``trl.GRPOTrainer`` and ``trl.GRPOConfig`` by name: scripts that import them from TRL get Pronghorn's.

Only names are set; no source is rewritten, and TRL's own classes stay where they are defined
(``trl.trainer.grpo_trainer``, ``trl.trainer.grpo_config``). A name that a script imported before the call stays TRL's.
"""

from __future__ import annotations

import trl
import trl.trainer

from ..config.errors import ConfigError
from .config import GRPOConfig
from .trainer import GRPOTrainer

_OURS = {"GRPOTrainer": GRPOTrainer, "GRPOConfig": GRPOConfig}
_PLACES = (trl, trl.trainer)


def patch(mode: str = "native") -> None:
    """Set the names. Calling it twice changes nothing.

    Args:
        mode: ``"native"``: Pronghorn's trainer on Pronghorn's engine.

    Raises:
        ConfigError: another mode.
    """
    if mode != "native":
        raise ConfigError(f"PatchFastRL: mode={mode!r} is not offered; give 'native'")
    for place in _PLACES:
        for name, ours in _OURS.items():
            setattr(place, name, ours)


def unpatch() -> None:
    """Give TRL its names back."""
    from trl.trainer.grpo_config import GRPOConfig as TRLGRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer as TRLGRPOTrainer

    for place in _PLACES:
        place.GRPOTrainer, place.GRPOConfig = TRLGRPOTrainer, TRLGRPOConfig  # type: ignore[attr-defined]


def is_patched() -> bool:
    """Whether the names are Pronghorn's now."""
    return all(getattr(place, name) is ours for place in _PLACES for name, ours in _OURS.items())
