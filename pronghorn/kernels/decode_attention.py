r"""Decode attention: one query token a row against a paged cache of keys and values, and the write of that token's own.

With a query :math:`q`, keys :math:`k_t` and values :math:`v_t` of the row's n cached tokens (its own included),

.. math:: o = \sum_t \frac{e^{s_t - m}}{l} v_t, \qquad s_t = \sigma \, q \cdot k_t, \quad m = \max_t s_t, \quad
    l = \sum_t e^{s_t - m},

in the order of operations that :mod:`pronghorn.kernels.ordered_attention` defines, so that the bits are those that its
kernel gives for the same query among the rows of a training batch or a prefill.

A decode step reads every key and value once and does little else, so what counts is that all of the GPU reads. The
H / K query heads of a kv head are one program, which reads its keys once for all of them (Ainslie et al. 2023,
arXiv:2305.13245), and each segment of a row's tokens goes to a program of its own (Flash-Decoding, Dao et al. 2023); a
second small kernel merges the segments of the rows that have several.

Nothing is decided on the host: lengths, positions and block tables are read on the GPU, and the grid depends on the
tensors' shapes alone, so that a CUDA graph captured once serves every step.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pronghorn.kernels.ordered_attention import check_output
from pronghorn.kernels.ordered_rows import SEGMENT
from pronghorn.kernels.reference import decode_attention as reference


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return reference
    from pronghorn.kernels import decode_attention_triton

    return decode_attention_triton


def workspace_elements(rows: int, table_tokens: int, H: int, E: int) -> int:
    """float32 elements that :func:`decode_attention` needs for ``rows`` tables of ``table_tokens`` tokens; 0 for one
    segment.
    """
    segments = -(-table_tokens // SEGMENT)
    return rows * segments * H * (E + 2) if segments > 1 else 0


def check_workspace(workspace: torch.Tensor, q_BHE: torch.Tensor, table_tokens: int) -> torch.Tensor:
    """``workspace``, flat; raises where it does not serve these rows."""
    B, H, E = q_BHE.shape
    needed = workspace_elements(B, table_tokens, H, E)
    if workspace.dtype != torch.float32 or not workspace.is_contiguous() or workspace.numel() < needed:
        raise ValueError(
            f"workspace is {workspace.dtype} {tuple(workspace.shape)}; give {needed} float32 elements without a gap"
        )
    return workspace.flatten()


def decode_attention(
    q_BHE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_BN: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    workspace: torch.Tensor | None = None,
    out_BHE: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend from one token a row to the tokens of its blocks; query head h reads kv head ``h // (H // K)``.

    Args:
        q_BHE: float32, float16 or bfloat16 (float64 in plain PyTorch); heads dense, rows at any stride.
        k_cache, v_cache: ``[num_blocks, block_size, K, E]``, contiguous, of q's dtype.
        block_table_BN: int32, rows at any stride, so the first columns of a wider table do. Token t of row b is at
            offset ``t % block_size`` of block ``block_table[b, t // block_size]``; entries past a row's last token are
            not used.
        lengths_B: int32, tokens in the cache of each row, the one that asks included. A row of length 0 (padding) gets
            zeros. A length beyond the table is a caller's error, which a GPU cannot raise without waiting for it: the
            tokens of the table are attended to, and nothing outside of it is read. On a CPU it raises.
        scale: multiplies scores; above 0.
        workspace: float32, contiguous, of at least :func:`workspace_elements`; overwritten. None: made for the call.
        out_BHE: where to write, of q's shape and dtype, heads dense, rows at any stride. None: a new tensor.

    Returns:
        ``[B, H, E]`` in q's dtype, contiguous unless ``out_BHE`` is given; scores, softmax and sums are float32. What
        unused slots of the cache hold, NaN included, has no effect.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit; or, on a CPU, a length beyond the table.
    """
    B, H, E = q_BHE.shape
    check_cache(q_BHE, "q", k_cache, v_cache, block_table_BN)
    K = k_cache.shape[2]
    if H % K:
        raise ValueError(f"{H} query heads are no multiple of {K} kv heads; give a whole number for each")
    check_counts("lengths", lengths_B, B)
    if scale <= 0:
        raise ValueError(f"scale={scale} is out of range; give one above 0")
    if workspace is not None:
        workspace = check_workspace(workspace, q_BHE, block_table_BN.shape[1] * k_cache.shape[1])
    if out_BHE is not None:
        check_output(out_BHE, q_BHE)
    o_BHE: torch.Tensor = _path(q_BHE).decode_attention(
        q_BHE, k_cache, v_cache, block_table_BN, lengths_B, scale, workspace, out_BHE
    )
    return o_BHE


