"""What a reward function returned, checked value by value and turned into floats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch

from .errors import RewardError

_FLOAT32_MAX = torch.finfo(torch.float32).max


def as_rewards(function: str, returned: Any, completions: Sequence[Any]) -> list[float]:
    """One float a completion, NaN standing for None ("does not apply to this row").

    Takes a list, tuple, array, tensor or generator of B numbers or None; booleans count as 0 and 1, as they do in TRL.
    Raises `RewardError` for anything else: another length (never broadcast), no sequence, a value that is no number,
    NaN (None is how to abstain), an infinity, or a number too large for float32.
    """
    B = len(completions)
    if returned is None or isinstance(returned, (str, bytes, Mapping, Real)) or not isinstance(returned, Iterable):
        raise RewardError(function, f"returned {_brief(returned)}; return a list of {B} numbers, one a completion")
    if isinstance(returned, torch.Tensor):
        if returned.dim() != 1:
            shape = list(returned.shape)
            raise RewardError(function, f"returned a tensor of shape {shape}; return one of shape [{B}]")
        returned = returned.detach().cpu().tolist()
    values = list(returned)
    if len(values) != B:
        row = min(len(values), B) if len(values) < B else None
        raise RewardError(
            function,
            f"returned {len(values)} rewards for {B} completions; return exactly one for each, None where it abstains",
            row,
            None if row is None else completions[row],
        )
    return [_number(function, row, value, completions[row]) for row, value in enumerate(values)]


def _number(function: str, row: int, value: Any, completion: Any) -> float:
    if value is None:
        return math.nan
    if isinstance(value, torch.Tensor) and value.numel() == 1 and value.dim() == 0:
        value = value.item()
    if type(value).__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, Real):
        raise RewardError(function, f"gave {_brief(value)}, which is not a number (or None)", row, completion)
    number = float(value)
    if math.isnan(number):
        raise RewardError(function, "gave NaN; give None where the function does not apply", row, completion)
    if abs(number) > _FLOAT32_MAX:
        raise RewardError(function, f"gave {number}, which is not finite in float32", row, completion)
    return number


def _brief(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown[:80]}{'...' if len(shown) > 80 else ''}"
