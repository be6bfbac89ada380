"""Many blocks copied, each times a factor, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Block = tuple[torch.Tensor, torch.Tensor, float]
"""``(from, to, factor)``: two matrices of one shape, whose rows are contiguous."""


class ScaledBlocks:
    """See :func:`pronghorn.kernels.scaled_blocks.scaled_blocks`."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)

    @torch.no_grad()
    def __call__(self) -> None:
        """Write every block as its source stands now."""
        for source, target, factor in self.blocks:
            torch.mul(source, factor, out=target)
