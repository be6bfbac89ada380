r"""Attention of several completions over one copy of their prompt, forward and backward, exact.

A completion token sees its own row causally (part a) and every token of its prompt (part b). For a query with scores
:math:`S_j`, each part gives its output and log-sum-exp over its own keys:

.. math:: o_p = \sum_{j \in p} e^{S_j - \ell_p} v_j, \qquad \ell_p = \log \sum_{j \in p} e^{S_j}.

The softmax over all keys is their merge (FlashAttention-2, arXiv:2307.08691, section 2.3; FlashDecoding):

.. math:: \ell = \log(e^{\ell_a} + e^{\ell_b}), \qquad o = e^{\ell_a - \ell} o_a + e^{\ell_b - \ell} o_b,

as :math:`e^{\ell_p - \ell} e^{S_j - \ell_p} = e^{S_j - \ell} = P_j`, the probability of key j among all keys.

Backward of a softmax needs of the other keys only :math:`\ell` and :math:`D = \sum_j P_j dP_j = dO \cdot o`:

.. math:: dS_j = P_j (dP_j - D), \quad P_j = e^{S_j - \ell}, \quad dP_j = dO \cdot v_j.

So each part's own backward, given the merged o and :math:`\ell` in place of its own, forms the true :math:`P_j` and D,
and returns the true dS of its keys: :math:`dq = \sum_a dS_j k_j + \sum_b dS_j k_j` is the sum of the parts' dq, and
each key's dk and dv gather over the parts that it is in, which for a prompt's keys are its own row and part b.

Backward in two parts takes some ten launches more than one over plain rows. Where there are few keys (:data:`GATHER`),
each completion's are copied behind a copy of its prompt's, one causal backward takes all rows, and a key's dk and dv
are the sums over its copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from pronghorn.kernels.attention import Path, attention_backward, attention_forward
from pronghorn.kernels.attention_merge import Copies, add_rows_, merge_, sum_copies
from pronghorn.kernels.spans import Spans, pieces_on_device

GATHER = 8192
"""Backward copies prompts for their completions where that makes so many keys at most: a GPU is done with these before
the host has launched the kernels of two parts. With more, copies would cost memory and time."""


@dataclass(frozen=True)
class Tokens:
    """Some of T packed tokens, in order: pieces ``[start, stop)``."""

    pieces: tuple[tuple[int, int], ...]
    device: torch.device

    @cached_property
    def index(self) -> torch.Tensor:
        """int64 positions."""
        return pieces_on_device(self.pieces, self.device)

    def take(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """These tokens of ``x``: a view where they lie together, else a copy."""
        if len(self.pieces) == 1:
            start, stop = self.pieces[0]
            return x.narrow(dim, start, stop - start)
        return x.index_select(dim, self.index)


@dataclass(frozen=True)
class Gathered:
    """Rows of queries over keys of their own: a completion's are its prompt's, copied, and then its own.

    Attributes:
        spans: each row's queries and keys, causal from the last of both on.
        copies: which token each of the U keys is a copy of.
    """

    spans: Spans
    copies: Copies

    def backward(
        self,
        do_THE: torch.Tensor,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        o_THE: torch.Tensor,
        lse_HT: torch.Tensor,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(dq_THE, dk_TKE, dv_TKE)``, by flash; o and lse are those of all keys that a query sees."""
        k_UKE, v_UKE = (t.index_select(0, self.copies.index) for t in (k_TKE, v_TKE))
        dq_THE, dk_UKE, dv_UKE = attention_backward(
            do_THE, q_THE, k_UKE, v_UKE, o_THE, lse_HT, self.spans, scale, Path.FLASH
        )
        return dq_THE, *sum_copies(dk_UKE, dv_UKE, self.copies)


