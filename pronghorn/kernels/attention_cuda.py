"""The attention kernels of torch and cuDNN, called outside autograd with the log-sum-exps in hand."""

from __future__ import annotations

import torch

from pronghorn.kernels import attention
from pronghorn.kernels.spans import Spans

aten = torch.ops.aten


def _window(spans: Spans) -> dict[str, int]:
    """A query sees itself and the ``window - 1`` keys before it."""
    return {} if spans.window is None else {"window_size_left": spans.window - 1, "window_size_right": 0}


def _lengths(spans: Spans) -> tuple[int, int]:
    # For spans of one query each, torch's varlen forward swaps heads and queries and returns lse in another layout; the
    # longest length is a bound, and 2 bounds 1.
    return max(spans.max_q, 2), max(spans.max_k, 2)


def flash_forward(
    q_THE: torch.Tensor, k_UKE: torch.Tensor, v_UKE: torch.Tensor, spans: Spans, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(o_THE, lse_HT)`` by varlen flash; grouped heads as they are."""
    o_THE, lse_HT, *_ = aten._flash_attention_forward(
        q_THE, k_UKE, v_UKE, spans.cu_q, spans.cu_k, *_lengths(spans), 0.0, spans.causal, False,
        scale=scale, **_window(spans),
    )  # fmt: skip
    return o_THE, lse_HT


def flash_backward(
    do_THE: torch.Tensor,
    q_THE: torch.Tensor,
    k_UKE: torch.Tensor,
    v_UKE: torch.Tensor,
    o_THE: torch.Tensor,
    lse_HT: torch.Tensor,
    spans: Spans,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq_THE, dk_UKE, dv_UKE)`` by varlen flash."""
    do_THE = do_THE.contiguous()
    unused = lse_HT.new_empty(0)
    seed = torch.empty(2, dtype=torch.uint64, device=lse_HT.device)  # of a dropout that there is not
    dq_THE, dk_UKE, dv_UKE = aten._flash_attention_backward(
        do_THE, q_THE, k_UKE, v_UKE, o_THE, lse_HT, spans.cu_q, spans.cu_k, *_lengths(spans), 0.0, spans.causal,
        seed, unused, scale=scale, **_window(spans),
    )  # fmt: skip
    return dq_THE, dk_UKE, dv_UKE


def _rows(x_THE: torch.Tensor, spans: Spans) -> torch.Tensor:
    """``[T, H, E]`` as ``[B, H, S, E]``, without a copy."""
    return x_THE.view(-1, spans.max_q, *x_THE.shape[1:]).transpose(1, 2)


def _packed(x_BHSE: torch.Tensor) -> torch.Tensor:
    """The inverse; no copy, as cuDNN answers in its input's layout."""
    return x_BHSE.transpose(1, 2).flatten(0, 1)


def _heads(x_BKSE: torch.Tensor, H: int) -> torch.Tensor:
    K = x_BKSE.shape[1]
    if K == H or attention.CUDNN_TAKES_GROUPED_HEADS:
        return x_BKSE
    return x_BKSE.repeat_interleave(H // K, dim=1)


def cudnn_forward(
    q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, spans: Spans, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(o_THE, lse_BHS1)`` by cuDNN, rows of one length, each causal within itself."""
    H = q_THE.shape[1]
    q, k, v = (_rows(t, spans) for t in (q_THE, k_TKE, v_TKE))
    o, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        q, _heads(k, H), _heads(v, H), None, True, 0.0, True, False, scale=scale
    )
    return _packed(o), lse


def cudnn_backward(
    do_THE: torch.Tensor,
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    v_TKE: torch.Tensor,
    o_THE: torch.Tensor,
    lse_BHS1: torch.Tensor,
    spans: Spans,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq_THE, dk_TKE, dv_TKE)`` by cuDNN."""
    H, K, S = q_THE.shape[1], k_TKE.shape[1], spans.max_q
    do, q, k, v, o = (_rows(t, spans) for t in (do_THE.contiguous(), q_THE, k_TKE, v_TKE, o_THE))
    seed = torch.zeros((), dtype=torch.int64, device=lse_BHS1.device)  # of a dropout that there is not
    dq, *dkv = aten._scaled_dot_product_cudnn_attention_backward(
        do, q, _heads(k, H), _heads(v, H), o, lse_BHS1, seed, seed, None, None, None, S, S, 0.0, True, scale=scale
    )
    dk, dv = (_packed(t if t.shape[1] == K else t.unflatten(1, (K, -1)).sum(2)) for t in dkv)
    return _packed(dq), dk, dv
