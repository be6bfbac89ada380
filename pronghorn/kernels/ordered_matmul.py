r"""A product with weights in 16 bits for few rows, in the order of cuBLAS's kernels that do not split the sum.

.. math:: y_p = x W_p^T \;[+\; (s_p\, low_p B_p^T + bias_p)]

for the projections p that share an input (q, k and v; gate and up), in one launch. Decoding reads every weight for a
handful of rows. A matrix library splits the sum over the inputs then, differently for each number of rows, so that a
sampler's 6 rows and a trainer's thousands would differ in their last bits.

**Bits.** An output's sum is one float32 accumulator that takes the inputs in order, 16 products of the tensor core at a
time. It is rounded to x's dtype; then what the brackets hold is added and the sum rounded again. The brackets are
rounded likewise: the scaled product of the adapter, then its sum with the bias. That is what cuBLAS computes when the
bias is written first, the adapter's product added by ``addmm_``, and then the base's: it rounds a product before it
adds what lies in the output (measured on an H200). ``tests/gpu/test_ordered_matmul.py`` holds it equal to
``lora/fused.py`` bit for bit. A table ``[W | s B]`` with x and low side by side is one weight like any other.

**How** (``ordered_matmul_triton.py``). A program owns some outputs for all rows and walks over the inputs; as no two
share a sum, only outputs spread over the GPU: 32 of them a program, so that 4,096 are 128 programs, several stages of
weights on their way in each. Every program reads all of x, which costs no memory traffic but L2's, and is why many rows
are better left to cuBLAS. But long sums (the down projection) cuBLAS splits up to 256 rows: there a program has 128
rows, and Hopper's copy engine brings its inputs (43 microseconds at 128 rows of an 8B Llama and 56 at 256, where as
many rows as are summed in order take 76 and 68; ``docs/log.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from pronghorn.kernels import launch
from pronghorn.kernels.few_rows import HOPPER_PROCESSORS, MEMBERS, check_aligned, check_member, output
from pronghorn.kernels.reference import ordered_matmul as reference
from pronghorn.kernels.reference.ordered_matmul import DenseMember

__all__ = [
    "COPIED_ROWS", "LONG_SUM", "MAX_ROWS", "MOST_ROWS", "DenseMember", "mapped_rows", "most_rows", "ordered_matmul",
    "why_not",
]  # fmt: skip

MAX_ROWS = 64
"""Rows up to which this is meant to be the faster way; above, let cuBLAS multiply as many rows as it sums in order."""

LONG_SUM = 8192
"""Inputs from which on a matrix library splits the sum of up to 256 rows."""

MOST_ROWS = 256
"""Rows up to which a single product of so long a sum is meant to be faster than as many as the library sums in order,
on Hopper, whose copy engine brings the inputs."""

COPIED_ROWS = 32
"""Rows up to which threads ask for the inputs of any product; above, the copy engine brings those of some."""

MAX_RANK = 128
"""An adapter's largest rank."""

_ALIGNED = 8  # elements of 16 bits in 16 bytes


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda:
        return reference
    from pronghorn.kernels import ordered_matmul_triton

    return ordered_matmul_triton


def why_not(members: Sequence[DenseMember], dtype: torch.dtype) -> str:
    """In words, why a group cannot take this path on a GPU; empty where it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} in place of bfloat16 or float16"
    if not 1 <= len(members) <= MEMBERS:
        return f"{len(members)} projections in a group of up to {MEMBERS}"
    for m in members:
        w = m.weight_OI
        if w.dtype != dtype:
            return f"a weight in {w.dtype} for inputs in {dtype}"
        if w.stride(1) != 1 or w.shape[1] % _ALIGNED or w.stride(0) % _ALIGNED or w.data_ptr() % 16:
            return f"a weight of {tuple(w.shape)} with strides {w.stride()}: rows aligned to 16 bytes"
        if m.rank > MAX_RANK:
            return f"an adapter of rank {m.rank}, above {MAX_RANK}"
    return ""


def most_rows(members: Sequence[DenseMember]) -> int:
    """Rows up to which this is meant to be the faster way for a group on its GPU.

    With more outputs than a multiprocessor each in blocks of 32 is room for, some would be done behind the others.
    """
    outputs, inputs = members[0].weight_OI.shape
    alone = len(members) == 1 and outputs <= 32 * HOPPER_PROCESSORS
    if not alone or inputs < LONG_SUM or not launch.has_copy_engine(members[0].weight_OI):
        return MAX_ROWS
    return MOST_ROWS


def mapped_rows(members: Sequence[DenseMember], beside: bool = False) -> int:
    """Rows up to which the copy engine brings the inputs, above :data:`COPIED_ROWS`; 0 where it does not.

    A short sum is no faster by it, but for beginning ``beside`` the kernel that makes x's last columns.
    """
    most = most_rows(members)
    if most > MAX_ROWS:
        return most
    return MAX_ROWS if beside and len(members) == 1 and launch.has_copy_engine(members[0].weight_OI) else 0


def ordered_matmul(
    x_MI: torch.Tensor,
    members: Sequence[DenseMember],
    low_MR: torch.Tensor | None = None,
    out_MO: torch.Tensor | None = None,
    overlap: bool = False,
    late: int = 0,
) -> torch.Tensor:
    """Outputs of all ``members`` side by side; no gradient.

    Args:
        x_MI: ``[M, I]``, bfloat16 or float16 (on the CPU any float dtype), rows contiguous and 16-byte aligned.
        members: one to three projections of this input.
        low_MR: ``x A^T`` of all adapters side by side, in x's dtype; None without adapters.
        out_MO: ``[M, sum of O]``, x's dtype, rows contiguous, to write to.
        overlap: the kernel launched just before makes ``low_MR``, and nothing else that is read here: a GPU that can
            begins before it has ended.
        late: that kernel makes x's columns from here on, and nothing else that is read here; 0: all of x is whole. It
            was launched as usual, or lets others begin only behind its own wait.

    Returns:
        ``y_MO`` in x's dtype, rounded where the module's docstring says.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit; the text says which.
    """
    out_MO = output(x_MI, sum(m.weight_OI.shape[0] for m in members), out_MO)
    _check(x_MI, members, low_MR)
    _path(x_MI).ordered_matmul(x_MI, members, low_MR, out_MO, overlap=overlap, late=late)
    return out_MO


def _check(x_MI: torch.Tensor, members: Sequence[DenseMember], low_MR: torch.Tensor | None) -> None:
    for m in members:
        check_member(x_MI, m.weight_OI.shape, m, low_MR)
        O = m.weight_OI.shape[0]  # noqa: E741 - a shape letter
        if m.bias_O is not None and (m.bias_O.shape != (O,) or m.bias_O.dtype != x_MI.dtype):
            raise ValueError(f"bias is {tuple(m.bias_O.shape)}, {m.bias_O.dtype}; give {(O,)}, {x_MI.dtype}")
    if x_MI.is_cuda:
        reason = why_not(members, x_MI.dtype)
        if reason:
            raise ValueError(f"{reason}; multiply with torch.mm instead")
        check_aligned(x_MI)
