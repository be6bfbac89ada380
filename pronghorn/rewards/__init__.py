"""Reward functions and the runner that calls them, checks what they return, and names the one that is at fault.

A leaf package: it imports nothing of Pronghorn but `config`. Public names load on first use, which keeps workers light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "RewardError": ".errors",
    "get_soft_overlong_punishment": ".overlong",
    "isolated": ".isolation",
}

__all__ = ["RewardError", "get_soft_overlong_punishment", "isolated"]

if TYPE_CHECKING:
    from .errors import RewardError
    from .isolation import isolated
    from .overlong import get_soft_overlong_punishment


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name], __name__), name)
