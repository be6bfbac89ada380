"""Packing rollouts for the forward pass: tokens of all rows one after another, no padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from .rollouts import Rollout


@dataclass(frozen=True)
class PackedRollouts:
    """B rollouts as T packed tokens, of which N completion tokens are scored.

    Attributes:
        input_ids_T: int64 prompt and completion ids, row after row.
        positions_T: int64 position of each token in its row.
        row_lengths: tokens of each row.
        source_N: int64 index in T of the token whose hidden state predicts each scored token.
        targets_N: int64 id of each scored token.
        row_N: int64 row of each scored token.
        advantages_B: float32.
        sampler_logps_N, old_logps_N, ref_logps_N: log-probabilities of the scored tokens; None where unknown.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    row_lengths: list[int]
    source_N: torch.Tensor
    targets_N: torch.Tensor
    row_N: torch.Tensor
    advantages_B: torch.Tensor
    sampler_logps_N: torch.Tensor
    old_logps_N: torch.Tensor | None = None
    ref_logps_N: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.row_lengths)

    @property
    def tokens(self) -> int:
        """N, the scored tokens."""
        return self.targets_N.shape[0]


def pack(rollouts: Sequence[Rollout], device: torch.device | str, dtype: torch.dtype = torch.float32) -> PackedRollouts:
    """Pack ``rollouts``, in their order, onto ``device``; log-probabilities in ``dtype``.

    Raises:
        ValueError: a prompt without tokens (nothing would predict the first completion token).
    """
    rows = [(row, r) for row, r in enumerate(rollouts) if r.scored]
    for row, r in enumerate(rollouts):
        if not r.prompt_ids:
            raise ValueError(f"row {row}: the prompt has no tokens; give at least one (a BOS token will do)")
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
    starts = [0, *accumulate(lengths)]
    ids = [token for r in rollouts for token in (*r.prompt_ids, *r.completion_ids)]
    positions = [p for n in lengths for p in range(n)]
    # the hidden state at t predicts token t + 1, so completion token j is predicted at prompt + j - 1
    source = [starts[row] + len(r.prompt_ids) - 1 + j for row, r in rows for j in range(len(r.completion_ids))]

    def longs(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    def joined(parts: list[torch.Tensor | None]) -> torch.Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.cat(known).to(device, dtype) if known and len(known) == len(parts) else None

    sampled = [x for _, r in rows for x in r.sampler_logps]
    return PackedRollouts(
        input_ids_T=longs(ids),
        positions_T=longs(positions),
        row_lengths=lengths,
        source_N=longs(source),
        targets_N=longs([token for _, r in rows for token in r.completion_ids]),
        row_N=longs([row for row, r in rows for _ in r.completion_ids]),
        advantages_B=torch.tensor([r.advantage for r in rollouts], dtype=torch.float32).to(device),
        sampler_logps_N=torch.tensor(sampled, dtype=torch.float64).to(device, dtype),
        old_logps_N=joined([r.old_logps for _, r in rows]),
        ref_logps_N=joined([r.ref_logps for _, r in rows]),
    )
