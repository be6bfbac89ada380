r"""8-bit AdamW over many tensors in one launch: Adam (arXiv:1412.6980) with decoupled decay (arXiv:1711.05101) and
moments held in 8 bits, block by block (Dettmers et al. 2022, arXiv:2110.02861).

A block is 256 elements of a tensor; a moment is :math:`s_i = q_{c_i} a` with the block's scale :math:`a = \max |s|`, a
code :math:`c_i` and the 256 sorted levels q of the dynamic map. With gradient g, step t:

.. math::
    m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
    p &\leftarrow \left(p - \eta \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
        \frac{m}{\sqrt v + \epsilon \sqrt{1 - \beta_2^t}}\right) (1 - \eta \lambda)

in float32 from the dequantized moments; then each moment gets its new scale and nearest codes. This is what
bitsandbytes' CUDA kernel computes, the order of update and decay and these three habits included: an element whose
gradient is infinite or NaN keeps its value, and its moments become 0; a negative first moment never becomes the level
0, but the one below it; a 16-bit parameter is rounded before the decay too. Where bitsandbytes takes the power in the
bias corrections by a fast instruction (off by up to 1e-4 of the update in the first steps), the corrections here are
exact.

**Nearest code without a search.** The positive levels come in seven decades :math:`[10^{i-7}, 10^{i-6})`, i = 0..6, of
:math:`N_i = K 2^i` levels each, at the middles of :math:`N_i` equal parts (K is 1 for the signed map, which mirrors
them, 2 for the unsigned), then 1.0 and, below all, 0. Seen from the decade's last level at
:math:`10^{i-6} (1 - 0.45 / N_i)`, the next decade's first is at :math:`10^{i-6} (1 + 2.25 / N_i)`, so the boundary of
the two is :math:`10^{i-6} (1 + 0.9 / N_i)`; within decade i, x belongs to part
:math:`\lfloor (10^{6-i} x - 0.1) N_i / 0.9 \rfloor`. Six comparisons and one multiplication find the code, where a
binary search would read memory eight times in a row, sixteen for the two moments.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from pronghorn.kernels.reference import adamw8bit as reference
from pronghorn.kernels.reference.adamw8bit import BLOCK, Rule, Slot, rule

__all__ = ["BLOCK", "Rule", "Slot", "Table", "rule", "table"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Table(Protocol):
    """Tensors that step together."""

    def step(self, gradients: Sequence[torch.Tensor | None], which: Sequence[int], rules: Sequence[Rule]) -> None:
        """One step of every slot that has a gradient, in place; on a GPU one launch and no synchronisation.

        Args:
            gradients: for each slot, dense, of the parameter's dtype and element order, or None to leave it as it is.
            which: for each slot, the index of its rule.
            rules: the constants of this step, by :func:`rule`.
        """


def table(slots: Sequence[Slot], levels1: torch.Tensor, levels2: torch.Tensor) -> Table:
    """Prepare tensors of one device and one dtype to step together.

    Args:
        slots: the tensors and their moments; on a GPU they must stay where they are in memory, 16-byte aligned.
        levels1: float32 [256], bitsandbytes' signed dynamic map, on the parameters' device.
        levels2: float32 [256], the unsigned one. A GPU's kernel knows how the two maps are made.

    Raises:
        ValueError: slots of several devices or dtypes, or tensors that do not fit together.
    """
    _check(slots)
    if not slots[0].param.is_cuda:
        return reference.Table(slots, levels1, levels2)
    from pronghorn.kernels import adamw8bit_triton

    return adamw8bit_triton.Table(slots, levels1, levels2)


def _check(slots: Sequence[Slot]) -> None:
    if not slots:
        raise ValueError("no slots; give at least one tensor to step")
    dtype, device = slots[0].param.dtype, slots[0].param.device
    if dtype not in DTYPES:
        raise ValueError(f"parameters are {dtype}; 8-bit AdamW takes float32, float16 and bfloat16")
    for number, slot in enumerate(slots):
        if slot.param.dtype != dtype or slot.param.device != device:
            raise ValueError(
                f"slot {number} is {slot.param.dtype} on {slot.param.device} and slot 0 {dtype} on {device}; "
                "make a table for each"
            )
        numel = slot.param.numel()
        sizes = [numel, numel, -(-numel // BLOCK), -(-numel // BLOCK)]
        moments = (slot.state1, slot.state2, slot.absmax1, slot.absmax2)
        dense = all(t.is_contiguous() for t in (slot.param, *moments))
        if not dense or [t.numel() for t in moments] != sizes:
            raise ValueError(
                f"slot {number}: a parameter of {numel} elements needs dense codes and scales of {sizes} elements, "
                f"not {[t.numel() for t in moments]}"
            )
