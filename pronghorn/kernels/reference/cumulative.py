"""Cumulative probabilities, also where deterministic kernels are asked for."""

from __future__ import annotations

import torch

_ONE = float(1 << 60)
"""Probability 1 in integers: their sums are exact in any order, and a vocabulary's rounding errors stay below 2^-43."""


def cumulative(mass_BV: torch.Tensor) -> torch.Tensor:
    """Running sums of float64 probabilities along the last dimension, each row summing to 1 at most.

    torch refuses a cumulative sum of floats on a GPU under ``torch.use_deterministic_algorithms(True)``, for its order
    is open there; integers have no such trouble. An entry below 2^-61 then counts as 0.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return mass_BV.cumsum(-1)
    return mass_BV.mul(_ONE).round_().long().cumsum(-1).double().div_(_ONE)
