"""The Triton side of ``scaled_blocks.py``."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.reference.scaled_blocks import Block
from pronghorn.kernels.spans import on_device

TILE = 4096
"""Elements of one program."""


@triton.jit
def _scaled_blocks(like_ptr, block_ptr, factor_ptr, place_ptr, TILE: tl.constexpr):
    """A tile of a block: ``place`` says of which and the how-manieth, ``block`` where it lies."""
    program = tl.program_id(0)
    which = tl.load(place_ptr + 2 * program)
    first = tl.load(place_ptr + 2 * program + 1)
    block = block_ptr + 6 * which
    source = tl.load(block).to(like_ptr.dtype)
    target = tl.load(block + 1).to(like_ptr.dtype)
    size, columns = tl.load(block + 2).to(tl.int32), tl.load(block + 3).to(tl.int32)
    source_stride, target_stride = tl.load(block + 4), tl.load(block + 5)
    at = first + tl.arange(0, TILE)
    row, column = (at // columns).to(tl.int64), at % columns
    value = tl.load(source + row * source_stride + column, mask=at < size, other=0.0).to(tl.float32)
    value *= tl.load(factor_ptr + which)
    tl.store(target + row * target_stride + column, value.to(like_ptr.dtype.element_ty), mask=at < size)


_launch = Launcher(_scaled_blocks)


class ScaledBlocks:
    """Where the blocks lie, on the device: made once, read by every launch."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.held = list(blocks)  # the addresses below are theirs
        like = blocks[0][0]
        rows, factors, places = [], [], []
        for i, (source, target, factor) in enumerate(blocks):
            size = source.numel()
            rows.append([
                source.data_ptr(), target.data_ptr(), size, source.shape[1], source.stride(0), target.stride(0),
            ])  # fmt: skip
            factors.append(factor)
            places += [[i, first] for first in range(0, size, TILE)]
        self.programs = len(places)
        self.blocks = on_device(torch.tensor(rows, dtype=torch.int64), torch.int64, like.device)
        self.factors = on_device(torch.tensor(factors, dtype=torch.float32), torch.float32, like.device)
        self.places = on_device(torch.tensor(places, dtype=torch.int32), torch.int32, like.device)

    def __call__(self) -> None:
        """Write every block as its source stands now."""
        if not self.programs:
            return
        like = self.held[0][0]
        with torch.cuda.device_of(like):
            _launch((self.programs,), like, self.blocks, self.factors, self.places, TILE, num_warps=8)
