r"""A group's product with its adapters for some rows, ``x A^T`` included, in one launch.

.. math:: y = [x \mid x A^T] \, [W \mid s B]^T

Weights in 16 bits with the adapters' B beside them, and x with room for ``x A^T`` beside it, are tables; a decode step
of 17 to 256 rows multiplies them. ``x A^T`` is summed as ``low_rank.py`` says and rounded to x's dtype; an output is
one float32 sum over the table's columns in order, 16 products of the tensor core at a time, rounded once: the bits of
``low_rank`` and ``ordered_matmul``, one behind the other. How, and why it is faster: ``adapted_matmul_cuda.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch

from pronghorn.kernels import adapted_matmul_cuda, launch
from pronghorn.kernels.adapted_matmul_cuda import Coded, eighths_for, tile_for
from pronghorn.kernels.cuda_source import processors_of
from pronghorn.kernels.low_blocks import MOST_RANKS, MOST_ROWS
from pronghorn.kernels.reference import adapted_matmul as reference
from pronghorn.kernels.reference.nf4 import dequantize_scales
from pronghorn.kernels.reference.nf4_matmul import NF4Weight

__all__ = ["LEAST_ROWS", "MOST_ROWS", "Coded", "adapted_matmul", "coded_bytes", "coded_of", "takes"]

LEAST_ROWS = 17
"""Rows from which on this is meant to be the faster way."""


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``."""
    return adapted_matmul_cuda if tensor.is_cuda else reference


def takes(rows: int, weight_OK: torch.Tensor, a_RI: torch.Tensor | None) -> bool:
    """Whether this is meant to be the fastest way on the weight's GPU, and can be gone: Hopper's alone."""
    if a_RI is None or not LEAST_ROWS <= rows <= MOST_ROWS or not launch.has_copy_engine(weight_OK):
        return False
    return (
        not why_not(weight_OK, a_RI) and tile_for(rows, weight_OK.shape[0], processors_of(weight_OK.device)) is not None
    )


