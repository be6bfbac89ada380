r"""Attention over spans in plain PyTorch, forward and backward: what every other path is checked by.

With :math:`S = \text{scale} \, QK^T` (after the softcap :math:`S = c \tanh(S / c)`, where there is one) and -inf where
a query does not see a key,

.. math:: \ell = \log \sum_j \exp S_j, \qquad P = \exp(S - \ell), \qquad O = PV.

Backward keeps :math:`\ell` alone (FlashAttention-2, arXiv:2307.08691, section 2.3). :math:`O = PV` gives
:math:`dV = P^T dO` and :math:`dP = dO V^T`; the softmax's Jacobian is :math:`\text{diag}(P) - P P^T`, so

.. math:: dS = P \circ (dP - D), \qquad D = \sum_j P_j dP_j = \sum_e dO_e O_e,

the second form of D needing neither P nor dP whole. Then :math:`dQ = \text{scale} \, dS K` and
:math:`dK = \text{scale} \, dS^T Q`; a softcap puts :math:`1 - \tanh^2` on dS.

Spans are padded on the right to the longest. A padded query is never read back, and with dO = 0 gives no gradient; a
padded key is hidden from real queries by causality, else by a mask. Queries are taken in chunks, so that scores take
little memory. Sums are float32 (float64 for float64).
"""

from __future__ import annotations

import torch

from pronghorn.kernels.spans import Spans, on_device

SCORES = 1 << 26
"""Scores that exist at once, at most (256 MiB in float32), as long as one query of each span and head fits."""


def _chunk(spans: Spans, heads: int) -> int:
    return max(1, SCORES // (len(spans.q_lengths) * heads * spans.max_k))


def _spread(x_THE: torch.Tensor, slots: torch.Tensor | None, rows: int, longest: int, K: int) -> torch.Tensor:
    """``[T, H, E]`` to ``[B, K, R, S, E]`` (R = H / K heads share a kv head) in the dtype that sums are made in."""
    x_THE = x_THE.to(torch.promote_types(x_THE.dtype, torch.float32))
    heads, dim = x_THE.shape[1:]
    if slots is not None:
        x_THE = x_THE.new_zeros(rows * longest, heads, dim).index_copy_(0, slots, x_THE)
    return x_THE.view(rows, longest, K, heads // K, dim).permute(0, 2, 3, 1, 4)


def _packed(x_BKRSE: torch.Tensor, slots: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The inverse of :func:`_spread`, in ``dtype``."""
    B, K, R, S, E = x_BKRSE.shape
    x_THE = x_BKRSE.permute(0, 3, 1, 2, 4).reshape(B * S, K * R, E)
    return (x_THE if slots is None else x_THE.index_select(0, slots)).to(dtype)


def _scores(
    q_BKRcE: torch.Tensor, k_BKSE: torch.Tensor, spans: Spans, start: int, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``[B, K, R, c, S]`` scores of the queries from ``start`` on, -inf where hidden; the slope of the softcap."""
    B, K, R, c, E = q_BKRcE.shape
    S = k_BKSE.shape[2]
    s = (q_BKRcE.reshape(B, K, R * c, E) @ k_BKSE.mT).view(B, K, R, c, S) * scale
    slope = None
    if softcap is not None:
        tanh = torch.tanh(s / softcap)
        s, slope = tanh * softcap, 1 - tanh.square()
    key = torch.arange(S, device=s.device)
    if spans.causal:
        query = torch.arange(start, start + c, device=s.device)[:, None]
        hidden = key > query
        if spans.window is not None:
            hidden |= key <= query - spans.window
        s.masked_fill_(hidden, float("-inf"))
    elif spans.k_slots is not None:
        lengths = on_device(spans.k_lengths, torch.int64, s.device)
        s.masked_fill_((key >= lengths[:, None])[:, None, None, None], float("-inf"))
    return s, slope


def attention_forward(
    q_THE: torch.Tensor,
    k_UKE: torch.Tensor,
    v_UKE: torch.Tensor,
    spans: Spans,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(o_THE, lse_HT)`` of T queries over U keys: o in q's dtype, lse in nats, float32 (float64 for float64)."""
    H, K, rows = q_THE.shape[1], k_UKE.shape[1], len(spans.q_lengths)
    q = _spread(q_THE, spans.q_slots, rows, spans.max_q, K)
    k, v = (_spread(t, spans.k_slots, rows, spans.max_k, K)[:, :, 0] for t in (k_UKE, v_UKE))
    o = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1])
    step = _chunk(spans, H)
    for start in range(0, spans.max_q, step):
        stop = min(start + step, spans.max_q)
        seen = stop if spans.causal else spans.max_k
        s, _ = _scores(q[:, :, :, start:stop], k[:, :, :seen], spans, start, scale, softcap)
        lse[..., start:stop] = torch.logsumexp(s, -1)
        p = s.sub_(lse[..., start:stop, None]).exp_()
        o[:, :, :, start:stop] = (p.flatten(2, 3) @ v[:, :, :seen]).view_as(o[:, :, :, start:stop])
    lse_TH = _packed(lse[..., None], spans.q_slots, lse.dtype)[..., 0]
    return _packed(o, spans.q_slots, q_THE.dtype), lse_TH.t().contiguous()


def attention_backward(
    do_THE: torch.Tensor,
    q_THE: torch.Tensor,
    k_UKE: torch.Tensor,
    v_UKE: torch.Tensor,
    o_THE: torch.Tensor,
    lse_HT: torch.Tensor,
    spans: Spans,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq_THE, dk_UKE, dv_UKE)`` in the inputs' dtypes.

    ``o_THE`` and ``lse_HT`` may be those of a softmax over more keys than the spans hold; the gradients are then this
    part's share of it.
    """
    H, K, rows = q_THE.shape[1], k_UKE.shape[1], len(spans.q_lengths)
    q, o, do = (_spread(t, spans.q_slots, rows, spans.max_q, K) for t in (q_THE, o_THE, do_THE))
    k, v = (_spread(t, spans.k_slots, rows, spans.max_k, K)[:, :, 0] for t in (k_UKE, v_UKE))
    lse = _spread(lse_HT.t()[..., None], spans.q_slots, rows, spans.max_q, K)
    delta = (o * do).sum(-1, keepdim=True)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    step = _chunk(spans, H)
    for start in range(0, spans.max_q, step):
        stop = min(start + step, spans.max_q)
        seen = stop if spans.causal else spans.max_k
        rows_q, rows_do = q[:, :, :, start:stop], do[:, :, :, start:stop].flatten(2, 3)
        s, slope = _scores(rows_q, k[:, :, :seen], spans, start, scale, softcap)
        p = s.sub_(lse[:, :, :, start:stop]).exp_()
        dv[:, :, :seen] += p.flatten(2, 3).mT @ rows_do
        ds = (rows_do @ v[:, :, :seen].mT).view_as(p).sub_(delta[:, :, :, start:stop]).mul_(p)
        if slope is not None:
            ds.mul_(slope)
        flat = ds.flatten(2, 3)
        dq[:, :, :, start:stop] = (flat @ k[:, :, :seen]).view_as(rows_q) * scale
        dk[:, :, :seen] += (flat.mT @ rows_q.flatten(2, 3)) * scale
    dq_THE = _packed(dq, spans.q_slots, q_THE.dtype)
    dk_UKE = _packed(dk[:, :, None], spans.k_slots, k_UKE.dtype)
    return dq_THE, dk_UKE, _packed(dv[:, :, None], spans.k_slots, v_UKE.dtype)
