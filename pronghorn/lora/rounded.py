"""Adapters in the compute dtype: the float32 masters rounded, all by one call, into one buffer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from .projection import Group, Projection

Members = tuple[Projection, ...]


class Rounded:
    """The groups of many projections, on one buffer of rounded masters (2 bytes a parameter in 16 bits).

    A model has hundreds of masters: a cast each would cost the host more than a GPU takes for all. They are rounded as
    ``LoraLinear`` rounds them in its forward. :meth:`refresh` rounds again, in place: the groups stay the same objects.

    Args:
        members: projections by their common input; a :class:`Group` comes of each.
        dtype: the compute dtype.
    """

    def __init__(self, members: Sequence[Members], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.masters: list[torch.Tensor] = []
        for projections in members:
            self.masters += [p.a_rI.detach() for p in projections if p.a_rI is not None]
            self.masters += [p.b_Or.detach() for p in projections if p.b_Or is not None]
        sizes = [m.numel() for m in self.masters]
        device = self.masters[0].device if self.masters else None
        with torch.inference_mode(False), torch.no_grad():  # a first walk in inference mode: training may follow
            self.flat = torch.empty(sum(sizes), dtype=dtype, device=device)
            self.pieces = [piece.view(m.shape) for piece, m in zip(self.flat.split(sizes), self.masters)]
        starts = [end - size for end, size in zip(itertools.accumulate(sizes), sizes)]
        self.groups: list[Group] = []
        at = 0
        for projections in members:
            made = self._group(projections, at, starts)
            at += sum((p.a_rI is not None) + (p.b_Or is not None) for p in projections)
            self.groups.append(made)
        self.refresh()

    def _group(self, projections: Members, at: int, starts: list[int]) -> Group:
        adapted = [p for p in projections if p.a_rI is not None]
        rank, a_RI = sum(p.rank for p in adapted), None
        if adapted:
            width = self.masters[at].shape[1]
            a_RI = self.flat[starts[at] : starts[at] + rank * width].view(rank, width)
        bs = iter(self.pieces[at + len(adapted) :])
        bs_Or = tuple(None if p.b_Or is None else next(bs) for p in projections)
        ranks, widths = [p.rank for p in projections], [p.base.out_features for p in projections]
        return Group(projections, a_RI, bs_Or, _spans(ranks), _spans(widths))

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the masters as they stand now."""
        if self.masters:
            torch._foreach_copy_(self.pieces, self.masters)

    @torch.no_grad()
    def copies(self) -> list[torch.Tensor]:
        """The rounded masters as they lie here, on the host; they share one storage."""
        flat = self.flat.to("cpu", copy=True)
        return [part.view(p.shape) for part, p in zip(flat.split([p.numel() for p in self.pieces]), self.pieces)]

    @torch.no_grad()
    def load(self, copies: Sequence[torch.Tensor]) -> None:
        """Put what :meth:`copies` gave back in place, until the next :meth:`refresh`."""
        if copies:
            self.flat.copy_(torch.cat([copy.reshape(-1) for copy in copies]))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied model makes its own, of its own masters."""
        return


def _spans(sizes: list[int]) -> tuple[slice, ...]:
    ends = list(itertools.accumulate(sizes))
    return tuple(slice(end - size, end) for size, end in zip(sizes, ends))