class SharedPrefix:
    """The completions of each prompt as one span of queries over the prompt's keys.

    Args:
        row_lengths: tokens of each packed row.
        prefix: for each row the index of the row that it continues, or None. A row's continuations follow it directly.

    Raises:
        ValueError: rows that continue one another in any other way.
    """

    def __init__(self, row_lengths: Sequence[int], prefix: Sequence[int | None], device: torch.device) -> None:
        if len(prefix) != len(row_lengths):
            raise ValueError(f"prefix names {len(prefix)} rows, row_lengths {len(row_lengths)}; give one entry a row")
        prompts: list[tuple[int, int]] = []
        completions: list[tuple[int, int]] = []
        begin, at, group = 0, 0, 0  # of the last row without prefix: its first token; the token reached; its index
        for row, (n, above) in enumerate(zip(row_lengths, prefix)):
            if above is None:
                begin, group = at, row
            elif above != group or row == 0:
                raise ValueError(f"prefix[{row}]={above}: a row follows the row that it continues; reorder the rows")
            elif above == row - 1:
                prompts.append((begin, at))
                completions.append((at, at + n))
            else:
                completions[-1] = (completions[-1][0], at + n)
            at += n
        self.prompts, self.completions = Tokens(tuple(prompts), device), Tokens(tuple(completions), device)
        q_lengths, k_lengths = (tuple(b - a for a, b in pieces) for pieces in (completions, prompts))
        self.spans = Spans(q_lengths, k_lengths, causal=False, device=device)
        self.row_lengths, self.prefix = tuple(row_lengths), tuple(prefix)

    @cached_property
    def gathered(self) -> Gathered | None:
        """All rows' keys with copies of the prompts; None where these are too many."""
        k_lengths = tuple(
            n if above is None else n + self.row_lengths[above] for n, above in zip(self.row_lengths, self.prefix)
        )
        if sum(k_lengths) > GATHER:
            return None
        starts = [0, *accumulate(self.row_lengths)]
        keys = []
        for row, above in enumerate(self.prefix):
            for source in (row,) if above is None else (above, row):
                keys.append(torch.arange(starts[source], starts[source + 1]))
        device = self.prompts.device
        spans = Spans(self.row_lengths, k_lengths, causal=True, device=device)
        return Gathered(spans, Copies(torch.cat(keys), starts[-1], device))

    def forward_(
        self,
        o_THE: torch.Tensor,
        lse_HT: torch.Tensor,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        scale: float,
        path: Path,
        softcap: float | None = None,
    ) -> None:
        """Merge the prompts into o and lse, which hold every row's attention within itself."""
        q_NHE = self.completions.take(q_THE)
        k_UKE, v_UKE = self.prompts.take(k_TKE), self.prompts.take(v_TKE)
        part_NHE, lse_HN = attention_forward(q_NHE, k_UKE, v_UKE, self.spans, scale, path, softcap)
        merge_(o_THE, lse_HT, part_NHE, lse_HN, self.completions.index)

    def backward_(
        self,
        dq_THE: torch.Tensor,
        dk_TKE: torch.Tensor,
        dv_TKE: torch.Tensor,
        do_THE: torch.Tensor,
        q_THE: torch.Tensor,
        k_TKE: torch.Tensor,
        v_TKE: torch.Tensor,
        o_THE: torch.Tensor,
        lse_HT: torch.Tensor,
        scale: float,
        path: Path,
        softcap: float | None = None,
    ) -> None:
        """Add the prompts' part to gradients that hold every row's part within itself; o and lse are the merged."""
        do_NHE, q_NHE, o_NHE = (self.completions.take(t) for t in (do_THE, q_THE, o_THE))
        k_UKE, v_UKE = self.prompts.take(k_TKE), self.prompts.take(v_TKE)
        lse_HN = self.completions.take(lse_HT, 1).contiguous()
        dq_NHE, dk_UKE, dv_UKE = attention_backward(
            do_NHE, q_NHE, k_UKE, v_UKE, o_NHE, lse_HN, self.spans, scale, path, softcap
        )
        queries, keys = self.completions.index, self.prompts.index
        add_rows_((dq_THE, dq_NHE, queries), (dk_TKE, dk_UKE, keys), (dv_TKE, dv_UKE, keys))
