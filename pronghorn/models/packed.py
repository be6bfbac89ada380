"""From a padded or already packed ``[B, S]`` batch to T packed tokens, and the labels that each token predicts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

IGNORE = -100
"""The label that transformers and TRL leave out of the loss."""


@dataclass(frozen=True)
class PackedBatch:
    """T real tokens of a batch, rows one after another.

    Attributes:
        input_ids_T: int64 token ids.
        positions_T: int64 position of each token within its row.
        row_lengths: tokens of each row; a row is one sequence, so a packed ``[1, S]`` input gives several.
        targets_T: int64 id that each token predicts, or -100; None without labels.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    row_lengths: list[int]
    targets_T: torch.Tensor | None


def pack(
    input_ids_BS: torch.Tensor,
    attention_mask_BS: torch.Tensor | None = None,
    position_ids_BS: torch.Tensor | None = None,
    labels_BS: torch.Tensor | None = None,
) -> PackedBatch:
    """Drop the padding and find the rows.

    A new row starts at the first real token of each batch row, and wherever ``position_ids`` do not go on by one (how
    TRL and transformers mark packed rows). Labels follow transformers: the token at s predicts ``labels[s + 1]``; the
    last token of a row predicts nothing, so no prediction crosses from one packed row into the next.
    """
    B, S = input_ids_BS.shape
    keep_BS = torch.ones_like(input_ids_BS, dtype=torch.bool) if attention_mask_BS is None else attention_mask_BS.bool()
    if position_ids_BS is None:
        position_ids_BS = (keep_BS.long().cumsum(-1) - 1).clamp(min=0)
    else:
        position_ids_BS = position_ids_BS.expand(B, S)
    keep = keep_BS.reshape(-1).nonzero().squeeze(-1)
    positions_T = position_ids_BS.reshape(-1)[keep]
    batch_row_T = keep // S
    starts_T = torch.ones_like(positions_T, dtype=torch.bool)
    starts_T[1:] = (positions_T[1:] != positions_T[:-1] + 1) | (batch_row_T[1:] != batch_row_T[:-1])
    starts = starts_T.nonzero().squeeze(-1).tolist()
    row_lengths = [b - a for a, b in zip(starts, [*starts[1:], len(keep)])]
    targets_T = None
    if labels_BS is not None:
        own_T = labels_BS.reshape(-1)[keep]
        targets_T = torch.full_like(own_T, IGNORE)
        targets_T[:-1] = torch.where(starts_T[1:], targets_T[:-1], own_T[1:])
    return PackedBatch(input_ids_BS.reshape(-1)[keep], positions_T, row_lengths, targets_T)
