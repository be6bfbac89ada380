"""The soak's own reward, in a module that a reward worker imports without torch."""

from __future__ import annotations

from typing import Any


async def brevity(completions: Any, **kwargs: Any) -> list[float]:
    """An async reward, so that its loop and thread take part; it also spreads what random weights say."""
    return [-1e-3 * len(completion[0]["content"]) for completion in completions]
