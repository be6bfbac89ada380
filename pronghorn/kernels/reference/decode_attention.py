"""Decode attention over a paged cache in plain PyTorch."""

from __future__ import annotations

import torch


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
    """See :func:`pronghorn.kernels.decode_attention.decode_attention`; no workspace is used."""
    (B, H, E), N, (_, size, K, _) = q_BHE.shape, block_table_BN.shape[1], k_cache.shape
    within("length", lengths_B - 1, N * size)
    wide = torch.promote_types(q_BHE.dtype, torch.float32)
    hidden_BU = torch.arange(N * size, device=q_BHE.device) >= lengths_B.unsqueeze(1)
    # What lies behind a row's last token is no block number, or a slot that nobody wrote: neither is looked at.
    blocks_BN = block_table_BN.masked_fill(hidden_BU[:, ::size], 0).long()

    def gathered(pages: torch.Tensor) -> torch.Tensor:
        tokens_BUKE = pages[blocks_BN].flatten(1, 2).to(wide)
        return tokens_BUKE.masked_fill(hidden_BU[:, :, None, None], 0.0)

    q_BKRE = q_BHE.reshape(B, K, H // K, E).to(wide)
    scores_BKRU = torch.einsum("bkre,buke->bkru", q_BKRE, gathered(k_cache)) * scale
    probs_BKRU = scores_BKRU.masked_fill(hidden_BU[:, None, None], float("-inf")).softmax(-1)
    probs_BKRU = probs_BKRU.masked_fill((lengths_B < 1)[:, None, None, None], 0.0)
    o_BKRE = torch.einsum("bkru,buke->bkre", probs_BKRU, gathered(v_cache))
    o_BHE = o_BKRE.reshape(B, H, E).to(q_BHE.dtype)
    return o_BHE if out_BHE is None else out_BHE.copy_(o_BHE)


def write_kv(
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_BN: torch.Tensor,
    positions_B: torch.Tensor,
) -> None:
    """See :func:`pronghorn.kernels.decode_attention.write_kv`."""
    size = k_cache.shape[1]
    within("position", positions_B, block_table_BN.shape[1] * size)
    rows = (positions_B >= 0).nonzero().squeeze(1)
    positions = positions_B[rows].long()
    blocks = block_table_BN[rows].gather(1, (positions // size).unsqueeze(1)).squeeze(1)
    slots = blocks.long() * size + positions % size
    k_cache.flatten(0, 1).index_copy_(0, slots, k_BKE[rows])
    v_cache.flatten(0, 1).index_copy_(0, slots, v_BKE[rows])


def within(name: str, positions_B: torch.Tensor, room: int) -> None:
    """A GPU is not waited for: there, the caller is trusted."""
    if positions_B.is_cuda or not positions_B.numel():
        return
    highest = int(positions_B.max())
    if highest >= room:
        raise ValueError(f"a row's {name} reaches position {highest}, and its table holds {room} tokens; add blocks")
