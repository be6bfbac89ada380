"""``x A^T`` by Hopper's wide instruction (``low_blocks.cu``): what its blocks are given, and where they work."""

from __future__ import annotations

from functools import cache

import torch

from pronghorn.kernels.reference.low_rank import SPLITS

MOST_ROWS, MOST_RANKS = 256, 128  # in a product's own launch

_RANKS = (16, 32, 48, 64, 96, 128)  # that the instruction is written for
_MOST_STAGES = 16


def whole_ranks(ranks: int) -> int:
    """As many as the instruction has."""
    return next(n for n in _RANKS if n >= ranks)


def defines_of(ranks: int, blocks: int, shared_bytes: int, box: int = 64) -> dict[str, int]:
    """Macros of ``low_blocks.cu``: as many stages as ``shared_bytes`` have room for, ``box`` rows of x at a time."""
    stages = min(_MOST_STAGES, shared_bytes // ((box + whole_ranks(ranks)) * 128))
    return {"RANKS": whole_ranks(ranks), "LOW": blocks, "LOW_STAGES": stages, "LOW_BOX": box}


def bytes_of(defines: dict[str, int]) -> int:
    """Shared memory of a block that makes a part of it."""
    stages, rows = defines["LOW_STAGES"], defines["LOW_BOX"] + defines["RANKS"]
    return stages * rows * 128 + max(stages * 16 + 16, (64 - rows) * 128)  # the instruction reads 64 rows of x


def room_for(rows: int) -> int:
    """Rows of a workspace: a power of two, so that few are made."""
    return max(MOST_ROWS, 1 << (rows - 1).bit_length())


@cache
def workspace(
    device: torch.device, stream: int, ranks: int, rows: int = MOST_ROWS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of runs, and flags, 0 again behind each launch: made once, so that a CUDA graph may hold them, for each
    stream, as another rollout may be drawn on another.
    """
    parts = torch.empty(rows * SPLITS * ranks, dtype=torch.float32, device=device)
    return parts, torch.zeros(rows // 64 * 32, dtype=torch.int32, device=device)
