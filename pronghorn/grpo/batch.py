"""Packing rollouts for the forward pass: no padding, and the prompt once for all completions that follow it.

A row is what attends causally to itself. In the plain layout each rollout is one row, prompt and completion. In the
shared layout a prompt with several completions is a row of its own, and each completion a row that also sees the
prompt's (``prefix``): positions go on from the prompt's length, and the prompt's last token predicts the first token of
every completion. A completion's last token predicts nothing that is scored, so it is no input.

What a tool or an environment wrote inside a completion is input and is not scored: the tokens after it see it, and no
log-probability of it is taken. Such a stretch at the end is no input either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .rollouts import Rollout


@dataclass(frozen=True)
class PackedRollouts:
    """B rollouts as T packed tokens, of which N completion tokens are scored.

    Scored tokens lie in the order of the rollouts, whatever the order of the rows.

    Attributes:
        input_ids_T: int64 token ids, row after row.
        positions_T: int64 position of each token in its prompt and completion.
        row_lengths: tokens of each row.
        prefix: for each row the row that it continues, or None.
        source_N: int64 index in T of the token whose hidden state predicts each scored token.
        targets_N: int64 id of each scored token.
        row_N: int64 rollout of each scored token.
        advantages_B: float32.
        sampler_logps_N, old_logps_N, ref_logps_N: log-probabilities of the scored tokens; None where unknown.
        kept_N: bool, see :class:`~pronghorn.grpo.rollouts.Rollout`; None where unknown.
        stale_N: bool, tokens of rollouts that were sampled under an earlier policy; None where there are none.
        complete: the sampler scored every token, under the policy of now.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    row_lengths: list[int]
    prefix: list[int | None]
    source_N: torch.Tensor
    targets_N: torch.Tensor
    row_N: torch.Tensor
    advantages_B: torch.Tensor
    sampler_logps_N: torch.Tensor
    old_logps_N: torch.Tensor | None = None
    ref_logps_N: torch.Tensor | None = None
    kept_N: torch.Tensor | None = None
    stale_N: torch.Tensor | None = None
    complete: bool = False

    @property
    def rows(self) -> int:
        """B, the rollouts."""
        return self.advantages_B.shape[0]

    @property
    def tokens(self) -> int:
        """N, the scored tokens."""
        return self.targets_N.shape[0]


@dataclass
class _Layout:
    """Rows as they are laid, one after another."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    row_lengths: list[int] = field(default_factory=list)
    prefix: list[int | None] = field(default_factory=list)

    def row(self, ids: Sequence[int], position: int = 0, prefix: int | None = None) -> int:
        """Lay a row whose first token has this position; the index of that token."""
        start = len(self.ids)
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.row_lengths.append(len(ids))
        self.prefix.append(prefix)
        return start

    def group(self, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> list[list[int]]:
        """Lay one prompt and its completions; for each, the indices of the tokens that predict its tokens."""
        if len(completions) == 1:
            start = self.row([*prompt, *completions[0][:-1]]) + len(prompt) - 1
            return [list(range(start, start + len(completions[0])))]
        row, last = len(self.row_lengths), self.row(prompt) + len(prompt) - 1
        sources = []
        for completion in completions:
            start = self.row(completion[:-1], len(prompt), row) if len(completion) > 1 else 0
            sources.append([last, *range(start, start + len(completion) - 1)])
        return sources


def _lay(rollouts: Sequence[Rollout], shared: bool) -> tuple[_Layout, dict[int, list[int]]]:
    """The rows of ``rollouts``; by rollout with scored tokens, the indices of the tokens that predict them."""
    layout = _Layout()
    sources: dict[int, list[int]] = {}
    groups: dict[tuple[int, ...] | int, list[int]] = {}
    for b, r in enumerate(rollouts):
        if r.scored_tokens:
            groups.setdefault(tuple(r.prompt_ids) if shared else b, []).append(b)
    for members in groups.values():
        at = [rollouts[b].sampled_at for b in members]
        completions = [rollouts[b].completion_ids[: where[-1] + 1] for b, where in zip(members, at)]
        found = layout.group(rollouts[members[0]].prompt_ids, completions)
        sources.update((b, [source[i] for i in where]) for b, source, where in zip(members, found, at))
    if not sources and rollouts:  # nothing is scored: the walk still needs a token, for a loss of 0 with a graph
        layout.row(rollouts[0].prompt_ids[:1])
    return layout, sources


def pack(
    rollouts: Sequence[Rollout],
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    shared_prefix: bool = True,
) -> PackedRollouts:
    """Pack ``rollouts`` onto ``device``, log-probabilities in ``dtype``.

    Args:
        shared_prefix: lay a prompt once for all its completions here, wherever in ``rollouts`` they stand; else once
            for each. Losses and gradients are the same to rounding. Rollouts without scored tokens are not laid at all.

    Raises:
        ValueError: a prompt without tokens (nothing would predict the first completion token).
    """
    for b, r in enumerate(rollouts):
        if not r.prompt_ids:
            raise ValueError(f"rollout {b}: the prompt has no tokens; give at least one (a BOS token will do)")
    layout, sources = _lay(rollouts, shared_prefix)
    scored = [(b, r) for b, r in enumerate(rollouts) if r.scored]

    def longs(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    def joined(parts: list[torch.Tensor | None], dtype: torch.dtype = dtype) -> torch.Tensor | None:
        known = [part for part in parts if part is not None]
        return torch.cat(known).to(device, dtype) if known and len(known) == len(parts) else None

    sampled = [x for _, r in scored for x in r.sampler_logps]
    stale = [r.age > 0 for _, r in scored for _ in range(r.scored_tokens)]
    return PackedRollouts(
        input_ids_T=longs(layout.ids),
        positions_T=longs(layout.positions),
        row_lengths=layout.row_lengths,
        prefix=layout.prefix,
        source_N=longs([t for b, _ in scored for t in sources.get(b, ())]),
        targets_N=longs([r.completion_ids[i] for _, r in scored for i in r.sampled_at]),
        row_N=longs([b for b, r in scored for _ in range(r.scored_tokens)]),
        advantages_B=torch.tensor([r.advantage for r in rollouts], dtype=torch.float32).to(device),
        sampler_logps_N=torch.tensor(sampled, dtype=torch.float64).to(device, dtype),
        old_logps_N=joined([r.old_logps for _, r in scored]),
        ref_logps_N=joined([r.ref_logps for _, r in scored]),
        kept_N=joined([r.kept for _, r in scored], torch.bool),
        stale_N=torch.tensor(stale).to(device) if any(stale) else None,
        complete=not any(stale) and not any(map(math.isnan, sampled)),
    )
