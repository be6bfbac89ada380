"""8-bit AdamW over many tensors in plain PyTorch. The formulas are in ``kernels/adamw8bit.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

BLOCK = 256
"""Elements that share a scale."""


@dataclass(frozen=True, eq=False, slots=True)
class Slot:
    """A trained tensor and its two moments, all dense and of one element order; blocks run flat over it.

    Attributes:
        param: float32, float16 or bfloat16, any shape.
        state1, state2: uint8, as many elements: codes of the first and of the second moment. For a parameter on a GPU
            they may be managed memory, which torch shows as a tensor of the CPU.
        absmax1, absmax2: float32 [ceil(numel / BLOCK)]: the blocks' scales.
    """

    param: torch.Tensor
    state1: torch.Tensor
    state2: torch.Tensor
    absmax1: torch.Tensor
    absmax2: torch.Tensor


class Rule(NamedTuple):
    """The numbers that a step multiplies with; :func:`rule` derives them."""

    beta1: float
    gain1: float
    beta2: float
    gain2: float
    step_size: float
    eps: float
    decay: float


def rule(lr: float, betas: Sequence[float], eps: float, weight_decay: float, step: int) -> Rule:
    """The constants of step number ``step`` (from 1), computed in float64 from betas rounded to float32.

    The betas are rounded first because the moments are multiplied by rounded ones: ``1 - beta`` and the bias
    corrections then belong to the average that is really taken (0.999 leaves 1.3e-5 of itself in ``1 - beta``).
    """
    beta1, beta2 = torch.tensor([float(betas[0]), float(betas[1])], dtype=torch.float32, device="cpu").tolist()
    correction1, correction2 = 1.0 - beta1**step, (1.0 - beta2**step) ** 0.5
    decay = 1.0 - float(lr) * weight_decay if weight_decay > 0.0 else 1.0
    return Rule(
        beta1, 1.0 - beta1, beta2, 1.0 - beta2, -float(lr) * correction2 / correction1, eps * correction2, decay
    )


def _blocks(flat: torch.Tensor) -> torch.Tensor:
    """``[N]`` to ``[ceil(N / BLOCK), BLOCK]``, zeros behind the last element."""
    return torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)


def _dequantize(codes: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    flat = levels[codes.reshape(-1).long()]
    return (_blocks(flat) * absmax[:, None]).view(-1)[: flat.numel()]


def _quantize_(moment: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, levels: torch.Tensor) -> None:
    """Each element to the nearest level of its block's scale, of two as near the one towards zero.

    A block of zeros, or of subnormals, becomes the level 0; a negative element never does.
    """
    blocks = _blocks(moment)
    absmax.copy_(blocks.abs().amax(1))
    tiny = torch.finfo(torch.float32).tiny
    unit = torch.where(absmax[:, None] >= tiny, blocks / absmax[:, None], 0.0)
    midpoints = (levels[1:] + levels[:-1]) * 0.5
    nearest = torch.where(
        unit > 0, torch.searchsorted(midpoints, unit, right=False), torch.searchsorted(midpoints, unit, right=True)
    )
    zero = int((levels == 0).nonzero())
    nearest = torch.where(torch.signbit(blocks) & (nearest >= zero), zero - 1, nearest) if zero else nearest
    codes.view(-1).copy_(nearest.view(-1)[: moment.numel()])


def adamw8bit_(slot: Slot, gradient: torch.Tensor, levels1: torch.Tensor, levels2: torch.Tensor, by: Rule) -> None:
    """One step of one tensor, in place."""
    g, dtype = gradient.reshape(-1).float(), slot.param.dtype
    finite = torch.isfinite(g)
    first = _dequantize(slot.state1, slot.absmax1, levels1) * by.beta1 + by.gain1 * g
    second = _dequantize(slot.state2, slot.absmax2, levels2) * by.beta2 + by.gain2 * g * g
    first, second = torch.where(finite, first, 0.0), torch.where(finite, second, 0.0)
    param = slot.param.detach().view(-1)
    moved = (param.float() + by.step_size * (first / (second.sqrt() + by.eps))).to(dtype)
    param.copy_(torch.where(finite, (moved.float() * by.decay).to(dtype), param))
    _quantize_(first, slot.state1, slot.absmax1, levels1)
    _quantize_(second, slot.state2, slot.absmax2, levels2)


class Table:
    """Tensors that step together; see :func:`pronghorn.kernels.adamw8bit.table`."""

    def __init__(self, slots: Sequence[Slot], levels1: torch.Tensor, levels2: torch.Tensor) -> None:
        self.slots, self.levels1, self.levels2 = list(slots), levels1, levels2

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor | None], which: Sequence[int], rules: Sequence[Rule]) -> None:
        """One step of every slot that has a gradient, slot i by ``rules[which[i]]``."""
        for slot, gradient, number in zip(self.slots, gradients, which, strict=True):
            if gradient is not None:
                adamw8bit_(slot, gradient, self.levels1, self.levels2, rules[number])