def coded_of(weights: Sequence[NF4Weight], eighths: int | None = None) -> Coded | None:
    """A part of NF4 weights, one under another, as :func:`adapted_matmul` can read it: 9/16 of a byte a weight of that
    part. None where the codes do not lie in tiles, or 16 bits are as fast.

    ``eighths``: how many of eight steps of 128 columns, for tests and measurements.
    """
    if not weights or not all(map(_in_tiles, weights)):
        return None
    I = weights[0].shape[1]  # noqa: E741 - a shape letter
    if eighths is None:
        eighths = eighths_for(sum(w.shape[0] for w in weights), I, processors_of(weights[0].codes.device))
    steps = [n for n in range(I // 128) if n * eighths // 8 != (n + 1) * eighths // 8]
    if not steps:
        return None
    parts = []
    for w in weights:
        eights = w.shape[0] // 8
        scales = dequantize_scales(w.scales, w.nested_absmax, w.offset, w.nested_code, w.nested_blocksize)
        scales = scales.view(eights, 8, I // 128, 2).permute(2, 0, 3, 1)[steps].contiguous()  # [S, O / 8, 2, 8]
        codes = w.codes.view(eights, I // 128, 512).transpose(0, 1)[steps]
        parts.append(torch.cat((codes, scales.view(torch.uint8).flatten(2)), dim=2))
    return Coded(torch.cat(parts, dim=1).contiguous(), eighths)


def coded_bytes(outputs: int, inputs: int, like: torch.Tensor) -> int:
    """At most so many does :func:`coded_of` keep of a weight on ``like``'s device."""
    if not launch.has_copy_engine(like):
        return 0
    eighths = eighths_for(outputs, inputs, processors_of(like.device))
    return inputs // 128 * eighths // 8 * (outputs // 8) * 576


def _in_tiles(weight: NF4Weight) -> bool:
    O, I = weight.shape  # noqa: E741 - shape letters
    whole = O % 8 == 0 and I % 128 == 0 and weight.blocksize == 64
    return whole and weight.tiled


def why_not(weight_OK: torch.Tensor, a_RI: torch.Tensor) -> str:
    """In words, why a group cannot take this path on a GPU; empty where it can."""
    if weight_OK.dtype not in (torch.bfloat16, torch.float16) or a_RI.dtype != weight_OK.dtype:
        return f"a weight in {weight_OK.dtype} and A in {a_RI.dtype} in place of bfloat16 or float16"
    if a_RI.shape[0] > MOST_RANKS or a_RI.shape[0] % 2 or a_RI.shape[1] % 64:
        return f"{a_RI.shape[0]} ranks of {a_RI.shape[1]} inputs: up to {MOST_RANKS}, even, of a multiple of 64"
    if weight_OK.shape[0] % 2 or weight_OK.shape[1] % 64:
        return f"a weight of {tuple(weight_OK.shape)}: an even number of outputs, columns in whole 64"
    return _misplaced(weight_OK, "the weight", 16) or _misplaced(a_RI, "a", 16)


def _misplaced(tensor: torch.Tensor, name: str, bytes_: int) -> str:
    """In words, what is wrong with where a matrix of 16-bit numbers lies; empty where its rows are aligned."""
    if tensor.stride(1) == 1 and tensor.stride(0) * 2 % bytes_ == 0 and tensor.data_ptr() % bytes_ == 0:
        return ""
    return f"{name} at {tensor.data_ptr()} with strides {tensor.stride()}: contiguous rows aligned to {bytes_} bytes"


def adapted_matmul(
    table_TK: torch.Tensor,
    rows: int,
    weight_OK: torch.Tensor,
    a_RI: torch.Tensor,
    out_MO: torch.Tensor | None = None,
    coded: Coded | None = None,
) -> torch.Tensor:
    """The product of a table's first rows; no gradient.

    Args:
        table_TK: ``[T, K]``, T at least ``rows``: x in the first I columns, behind them room for ``x A^T``, which is
            written, and zeros. Rows contiguous and aligned to 16 bytes; of rows beyond, whole 64 are read.
        rows: M.
        weight_OK: ``[O, K]``, x's dtype: W, s B, and zeros.
        a_RI: A of all adapters, one under another, contiguous, x's dtype.
        out_MO: x's dtype, rows contiguous, to write to.
        coded: what W was made of, from :func:`coded_of`: up to 64 rows a part of it is read as codes then.

    Returns:
        ``y_MO`` in x's dtype.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit; the text says which.
    """
    (T, K), (R, inputs), O = table_TK.shape, a_RI.shape, weight_OK.shape[0]  # noqa: E741 - shape letters
    if not 0 < rows <= T or weight_OK.shape[1] != K or inputs + R > K:
        raise ValueError(
            f"{rows} rows of a table of {(T, K)}, a weight of {tuple(weight_OK.shape)} and A of {(R, inputs)}; give "
            "up to T rows, a weight with the table's columns, and I + R of them at most"
        )
    if out_MO is None:
        out_MO = table_TK.new_empty(rows, O)
    if {weight_OK.dtype, a_RI.dtype, out_MO.dtype} != {table_TK.dtype} or out_MO.shape != (rows, O):
        raise ValueError(
            f"weight, a and out are {weight_OK.dtype}, {a_RI.dtype} and {out_MO.dtype} of {tuple(out_MO.shape)}; give "
            f"the table's {table_TK.dtype}, and {(rows, O)}"
        )
    if table_TK.is_cuda:
        reason = why_not(weight_OK, a_RI) or _misplaced(table_TK, "the table", 16) or _misplaced(out_MO, "out", 4)
        if reason or rows > MOST_ROWS:
            raise ValueError(
                f"{reason or f'{rows} rows in place of up to {MOST_ROWS}'}; multiply with low_rank and ordered_matmul "
                "instead"
            )
    if coded is not None:
        expected = inputs // 128 * coded.eighths // 8, O // 8, 576
        if coded.packed.shape != expected or coded.packed.device != table_TK.device:
            raise ValueError(
                f"coded is {tuple(coded.packed.shape)} on {coded.packed.device}; give {expected}, what `coded_of` made "
                f"of this weight, on {table_TK.device}"
            )
    _path(table_TK).adapted_matmul(table_TK, rows, weight_OK, a_RI, out_MO, coded)
    return out_MO