def write_kv(
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_BN: torch.Tensor,
    positions_B: torch.Tensor,
) -> None:
    """Store one token's keys and values a row, at its position in the blocks of its table.

    Args:
        k_BKE, v_BKE: of the cache's dtype; heads dense, rows at any stride.
        k_cache, v_cache, block_table_BN: see :func:`decode_attention`. No two rows may share a slot.
        positions_B: int32, from 0; a row of position -1 (padding) is left out. A position beyond the table is a
            caller's error: a GPU writes nothing, a CPU raises.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit; or, on a CPU, a position beyond the table.
    """
    B = k_BKE.shape[0]
    if k_BKE.shape != (B, *k_cache.shape[2:]) or v_BKE.shape != k_BKE.shape:
        raise ValueError(
            f"k is {tuple(k_BKE.shape)} and v {tuple(v_BKE.shape)} where a slot of the cache is "
            f"{tuple(k_cache.shape[2:])}; give [B, K, E]"
        )
    check_cache(k_BKE, "k", k_cache, v_cache, block_table_BN)
    check_cache(v_BKE, "v", k_cache, v_cache, block_table_BN)
    check_counts("positions", positions_B, B)
    _path(k_cache).write_kv(k_BKE, v_BKE, k_cache, v_cache, block_table_BN, positions_B)


def check_cache(
    x: torch.Tensor, name: str, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table_BN: torch.Tensor | None
) -> None:
    """Raise where one token a row, the caches and the table, if there is one, do not fit together."""
    B, _, E = x.shape
    if k_cache.ndim != 4 or k_cache.shape != v_cache.shape or k_cache.shape[3] != E:
        raise ValueError(
            f"the caches are {tuple(k_cache.shape)} and {tuple(v_cache.shape)} where {name}'s heads have {E} elements; "
            f"give both as [num_blocks, block_size, K, {E}]"
        )
    if not k_cache.dtype == v_cache.dtype == x.dtype:
        raise ValueError(f"{name} is {x.dtype} and the caches {k_cache.dtype} and {v_cache.dtype}; give one dtype")
    if x.stride(2) != 1 or (x.shape[1] > 1 and x.stride(1) != E):
        raise ValueError(f"{name} has strides {x.stride()}; a row's heads must follow each other without a gap")
    for what, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if not tensor.is_contiguous():
            raise ValueError(f"{what} has strides {tensor.stride()}; make it contiguous")
    if block_table_BN is None:
        return
    if block_table_BN.ndim != 2 or block_table_BN.shape[0] != B or block_table_BN.dtype != torch.int32:
        raise ValueError(
            f"block_table is {block_table_BN.dtype} {tuple(block_table_BN.shape)}; {B} rows need int32 [{B}, blocks]"
        )
    if block_table_BN.shape[1] > 1 and block_table_BN.stride(1) != 1:
        raise ValueError(f"block_table has strides {block_table_BN.stride()}; a row's blocks must follow each other")


def check_counts(name: str, counts_B: torch.Tensor, rows: int) -> None:
    """Raise where lengths or positions are not one int32 a row."""
    if counts_B.shape != (rows,) or counts_B.dtype != torch.int32 or not counts_B.is_contiguous():
        raise ValueError(f"{name} is {counts_B.dtype} {tuple(counts_B.shape)}; {rows} rows need dense int32 [{rows}]")
