"""torch's fused attention for the CPU, called outside autograd: one call for each run of spans of one size."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch

from pronghorn.kernels.spans import Spans

aten = torch.ops.aten


def _runs(spans: Spans) -> Iterator[tuple[int, slice, slice]]:
    """Of neighbouring spans of one size: how many, their queries, their keys."""
    q_at = k_at = 0
    for (n, m), same in groupby(zip(spans.q_lengths, spans.k_lengths)):
        count = sum(1 for _ in same)
        queries, keys = slice(q_at, q_at + count * n), slice(k_at, k_at + count * m)
        yield count, queries, keys
        q_at, k_at = queries.stop, keys.stop


def _rows(x_THE: torch.Tensor, count: int) -> torch.Tensor:
    """``[T, H, E]`` as ``[B, H, S, E]``, without a copy."""
    return x_THE.unflatten(0, (count, -1)).transpose(1, 2)


def attention_forward(
    q_THE: torch.Tensor, k_UKE: torch.Tensor, v_UKE: torch.Tensor, spans: Spans, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(o_THE, lse_HT)``; sums in float32, in float64 for float64."""
    T, H, _ = q_THE.shape
    o_THE = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
    lse_HT = q_THE.new_empty(H, T, dtype=torch.promote_types(q_THE.dtype, torch.float32))
    for count, queries, keys in _runs(spans):
        rows = (_rows(x, count) for x in (q_THE[queries], k_UKE[keys], v_UKE[keys]))
        o, lse_BHS = aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, spans.causal, scale=scale)
        o_THE[queries] = o.transpose(1, 2).flatten(0, 1)
        lse_HT[:, queries] = lse_BHS.transpose(0, 1).flatten(1)
    return o_THE, lse_HT


def attention_backward(
    do_THE: torch.Tensor,
    q_THE: torch.Tensor,
    k_UKE: torch.Tensor,
    v_UKE: torch.Tensor,
    o_THE: torch.Tensor,
    lse_HT: torch.Tensor,
    spans: Spans,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq_THE, dk_UKE, dv_UKE)``."""
    gradients = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THE, k_UKE, v_UKE)]
    do_THE = do_THE.contiguous()
    for count, queries, keys in _runs(spans):
        do, q, o = (_rows(x[queries], count) for x in (do_THE, q_THE, o_THE))
        k, v = (_rows(x[keys], count) for x in (k_UKE, v_UKE))
        lse_BHS = lse_HT[:, queries].unflatten(1, (count, -1)).transpose(0, 1)
        lse_BHS = lse_BHS.transpose(1, 2).contiguous().transpose(1, 2)  # as the forward lays it out
        parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, q, k, v, o, lse_BHS, 0.0, spans.causal, scale=scale
        )
        for whole, part, where in zip(gradients, parts, (queries, keys, keys)):
            whole[where] = part.transpose(1, 2).flatten(0, 1)
    dq_THE, dk_UKE, dv_UKE = gradients
    return dq_THE, dk_UKE, dv_UKE
