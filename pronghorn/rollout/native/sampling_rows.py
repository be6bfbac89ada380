"""The sampling settings of a batch of rows as tensors: what the sampler reads at each step."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from .random import stream_key
from .request import Sequence


class SamplingRows:
    """Settings and counters of B rows.

    Attributes (all on the logits' device):
        temperature_B1: float32, 1 for greedy rows.
        greedy_B: bool, or None when no row is greedy.
        keys_B, positions_B: int64 random stream of each row, and tokens generated so far.
        top_k_B1, top_p_B1, log_min_p_B1: or None when no row uses it.
        penalty_B1, seen_BV: repetition penalty and which ids prompt and output hold, or None.
        presence_B1, frequency_B1, tally_BV: those penalties, and how often (int32) the output holds each id, or None.
        early: ``(rows, ids, min_tokens)`` of the ids forbidden while fewer tokens are out, or None.
        alternatives: most alternatives that a row wants reported; -1 for none.
    """

    def __init__(self, sequences: Seq[Sequence], vocab: int, device: torch.device) -> None:
        self.sequences = list(sequences)
        params = [s.params for s in sequences]

        def column(values: Seq[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32).unsqueeze(1).to(device, non_blocking=True)

        def integers(values: Seq[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

        self.any_drawn = not all(p.greedy for p in params)
        self.tempered = any(p.temperature not in (0.0, 1.0) for p in params)
        self.temperature_B1 = column([p.temperature or 1.0 for p in params])
        self.greedy_B = torch.tensor([p.greedy for p in params]).to(device) if any(p.greedy for p in params) else None
        self.keys_B = integers([stream_key(s.seed, s.index) for s in sequences])
        self.positions_B = integers([len(s.output) for s in sequences])
        drawn = [p for p in params if not p.greedy]
        self.top_k_B1 = (
            integers([p.top_k if 0 < p.top_k < vocab else vocab for p in params]).unsqueeze(1)
            if any(0 < p.top_k < vocab for p in drawn)
            else None
        )
        self.top_p_B1 = column([p.top_p for p in params]) if any(p.top_p < 1 for p in drawn) else None
        self.log_min_p_B1 = torch.log(column([p.min_p for p in params])) if any(p.min_p > 0 for p in drawn) else None
        self.penalty_B1: torch.Tensor | None = None
        self.seen_BV: torch.Tensor | None = None
        if any(p.repetition_penalty != 1 for p in params):
            self.penalty_B1 = column([p.repetition_penalty for p in params])
            seen = torch.zeros(len(params), vocab, dtype=torch.bool)
            for b, s in enumerate(sequences):
                seen[b, torch.tensor(s.tokens(0, len(s)))] = True
            self.seen_BV = seen.to(device)
        self.tally_BV: torch.Tensor | None = None
        self.presence_B1 = column([p.presence_penalty for p in params])
        self.frequency_B1 = column([p.frequency_penalty for p in params])
        if any(p.tallied for p in params):
            tally = [torch.bincount(torch.tensor(s.output, dtype=torch.int64), minlength=vocab) for s in sequences]
            self.tally_BV = torch.stack(tally).to(device, torch.int32)
        held = [(b, i, s.params.min_tokens) for b, s in enumerate(sequences) for i in sorted(s.stop_ids)
                if i < vocab and len(s.output) < s.params.min_tokens]  # fmt: skip
        self.early = tuple(integers(list(c)) for c in zip(*held)) if held else None
        self.alternatives = max((-1 if p.logprobs is None else p.logprobs for p in params), default=-1)

    @property
    def shaped(self) -> bool:
        """Whether any row's distribution differs from softmax(raw logits / temperature)."""
        return any(
            x is not None
            for x in (self.top_k_B1, self.top_p_B1, self.log_min_p_B1, self.seen_BV, self.tally_BV, self.early)
        )

    def serves(self, sequences: Seq[Sequence]) -> bool:
        """Whether these are the rows, in order."""
        return len(sequences) == len(self.sequences) and all(a is b for a, b in zip(sequences, self.sequences))

    def advance(self, tokens_B: torch.Tensor) -> None:
        """Count the drawn tokens in."""
        self.positions_B += 1
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, tokens_B.unsqueeze(1), True)
        if self.tally_BV is not None:
            one_B1 = torch.ones_like(tokens_B, dtype=torch.int32).unsqueeze(1)
            self.tally_BV.scatter_add_(1, tokens_B.unsqueeze(1), one_B1)
