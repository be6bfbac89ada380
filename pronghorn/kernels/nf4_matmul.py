r"""A product with a group's NF4 weights for few rows: 4-bit codes are read once, no weight is ever written.

.. math:: y = x\, [W_1; W_2; W_3]^T + low\, (s B)^T + bias

for the projections that share an input (q, k and v; gate and up), in one launch. Decoding reads every weight for a
handful of rows: 0.52 bytes a weight here, where making the 16-bit weight first moves 4.5.

**Bits.** The sum over the inputs is taken in order, 16 products at a time, in one float32 accumulator, and the
adapter's low rank follows the inputs: the order of cuBLAS's kernels that do not split the sum, so that a sampler that
multiplies 6 rows here and a trainer that multiplies thousands there get the same bits
(``tests/gpu/test_nf4_matmul.py``). That is why no two warps share an output's sum. Weights are rounded as
``dequantize_nf4`` rounds them.

**How** (``nf4_matmul.cu``). A warp owns tiles of 8 outputs: two of them are the rows of the instruction's left operand
(``mma`` m16n8k16), whose k of 16 consecutive inputs four threads share, and 8 rows of x are the right one; with more
rows x is the left one. Codes lie in tiles (``nf4_layout.py``), so that a warp reads its own 256 bytes at once, straight
into registers, some way ahead. A byte becomes its two float32 levels by one read of a table in shared memory, they are
multiplied by their scale and rounded into a register of the operand. x comes through shared memory, once for a block.
Where outputs are few, several warps take turns at the inputs of the same 16 and hand the accumulators on. Where no
group of warps would have outputs of two members, a block takes them one after another, whosever they are: a block for
each member's rest could be one more than there are multiprocessors, and would run behind the others.

**The adapter's** ``x A^T`` is made by the first few blocks of the same launch, for up to 8 rows, while the others
multiply: they need it last (17 to 64 rows of many outputs likewise, see below). So nothing stands between a product and
what makes x, and its start (the table, scales, first codes: some 3 microseconds), which needs no x, is made while that
runs: in a chain of launches the kernel before lets this one begin before it waits itself (``launch.py``).

**What bounds it** at few rows is not memory. Where outputs are many it is the load/store unit: of some 12 turns that
256 weights cost it, 8 are that table's. So some of the weights go another way: the 16 values that a scale allows are
rounded into registers, and looked up there by byte permutations, which are three times the instructions. The four
schedulers of a multiprocessor share the unit evenly, so each gets as many outputs. Where outputs are few it is, by
counting, the order of the sum: the turns at products that wait for each other (``docs/log.md``).

**17 to 64 rows of many outputs** have a kernel of their own on Hopper, with its wide instruction
(``nf4_wide_cuda.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from pronghorn.kernels import launch
from pronghorn.kernels.few_rows import MEMBERS, check_aligned, check_member, output
from pronghorn.kernels.reference import nf4_matmul as reference
from pronghorn.kernels.reference.nf4_matmul import Member, NF4Weight

__all__ = [
    "LOW_ROWS",
    "MAX_ROWS",
    "Member",
    "NF4Weight",
    "low_rank_aligned",
    "makes_low",
    "nf4_matmul",
    "rows_by_codes",
    "why_not",
]

MAX_ROWS = 64
"""Rows of x up to which this is the faster way; above, make the weight and call cuBLAS."""

LOW_ROWS = 8
"""Up to so many rows, those of the least tile, ``nf4_matmul.cu`` can make ``x A^T`` itself; see :func:`makes_low`."""

_ROWS_BY_CODES = 32  # measured at 28,672 outputs
_COLUMNS = 256  # inputs that are made into operands at a time, at most


def rows_by_codes(members: Sequence[Member]) -> int:
    """Rows up to which many outputs of ``members`` are read by codes where weights in 16 bits are there, too: 32, or,
    where Hopper's wide instruction takes them, 64.
    """
    if not launch.has_copy_engine(members[0].weight.codes):
        return _ROWS_BY_CODES
    from pronghorn.kernels import nf4_wide_cuda

    return _ROWS_BY_CODES if nf4_wide_cuda.tile_of(MAX_ROWS, members) is None else MAX_ROWS


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; CUDA's compiler is imported only where it is used."""
    if not tensor.is_cuda:
        return reference
    from pronghorn.kernels import nf4_matmul_cuda

    return nf4_matmul_cuda


