"""Attention of packed queries over keys found by an index, in plain PyTorch: row by row, one softmax each."""

from __future__ import annotations

import torch

from pronghorn.kernels.ordered_rows import OrderedRows


def ordered_attention_forward(
    q_THE: torch.Tensor,
    k_UKE: torch.Tensor,
    v_UKE: torch.Tensor,
    rows: OrderedRows,
    scale: float,
    out_THE: torch.Tensor,
) -> torch.Tensor:
    """See :func:`pronghorn.kernels.ordered_attention.ordered_attention_forward`; sums in the order of torch. It
    writes o to ``out_THE`` and gives the log-sum-exp.
    """
    (T, H, E), K = q_THE.shape, k_UKE.shape[1]
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    lse_HT = q_THE.new_empty(H, T, dtype=wide)
    for start, count, first, offset in zip(rows.starts, rows.counts, rows.firsts, rows.offsets):
        own, length = slice(start, start + count), first + count
        at_S = rows.keys[offset : offset + length].long()
        q_KRnE = q_THE[own].to(wide).view(count, K, H // K, E).permute(1, 2, 0, 3)
        k_K1SE, v_K1SE = (t[at_S].to(wide).transpose(0, 1).unsqueeze(1) for t in (k_UKE, v_UKE))
        hidden_nS = torch.ones(count, length, dtype=torch.bool, device=q_THE.device).triu(first + 1)
        s_KRnS = (q_KRnE @ k_K1SE.mT * scale).masked_fill(hidden_nS, float("-inf"))
        lse_KRn = s_KRnS.logsumexp(-1)
        lse_HT[:, own] = lse_KRn.flatten(0, 1)
        o_KRnE = (s_KRnS - lse_KRn.unsqueeze(-1)).exp() @ v_K1SE
        out_THE[own] = o_KRnE.flatten(0, 1).transpose(0, 1).to(q_THE.dtype)
    return lse_HT
