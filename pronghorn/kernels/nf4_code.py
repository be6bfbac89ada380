"""The two code books of NF4 with double quantization, and the boundaries that decide between neighbours.

Every tensor names its device, so that building a model under ``torch.device("meta")`` cannot spoil a cache.

NF4 is the 16-level NormalFloat of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, appendix E). The block scales are
themselves stored in 8 bits, in the dynamic tree data type of Dettmers 2015 (arXiv:1511.04561).
"""

from __future__ import annotations

from functools import lru_cache

import torch

NF4_BLOCKSIZE = 64
NESTED_BLOCKSIZE = 256

# Levels are quantiles of N(0, 1) scaled to [-1, 1]; level 7 is an exact zero.
NF4_LEVELS: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Where bitsandbytes' CUDA code changes from one level to the next. Four of them lie one unit in the last place away
# from the midpoints that its CPU code computes, so the same weight can get different codes on the two devices.
NF4_CUDA_BOUNDARIES: tuple[float, ...] = (
    -0.8480964303016663,
    -0.6106328964233398,
    -0.4599952697753906,
    -0.33967941999435425,
    -0.23460739850997925,
    -0.13791173696517944,
    -0.045525018125772476,
    0.03979014977812767,
    0.1202552542090416,
    0.2035212516784668,
    0.2920137643814087,
    0.3893125355243683,
    0.5016633868217468,
    0.6427869200706482,
    0.8614783883094788,
)


def _midpoints(levels: torch.Tensor) -> torch.Tensor:
    return (levels[:-1] + levels[1:]) / 2


@lru_cache(maxsize=32)
def nf4_code(device: torch.device) -> torch.Tensor:
    """The 16 NF4 levels in rising order, float32 [16], cached per device: do not write to it."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@lru_cache(maxsize=32)
def nf4_midpoints(device: torch.device) -> torch.Tensor:
    """The 15 boundaries between NF4 levels, float32 [15]; a value on a boundary takes the lower level."""
    return _midpoints(nf4_code(torch.device("cpu"))).to(device)


@lru_cache(maxsize=32)
def nf4_cuda_boundaries(device: torch.device) -> torch.Tensor:
    """The 15 boundaries that bitsandbytes' CUDA code uses, float32 [15]; on a boundary the lower level is taken."""
    return torch.tensor(NF4_CUDA_BOUNDARIES, dtype=torch.float32, device=device)


@lru_cache(maxsize=32)
def nf4_pairs(device: torch.device) -> torch.Tensor:
    """Both levels of every packed byte, high nibble first, float32 [256, 2], cached per device."""
    code, byte = nf4_code(torch.device("cpu")), torch.arange(256, device="cpu")
    return torch.stack([code[byte >> 4], code[byte & 15]], dim=1).contiguous().to(device)


def _dynamic_levels() -> torch.Tensor:
    """255 signed levels 10^(e-6) * m and zero: the larger the exponent e, the more bits are left for the fraction m."""
    levels: list[float] = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        magnitudes = (10 ** (exponent - 6) * ((edges[:-1] + edges[1:]) / 2.0)).tolist()
        levels += magnitudes + [-m for m in magnitudes]
    return torch.tensor(sorted(levels), dtype=torch.float32, device="cpu")


@lru_cache(maxsize=32)
def dynamic_code(device: torch.device) -> torch.Tensor:
    """The 256 levels of the signed dynamic 8-bit map in rising order, float32 [256], cached per device."""
    return _dynamic_levels().to(device)


@lru_cache(maxsize=32)
def dynamic_midpoints(device: torch.device) -> torch.Tensor:
    """The 255 boundaries between the levels of the dynamic map, float32 [255]."""
    return _midpoints(_dynamic_levels()).to(device)


@lru_cache(maxsize=1)
def dynamic_grid() -> torch.Tensor:
    """For each of 65,536 equal steps over [-1, 1], the nearest level of the dynamic map: uint8 [65536], on the CPU.

    bitsandbytes' CPU code rounds a scale to this grid first, so its 8-bit codes differ from those of its CUDA code.
    """
    grid = (torch.arange(65536, dtype=torch.float64, device="cpu") * (2 / 65535) - 1).float()
    return torch.bucketize(grid, dynamic_midpoints(torch.device("cpu"))).to(torch.uint8)
