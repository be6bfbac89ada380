r"""A decode step's attention in one launch: rotation, the write of the new keys and values, attention, merging.

What :func:`pronghorn.kernels.rope_kv.rope_and_write_kv` and
:func:`pronghorn.kernels.decode_attention.decode_attention` do one after the other, to the bit: the order of operations
is that of :mod:`pronghorn.kernels.ordered_attention`. There it is three launches, each of which begins when the one
before has ended and waits for memory more than once; with few rows that is all of their time.

**How.** Few rows (``step_attention.cu``): a block has one segment's keys and values in shared memory, and asks for
those of earlier tokens before the projections that make the new one have ended. The new token goes from its projection
into shared memory and into the cache. Scores, maxima and exponentials of a segment's tiles do not depend on each other
and are taken at once; the sums go from tile to tile. Of a row of several segments the block that ends last merges all
of them, in their order.

More rows, or long ones (``step_attention_many.cu``): two blocks for each multiprocessor share all tiles of all rows,
and each goes from its tiles of one row to those of the next, two of them on their way while it computes a third. Shapes
that suit neither take the two operations.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pronghorn.kernels.decode_attention import check_counts, check_workspace, decode_attention
from pronghorn.kernels.ordered_attention import check_output
from pronghorn.kernels.reference import step_attention as reference
from pronghorn.kernels.rope_kv import check_rows, rope_and_write_kv


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor`` in one launch."""
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return reference
    from pronghorn.kernels import step_attention_cuda

    return step_attention_cuda


def step_attention(
    q_BHE: torch.Tensor,
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    cos_PE: torch.Tensor,
    sin_PE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_BN: torch.Tensor,
    positions_B: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    workspace: torch.Tensor | None = None,
    out_BHE: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate q and k to each row's last position, store k and v there, and attend from it to all of the row's tokens.

    One launch is CUDA C++, compiled by the NVRTC that comes with torch (``cuda_source.py``).

    Inside :func:`pronghorn.kernels.launch.chained` the lengths, the tables, the angles and the tokens before the last
    are read before the kernels launched before this one have ended: they have to be older than the chain.

    Args:
        q_BHE, k_BKE, v_BKE: as they come from the projections, see :func:`pronghorn.kernels.rope_kv.rope_and_write_kv`;
            what they hold afterwards is not said.
        cos_PE, sin_PE: see there.
        k_cache, v_cache, block_table_BN: see :func:`pronghorn.kernels.decode_attention.decode_attention`.
        positions_B: int32, the new token's position in its row; -1 for a row that is padding.
        lengths_B: int32, tokens of each row with the new one: ``positions_B + 1``. A row of length 0 (padding)
            gets zeros and stores nothing. A length beyond the tables of blocks or of angles is a caller's error: a CPU
            raises, a GPU stores nothing and attends to what the table holds.
        scale: multiplies scores; above 0.
        workspace: see there.
        out_BHE: see there. It must not overlap q.

    Returns:
        ``[B, H, E]`` in q's dtype, contiguous unless ``out_BHE`` is given.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit; or, on a CPU, a length beyond a table.
    """
    if block_table_BN.ndim != 2:
        raise ValueError(f"block_table is {tuple(block_table_BN.shape)}; give int32 [{q_BHE.shape[0]}, blocks]")
    check_rows(q_BHE, k_BKE, v_BKE, cos_PE, sin_PE, k_cache, v_cache, block_table_BN, positions_B)
    check_counts("lengths", lengths_B, q_BHE.shape[0])
    if scale <= 0:
        raise ValueError(f"scale={scale} is out of range; give one above 0")
    if workspace is not None:
        workspace = check_workspace(workspace, q_BHE, block_table_BN.shape[1] * k_cache.shape[1])
    if out_BHE is not None:
        check_output(out_BHE, q_BHE)
    rows, pages = (q_BHE, k_BKE, v_BKE, cos_PE, sin_PE), (k_cache, v_cache, block_table_BN)
    path = _path(q_BHE)
    given = *rows, *pages, positions_B, lengths_B, scale, workspace, out_BHE
    if path is reference:
        return reference.step_attention(*given)
    way = path.way_of(*rows, *pages[:2], block_table_BN.shape[1] * k_cache.shape[1])
    if isinstance(way, str):
        rope_and_write_kv(*rows, *pages, positions_B)
        return decode_attention(q_BHE, *pages, lengths_B, scale, workspace, out_BHE)
    o_BHE: torch.Tensor = path.step_attention(way, *given)
    return o_BHE
