"""How the codes of a 4-bit weight lie in memory: row by row, as bitsandbytes has them, or in tiles.

A tile holds 8 outputs by 64 inputs, 256 bytes one after another, so that the warp that multiplies them reads whole
cache lines: ``[O / 8][I / 64][8 outputs][4 threads][2 halves][4 steps]`` bytes. The matrix instruction takes 16 inputs
a step, of which thread t of four has two of the first half, 2t and 2t + 1, and the same two of the second; so the 8
bytes of a thread are its share of four steps (``nf4_matmul.cu``). A row's 64 inputs within a tile are 32 bytes in a
row, and share one scale.

The order is the storage's alone: which code a weight has is the same in both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

TILE_OUTPUTS = 8
TILE_INPUTS = 64


def takes_tiles(shape: Sequence[int], blocksize: int) -> bool:
    """Whether a weight of ``shape`` with a scale for each ``blocksize`` weights consists of whole tiles."""
    return len(shape) == 2 and shape[0] % TILE_OUTPUTS == 0 and shape[1] % TILE_INPUTS == 0 and blocksize % 64 == 0


def to_tiles(codes: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Codes of a weight ``[O, I]`` that lie row by row, uint8 ``[O * I / 2]``, in tiles: a copy."""
    O, I = shape  # noqa: E741
    apart = codes.reshape(O // TILE_OUTPUTS, TILE_OUTPUTS, I // TILE_INPUTS, 4, 2, 4)  # outputs, steps, halves, threads
    return apart.permute(0, 2, 1, 5, 4, 3).reshape(-1)


def to_rows(codes: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The other way round."""
    O, I = shape  # noqa: E741
    apart = codes.reshape(O // TILE_OUTPUTS, I // TILE_INPUTS, TILE_OUTPUTS, 4, 2, 4)  # outputs, threads, halves, steps
    return apart.permute(0, 2, 1, 5, 4, 3).reshape(-1)
