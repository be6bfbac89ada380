r"""Ordered attention: the softmax over a query's keys with every operation and rounding in one fixed order.

A sampler's decode step, its prefill and the trainer's scoring forward give the same bits for the same query and keys if
they compute the same sums in the same order, whatever stands around them. The order is a function of logical positions
alone. A query at position p of its sequence sees the keys at positions 0 to p, which come in tiles of ``TILE`` and
segments of ``SEGMENT`` keys, counted from position 0. Within a segment an online softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867) in base 2 runs over its tiles in order: from :math:`m = -\infty`, :math:`l = 0`, :math:`a = 0`, a tile
with scores :math:`s = q K^T` and :math:`\sigma = \text{scale} \cdot \log_2 e` gives

.. math:: m' = \max(m, \sigma \max_t s_t), \quad p_t = 2^{\sigma s_t - m'}, \quad
    l' = 2^{m - m'} l + \sum_t \tilde p_t, \quad a' = 2^{m - m'} a + \sum_t \tilde p_t v_t,

:math:`\tilde p` being p rounded to the inputs' dtype. Both sums are products on the tensor core, which adds in the
order of the keys (the first with a matrix of ones). Segments, unnormalised and in float32, are merged one after another
in order:

.. math:: m = \max(m_1, m_2), \quad l = 2^{m_1 - m} l_1 + 2^{m_2 - m} l_2, \quad a = 2^{m_1 - m} a_1 + 2^{m_2 - m} a_2,

and :math:`o = a / l` is rounded once. Tiles and segments without a visible key change no bit, so it does not matter
which queries share a program; a segment can be computed by itself, which is what a decode step does with each
(:mod:`pronghorn.kernels.decode_attention`). ``ordered_step_triton.py`` holds these steps for all kernels.

Equal bits are promised in 16 bits, for finite keys and values, on GPUs whose tensor core adds in the order of the keys
for every shape of product (measured on Hopper). In float32 and on the CPU results are the softmax, to that precision.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pronghorn.kernels.attention import Path, choose
from pronghorn.kernels.ordered_rows import OrderedRows
from pronghorn.kernels.reference import ordered_attention as reference

DTYPES = (torch.bfloat16, torch.float16)


def refusal(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None = None,
    softcap: float | None = None,
) -> str | None:
    """In words why attention of this kind does not run in order; None where it does.

    What flash's backward does not take is refused too: trainer and sampler must answer alike.
    """
    if capability is None:
        return "tensors on the CPU"
    if window is not None or softcap is not None:
        return f"window={window}, softcap={softcap}"
    choice = choose(capability, dtype, head_dim, None)
    return None if choice.path is Path.FLASH else choice.reason


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda or tensor.dtype not in DTYPES:
        return reference
    from pronghorn.kernels import ordered_attention_triton

    return ordered_attention_triton


def ordered_attention_forward(
    q_THE: torch.Tensor,
    k_UKE: torch.Tensor,
    v_UKE: torch.Tensor,
    rows: OrderedRows,
    scale: float,
    out_THE: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(o_THE, lse_HT)`` of packed queries, each over the keys of its row up to its own position.

    Args:
        q_THE: query head h reads kv head ``h // (H // K)``; tokens and heads at any stride. On a GPU the kernel takes
            bfloat16 and float16; anything else runs in plain PyTorch.
        k_UKE, v_UKE: of q's dtype: the packed keys of the same tokens, or a paged cache with its blocks flattened.
        rows: which queries there are, and where the keys of their rows lie. Every query stands in one row.
        scale: multiplies scores; above 0.
        out_THE: where to write o: q's shape and dtype, heads dense, tokens at any stride. None: a new tensor.

    Returns:
        o in q's dtype, contiguous unless ``out_THE`` is given, and the log-sum-exp of each query's scores in nats,
        ``[H, T]`` float32 (float64 for float64): what :func:`pronghorn.kernels.attention.attention_backward` takes.

    Raises:
        ValueError: shapes, dtypes or layouts do not fit.
    """
    (T, H, E), K = q_THE.shape, k_UKE.shape[1]
    if k_UKE.shape != v_UKE.shape or k_UKE.shape[2] != E or H % K:
        raise ValueError(
            f"k is {tuple(k_UKE.shape)} and v {tuple(v_UKE.shape)} for q {(T, H, E)}; give both as [U, K, {E}] with K "
            f"a divisor of {H}"
        )
    if not q_THE.dtype == k_UKE.dtype == v_UKE.dtype:
        raise ValueError(f"q is {q_THE.dtype}, k {k_UKE.dtype} and v {v_UKE.dtype}; give one dtype")
    for name, x in (("q", q_THE), ("k", k_UKE), ("v", v_UKE)):
        if x.stride(2) != 1:
            raise ValueError(f"{name} has strides {x.stride()}; a head's elements must follow each other without a gap")
    if sum(rows.counts) != T:
        raise ValueError(f"rows hold {sum(rows.counts)} queries and q {T}; name every query once")
    if scale <= 0:
        raise ValueError(f"scale={scale} is out of range; give one above 0")
    if out_THE is None:
        out_THE = torch.empty((T, H, E), dtype=q_THE.dtype, device=q_THE.device)
    check_output(out_THE, q_THE)
    lse_HT: torch.Tensor = _path(q_THE).ordered_attention_forward(q_THE, k_UKE, v_UKE, rows, scale, out_THE)
    return out_THE, lse_HT


def tile_queries(H: int, K: int, E: int, device: torch.device) -> int:
    """Queries that a tile of :meth:`OrderedRows.tiles` has for such heads; on the CPU, which reads none, an H200's."""
    from pronghorn.kernels.ordered_attention_triton import launch_config, tile_rows

    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)
    return tile_rows(launch_config(E, capability), H // K) // (H // K)


def check_output(out: torch.Tensor, q: torch.Tensor) -> None:
    """Raise where attention of ``q`` ``[rows, H, E]`` cannot be written to ``out``."""
    H, E = q.shape[1:]
    dense = out.shape[1:].numel() == 0 or (out.stride(2) == 1 and (H == 1 or out.stride(1) == E))
    if out.shape != q.shape or out.dtype != q.dtype or not dense:
        raise ValueError(
            f"out is {out.dtype} {tuple(out.shape)} with strides {out.stride()}; give {q.dtype} {tuple(q.shape)}, "
            "a row's heads one after another"
        )
