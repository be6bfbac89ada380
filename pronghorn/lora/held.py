"""A group's weights in the compute dtype, kept in memory: made once, with room for the adapters beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ..kernels.scaled_blocks import Block, scaled_blocks
from .projection import ROW_ALIGN, Group, Piece, table, whole_rows


class Beside:
    """Writes adapters beside held weights, by one launch. Where they lie is looked up once, and anew for others."""

    def __init__(self) -> None:
        self._of: object = None
        self._write: Callable[[], None] | None = None

    def __call__(self, of: object, blocks: Callable[[], list[Block]]) -> None:
        """Write ``blocks``, which are those of the adapters ``of`` until these are other ones."""
        if self._of is not of:
            found = blocks()
            self._of, self._write = of, scaled_blocks(found) if found else None
        if self._write is not None:
            self._write()


class HeldWeights:
    """``[W | s B]`` of all of a group's projections, one under another, and below it their A: ``[O + R, I + R]``.

    Forward multiplies ``[x | x A^T]`` by the rows of W; backward multiplies ``[dy | s dy B]`` by the columns of W, A.
    Either way the adapter costs no product and no pass of its own. W stays, A and B are written anew with every
    :meth:`refresh`.

    Args:
        group: the projections.
        dtype: of the weights.
        align: elements that rows are a multiple of apart; zeros stand between them.
    """

    def __init__(self, group: Group, dtype: torch.dtype, align: int = ROW_ALIGN) -> None:
        base = group.members[0].base
        O, I, R = group.outputs, base.in_features, group.rank  # noqa: E741 - shape letters
        self.table = table(O + R, I + R, dtype, base.weight.device, align)
        whole_rows(self.table)[:O, I:].zero_()  # beside every B stand zeros; the corner below is never read
        for p, columns in zip(group.members, group.columns):
            weight_OI = self.table[columns, :I]
            if p.nf4 is not None:
                p.weight(dtype, weight_OI)
            else:
                weight_OI.copy_(p.weight(dtype))
        self.outputs, self.inputs = O, I
        self._beside = Beside()
        with torch.no_grad():  # one by one, as a layer's are written together from then on (models/parts.py)
            for source, place, factor in self.blocks(group):
                torch.mul(source, factor, out=place)

    def blocks(self, group: Group) -> list[Block]:
        """What :meth:`refresh` writes: each B times its scaling beside its W, and every A below."""
        if group.a_RI is None:
            return []
        beside = [
            (b_Or, self.table[rows, self.inputs + span.start : self.inputs + span.stop], p.scaling)
            for p, b_Or, rows, span in zip(group.members, group.bs_Or, group.columns, group.spans)
            if b_Or is not None
        ]
        return [*beside, (group.a_RI, self.table[self.outputs :, : self.inputs], 1.0)]

    def refresh(self, group: Group) -> None:
        """Write the adapters as they are rounded now."""
        self._beside(group, lambda: self.blocks(group))

    @property
    def bytes(self) -> int:
        """What it takes, the padding of its rows included."""
        return self.table.shape[0] * self.table.stride(0) * self.table.element_size()

    @property
    def forward_piece(self) -> Piece:
        """W with B beside it."""
        rows = self.table[: self.outputs]
        return Piece(slice(0, self.outputs), rows[:, : self.inputs], rows)

    @property
    def b_OR(self) -> torch.Tensor:
        """``s B`` of all projections, zeros where a row's projection has no part of the R ranks."""
        return self.table[: self.outputs, self.inputs :]

    @property
    def with_a(self) -> torch.Tensor:
        """W with A below it, ``[O + R, I]``."""
        return self.table[:, : self.inputs]