def why_not(weights: Sequence[NF4Weight], dtype: torch.dtype, device: torch.device, ranks: Sequence[int] = ()) -> str:
    """In words, why a group of these weights cannot take this path on ``device``; empty where it can."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype} in place of bfloat16 or float16"
    if not 1 <= len(weights) <= MEMBERS:
        return f"{len(weights)} projections in a group of up to {MEMBERS}"
    if device.type == "cuda" and (torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0)):
        return "a GPU older than compute capability 8.0"
    for w in weights:
        if len(w.shape) != 2 or w.shape[1] % _COLUMNS or w.shape[1] != weights[0].shape[1]:
            return f"a weight of {tuple(w.shape)}: inputs in multiples of {_COLUMNS}"
        if not w.tiled:
            return f"a weight of {tuple(w.shape)} whose codes lie row by row: outputs in multiples of 8, held in tiles"
        nested = w.nested_absmax is not None
        if w.blocksize != 64 or (nested and w.nested_blocksize != 256):
            return f"blocks of {w.blocksize} weights and {w.nested_blocksize} scales in place of 64 and 256"
        if nested != (weights[0].nested_absmax is not None):
            return "single and double quantization in one group"
    if any(rank % 16 for rank in ranks):
        return f"adapters of rank {max(rank for rank in ranks if rank % 16)}, no multiple of 16"
    if device.type == "cuda":
        from pronghorn.kernels.cuda_source import shared_memory
        from pronghorn.kernels.nf4_matmul_cuda import tile_for

        outputs, K, nested = sum(w.shape[0] for w in weights), weights[0].shape[1], weights[0].nested_absmax is not None
        if tile_for(MAX_ROWS, outputs, K, nested, shared_memory(device)) is None:
            return f"{K} inputs in {shared_memory(device)} bytes of shared memory"
    return ""


def nf4_matmul(
    x_MI: torch.Tensor,
    members: Sequence[Member],
    low_MR: torch.Tensor | None = None,
    out_MO: torch.Tensor | None = None,
    overlap: bool = False,
    a_RI: torch.Tensor | None = None,
) -> torch.Tensor:
    """Outputs of all ``members`` side by side; no gradient.

    Args:
        x_MI: ``[M, I]``, bfloat16 or float16 (on the CPU any float dtype), rows contiguous and 16-byte aligned.
        members: one to three projections of this input.
        low_MR: ``x A^T`` of all adapters side by side, in x's dtype; None without adapters.
        out_MO: ``[M, sum of O]``, x's dtype, rows contiguous, to write to.
        overlap: the kernel launched just before makes ``low_MR`` and nothing else that is read here: a GPU that can
            runs the two beside each other.
        a_RI: the adapters' A, one under another, x's dtype, contiguous, where :func:`makes_low`: ``low_MR`` is made of
            it here, beside the product, as :func:`pronghorn.kernels.low_rank.low_rank` makes it. It has whole
            steps of 16 columns then, and those beyond R are numbers, which meet zeros of B.

    Returns:
        ``y_MO`` in x's dtype: products, adapter and bias summed in float32 and rounded once.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit; the text says which.
    """
    out_MO = output(x_MI, sum(member.weight.shape[0] for member in members), out_MO)
    _check(x_MI, members, low_MR)
    if a_RI is not None:
        _check_low(x_MI, members, a_RI, low_MR)
    if (a_RI is None or x_MI.shape[0] > LOW_ROWS) and launch.has_copy_engine(x_MI):
        from pronghorn.kernels import nf4_wide_cuda

        tile = nf4_wide_cuda.chosen(x_MI, members, low_MR, out_MO)
        if tile is not None:
            nf4_wide_cuda.nf4_wide(x_MI, members, low_MR, out_MO, tile, overlap, a_RI)
            return out_MO
        if a_RI is not None:
            raise ValueError(
                f"x A^T of {x_MI.shape[0]} rows with x, low or out not aligned; align their rows to 16 bytes"
            )
    _path(x_MI).nf4_matmul(x_MI, members, low_MR, out_MO, overlap=overlap, a_RI=a_RI)
    return out_MO


def makes_low(rows: int, members: Sequence[Member], a_RI: torch.Tensor) -> bool:
    """Whether a product of so many rows can be given ``a_RI``: up to :data:`LOW_ROWS`, and more where Hopper's wide
    instruction takes them.
    """
    if rows <= LOW_ROWS:
        return low_rank_aligned(a_RI)
    if not launch.has_copy_engine(members[0].weight.codes):
        return False
    from pronghorn.kernels import nf4_wide_cuda

    tile = nf4_wide_cuda.tile_of(rows, members)
    return tile is not None and nf4_wide_cuda.makes_low(tile, members, a_RI)


def low_rank_aligned(a_RI: torch.Tensor) -> bool:
    """Whether the kernel can read ``a_RI``, 16 bytes at a time."""
    return not a_RI.is_cuda or a_RI.data_ptr() % 16 == 0


def _check_low(x_MI: torch.Tensor, members: Sequence[Member], a_RI: torch.Tensor, low_MR: torch.Tensor | None) -> None:
    M, I = x_MI.shape  # noqa: E741 - shape letters
    if M > LOW_ROWS and not makes_low(M, members, a_RI):
        raise ValueError(
            f"x A^T of {M} rows; give a_RI for up to {LOW_ROWS} or where `makes_low` says so, or low_MR alone"
        )
    if a_RI.dim() != 2 or a_RI.shape[1] != I or a_RI.dtype != x_MI.dtype or not a_RI.is_contiguous():
        raise ValueError(f"a is {tuple(a_RI.shape)}, {a_RI.dtype}; give [R, {I}], {x_MI.dtype}, contiguous")
    if not low_rank_aligned(a_RI):
        raise ValueError(f"a lies at {a_RI.data_ptr()}; align it to 16 bytes")
    columns = -(-a_RI.shape[0] // 16) * 16
    if low_MR is None or low_MR.shape != (M, columns) or low_MR.stride(1) != 1 or low_MR.dtype != x_MI.dtype:
        found = None if low_MR is None else (tuple(low_MR.shape), low_MR.dtype)
        raise ValueError(f"low is {found}; give {(M, columns)}, {x_MI.dtype}, to write to")
    if not x_MI.device == a_RI.device == low_MR.device:
        raise ValueError(f"x is on {x_MI.device}, a on {a_RI.device} and low on {low_MR.device}; give all on one")


def _check(x_MI: torch.Tensor, members: Sequence[Member], low_MR: torch.Tensor | None) -> None:
    for m in members:
        check_member(x_MI, m.weight.shape, m, low_MR)
    if x_MI.is_cuda:
        ranks = [m.rank for m in members]
        reason = why_not([m.weight for m in members], x_MI.dtype, x_MI.device, ranks)
        if reason:
            raise ValueError(f"{reason}; dequantize and multiply instead")
        check_aligned(x_MI)
        for m in members:
            codes, scales = m.weight.codes.data_ptr(), m.weight.scales.data_ptr()
            if codes % 8 or scales % 16:
                raise ValueError(f"codes lie at {codes} and scales at {scales}; align them to 8 and 16 bytes")
