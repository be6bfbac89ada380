"""Counter-based random numbers: a draw depends on its seed, sample and position alone, never on its neighbours.

SplitMix64 (Steele, Lea and Flood, 2014, doi:10.1145/2714064.2660195) as a stateless hash: number i of the stream with
key k is ``mix(k + (i + 1) * GOLDEN)``.
"""

from __future__ import annotations

import torch

from ...kernels.reference.sample import uniforms

__all__ = ["fresh_seed", "mix", "stream_key", "uniforms"]

_MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
_M1, _M2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _signed(x: int) -> int:
    """The int64 with the same bits."""
    return x - (1 << 64) if x >= 1 << 63 else x


def mix(x: int) -> int:
    """SplitMix64's finalizer on an unsigned 64-bit integer."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * _M1) & _MASK
    x = ((x ^ (x >> 27)) * _M2) & _MASK
    return x ^ (x >> 31)


def stream_key(seed: int, index: int) -> int:
    """Key of sample ``index`` of a request, as a signed 64-bit integer."""
    return _signed(mix(mix(seed) + (index + 1) * GOLDEN))


def fresh_seed() -> int:
    """A seed from torch's global CPU generator, so that ``torch.manual_seed`` and a restored state reproduce it."""
    return int(torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64)) & _MASK
