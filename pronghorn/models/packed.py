"""From a padded or already packed ``[B, S]`` batch to T packed tokens, and the labels that each token predicts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..kernels.spans import on_device

IGNORE = -100
"""The label that transformers and TRL leave out of the loss."""


@dataclass(frozen=True)
class PackedBatch:
    """T real tokens of a batch, rows one after another.

    Attributes:
        input_ids_T: int64 token ids.
        positions_T: int64 position of each token within its row.
        row_lengths: tokens of each row; a row is one sequence, so a packed ``[1, S]`` input gives several.
        slots_T: int64 place of each token in the ``[B * S]`` of the batch.
        targets_T: int64 id that each token predicts, or -100; None without labels.
        scored_N: int64 index in T of the tokens that predict one; None without labels.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    row_lengths: list[int]
    slots_T: torch.Tensor
    targets_T: torch.Tensor | None = None
    scored_N: torch.Tensor | None = None


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

    The host works it out: row lengths are needed there, and a few hundred kilobytes are there and back before a GPU has
    run the dozens of small kernels and waits that it would take otherwise, at a moment when it has nothing else to do.
    """
    B, S = input_ids_BS.shape
    mask, positions, labels = (_host(t, B, S) for t in (attention_mask_BS, position_ids_BS, labels_BS))
    keep_BS = np.ones((B, S), dtype=bool) if mask is None else mask.astype(bool)
    if positions is None:
        positions = (keep_BS.cumsum(axis=1) - 1).clip(min=0)
    keep = keep_BS.reshape(-1).nonzero()[0]
    positions_T = positions.reshape(-1)[keep]
    batch_row_T = keep // S
    starts_T = np.ones(len(keep), dtype=bool)
    starts_T[1:] = (positions_T[1:] != positions_T[:-1] + 1) | (batch_row_T[1:] != batch_row_T[:-1])
    starts = starts_T.nonzero()[0]
    found = [keep, positions_T]
    if labels is not None:
        own_T = labels.reshape(-1)[keep]
        targets_T = np.full_like(own_T, IGNORE)
        targets_T[:-1] = np.where(starts_T[1:], IGNORE, own_T[1:])
        found += [targets_T, (targets_T != IGNORE).nonzero()[0]]
    joined = on_device(torch.from_numpy(np.concatenate(found, dtype=np.int64)), torch.int64, input_ids_BS.device)
    slots_T, positions_on_T, *rest = joined.split([len(part) for part in found])
    ids_T = input_ids_BS.reshape(-1)
    return PackedBatch(
        ids_T if len(keep) == B * S else ids_T.index_select(0, slots_T),
        positions_on_T,
        np.diff(starts, append=len(keep)).tolist(),
        slots_T,
        *rest,
    )


def _host(t_BS: torch.Tensor | None, B: int, S: int) -> NDArray[np.int64] | None:
    return None if t_BS is None else t_BS.expand(B, S).cpu().numpy()
