"""What a reward function returned, checked value by value and turned into floats.

Imports no torch: it also runs in workers, where torch is only there if the reward function brings it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from .errors import RewardError

_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def as_rewards(
    function: str, returned: Any, completions: Sequence[Any], faults: dict[int, RewardError] | None = None
) -> list[float]:
    """One float a completion, NaN standing for None ("does not apply to this row").

    Takes a list, tuple, array, tensor or generator of B numbers or None; booleans count as 0 and 1, as they do in TRL.
    Raises `RewardError` for anything else: another length (never broadcast), no sequence, a value that is no number,
    NaN (None is how to abstain), an infinity, or a number too large for float32. With `faults`, what is wrong with a
    single value is put there under its row, whose reward is NaN, and not raised.
    """
    B = len(completions)
    if returned is None or isinstance(returned, (str, bytes, Mapping, Real)) or not isinstance(returned, Iterable):
        raise RewardError(function, f"returned {_brief(returned)}; return a list of {B} numbers, one a completion")
    if _is_tensor(returned):
        tensor: Any = returned
        if tensor.dim() != 1:
            shape = list(tensor.shape)
            raise RewardError(function, f"returned a tensor of shape {shape}; return one of shape [{B}]")
        returned = tensor.detach().cpu().tolist()
    values = list(returned)
    if len(values) != B:
        row = min(len(values), B) if len(values) < B else None
        raise RewardError(
            function,
            f"returned {len(values)} rewards for {B} completions; return exactly one for each, None where it abstains",
            row,
            None if row is None else completions[row],
        )
    rewards = []
    for row, value in enumerate(values):
        try:
            rewards.append(_number(function, row, value, completions[row]))
        except RewardError as fault:
            if faults is None:
                raise
            faults[row] = fault
            rewards.append(math.nan)
    return rewards


def _number(function: str, row: int, value: Any, completion: Any) -> float:
    if value is None:
        return math.nan
    if _is_tensor(value) and value.numel() == 1 and value.dim() == 0:
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


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # a tensor cannot exist before torch is imported
    return torch is not None and isinstance(value, torch.Tensor)


def _brief(value: Any) -> str:
    shown = repr(value)
    return f"{type(value).__name__} {shown[:80]}{'...' if len(shown) > 80 else ''}"
