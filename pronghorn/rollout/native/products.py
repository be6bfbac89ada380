"""A layer's linear products as a decode step runs them, on the trainer's own weights and rounded adapters.

Few rows of a 4-bit group, and some more of one with many outputs, go through one kernel that reads the codes once
(``kernels/nf4_matmul.py``). More rows are multiplied by the weight in 16 bits: kept where there is memory for it, made
for each product where not. A base in 16 bits is read as it lies, few rows by a kernel of our own, which on Hopper has
long sums of up to 256 rows too (``kernels/ordered_matmul.py``). What is kept for 17 to 256 rows under adapters Hopper
multiplies with ``x A^T`` in the same launch (``kernels/adapted_matmul.py``), where the outputs fill its multiprocessors
once. Either way the sum has the trainer's order, and is rounded where the trainer's is.
"""

from __future__ import annotations

from typing import Protocol

import torch

from ...kernels import adapted_matmul as adapted
from ...kernels import ordered_matmul as ordered
from ...kernels.low_rank import low_rank
from ...kernels.nf4_matmul import MAX_ROWS, Member, makes_low, nf4_matmul, rows_by_codes, why_not
from ...kernels.ordered_matmul import DenseMember, ordered_matmul
from ...lora.fused import ORDERED_ROWS
from ...lora.held import HeldWeights
from ...lora.projection import ROW_ALIGN, Group, table, whole_rows
from .dense import DenseProduct, TrainerProduct, agrees, dense_members

_STEP = 16  # columns of one matrix instruction: an adapter's ranks are multiplied in whole ones
_EVEN = 128  # columns of one step of that kernel: a sum that ends within a step takes a third longer
_FEW = 64  # rows from which on it splits no shorter sum
_FEWER = 16  # rows above which as many are multiplied beside x A^T
_MANY_OUTPUTS = 24576  # of a group: from here on the 4-bit kernel has enough of them for six warps a multiprocessor,
_MANY_WIDE = 16384  # and Hopper's for eight


class Product(Protocol):
    """``product(x_MI) -> y_MO`` of one group."""

    def place(self, rows: int) -> torch.Tensor | None:
        """Where x would best be written, ``[rows, I]``; None where it does not matter."""
        ...

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor: ...

    def makes_a_start(self, rows: int) -> bool:
        """Whether it is one launch, which can begin before what makes x has waited; see ``launch.before_a_start``."""
        ...

    def refresh(self) -> None:
        """The adapters were rounded anew."""
        ...


class NF4Product:
    """A group of 4-bit projections for few rows.

    An adapter's columns are read where they stand in ``x A^T`` of the whole group, in whole steps of 16: the trainer
    multiplies all of them by ``[W | s B]``, whose zeros change no sum.
    """

    def __init__(self, group: Group, dtype: torch.dtype) -> None:
        self.group = group
        self._scaled: list[tuple[torch.Tensor, torch.Tensor, float]] = []  # s B, B, s: those that are not B itself
        self.members: list[Member] = []
        for p, b_Or, span in zip(group.members, group.bs_Or, group.spans):
            assert p.nf4 is not None
            bias_O = None if p.base.bias is None else p.base.bias.detach().to(dtype)
            if b_Or is None:
                self.members.append(Member(p.nf4, None, 0, bias_O))
                continue
            first, last = span.start // _STEP * _STEP, -(-span.stop // _STEP) * _STEP
            table = b_Or
            if (first, last) != (span.start, span.stop) or p.scaling != 1.0:
                table = b_Or.new_zeros(b_Or.shape[0], last - first)
                self._scaled.append((table[:, span.start - first : span.stop - first], b_Or, p.scaling))
            self.members.append(Member(p.nf4, table, first, bias_O))
        self.columns = -(-group.rank // _STEP) * _STEP
        self.refresh()

    def place(self, rows: int) -> torch.Tensor | None:
        return None

    @property
    def bytes(self) -> int:
        """Memory of adapters that are scaled, or not whole steps of columns."""
        return sum(place.untyped_storage().nbytes() for place, _, _ in self._scaled)

    @torch.no_grad()
    def refresh(self) -> None:
        for place, b_Or, scaling in self._scaled:
            torch.mul(b_Or, scaling, out=place)

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor:
        if self.group.a_RI is None:
            return nf4_matmul(x_MI, self.members)
        M, R = x_MI.shape[0], self.group.rank
        if self.makes_a_start(M):
            return nf4_matmul(x_MI, self.members, x_MI.new_empty(M, self.columns), a_RI=self.group.a_RI)
        # Columns beyond R meet zeros of B, and must be numbers.
        low_MR = (x_MI.new_zeros if self.columns > R else x_MI.new_empty)(M, self.columns)
        low_rank(x_MI, self.group.a_RI, low_MR[:, :R])
        return nf4_matmul(x_MI, self.members, low_MR, overlap=True)  # x was whole before x A^T began

    def makes_a_start(self, rows: int) -> bool:
        return self.group.a_RI is not None and makes_low(rows, self.members, self.group.a_RI)


class Tables:
    """Inputs with room for ``x A^T`` beside them and zero rows below, shared by all products of one size."""

    def __init__(self) -> None:
        self._tables: dict[tuple[int, int, int], torch.Tensor] = {}

    def take(self, rows: int, columns: int, like: torch.Tensor, align: int) -> torch.Tensor:
        """As many columns as a weight ``like`` it has, whose rows are ``align`` apart."""
        key = rows, columns, align
        if key not in self._tables:
            made = table(rows, columns, like.dtype, like.device, align)
            whole_rows(made).zero_()
            self._tables[key] = made
        return self._tables[key]


class HeldProduct:
    """A group whose 4-bit weights are kept in 16 bits, adapters beside them: one product a call.

    Args:
        group: the projections.
        dtype: of the products.
        tables: where inputs lie.
        rows: most rows; fewer than cuBLAS sums in order are multiplied as many, or, where the sum is long, by our own
            kernel. On Hopper 17 to 256 rows with adapters are one launch, ``x A^T`` included, where outputs suit it
            (``adapted_matmul.takes``). Else our own kernel has 17 to 64 rows there, as it begins beside ``x A^T``, for
            which the matrix library would wait; it multiplies 64, as 40 took longer than these (``docs/log.md``). With
            many outputs up to 32 rows read the 4-bit weights, on Hopper mostly up to 64
            (``nf4_matmul.rows_by_codes``); what is kept is for more, and for prefills, then.
    """

    def __init__(self, group: Group, dtype: torch.dtype, tables: Tables, rows: int) -> None:
        inputs = group.members[0].base.in_features
        align = align_of(inputs)
        self.group, self.held = group, HeldWeights(group, dtype, align)
        self.inputs, both = inputs, self.held.table
        least = ORDERED_ROWS if inputs >= ordered.LONG_SUM else _FEW
        self.table_TK = tables.take(max(rows, least), both.shape[1], both, align)
        self.least = least
        weight = both[: self.held.outputs]
        self.right = weight.T if group.rank else weight[:, : self.inputs].T
        self.member = DenseMember(whole_rows(weight))  # zeros beyond what is multiplied change no sum
        long = inputs >= ordered.LONG_SUM
        self.least_own, self.most_own = (1 if long else ordered.COPIED_ROWS + 1), 0
        if _on_gpu(both) and not ordered.why_not([self.member], dtype):
            self.most_own = (
                ordered.most_rows([self.member]) if long else ordered.mapped_rows([self.member], group.rank > 0)
            )
        # Whether the copy engine brings 64 rows beside x A^T.
        self.beside = self.most_own > 0 and group.rank > 0 and ordered.mapped_rows([self.member], True) >= _FEW
        self.in_nf4, self.rows_by_codes = _many_in_nf4(group, dtype)
        self.coded: adapted.Coded | None = None
        if min(rows, _FEW) > self.rows_by_codes and adapted.takes(_FEW, self.member.weight_OI, group.a_RI):
            self.coded = adapted.coded_of([p.nf4 for p in group.members if p.nf4 is not None])

    def _by_codes(self, rows: int) -> NF4Product | None:
        return self.in_nf4 if self.in_nf4 and rows <= self.rows_by_codes else None

    @property
    def bytes(self) -> int:
        """Memory of what it keeps."""
        coded = 0 if self.coded is None else self.coded.packed.nbytes
        return self.held.bytes + (self.in_nf4.bytes if self.in_nf4 else 0) + coded

    def place(self, rows: int) -> torch.Tensor | None:
        return None if self._by_codes(rows) else self.table_TK[:rows, : self.inputs]

    def makes_a_start(self, rows: int) -> bool:
        if product := self._by_codes(rows):
            return product.makes_a_start(rows)
        return adapted.takes(rows, self.member.weight_OI, self.group.a_RI)

    def refresh(self) -> None:
        self.held.refresh(self.group)
        if self.in_nf4:
            self.in_nf4.refresh()

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor:
        M = x_MI.shape[0]
        if product := self._by_codes(M):
            return product(x_MI)
        own = self.table_TK[:M, : self.inputs]
        if x_MI.data_ptr() != own.data_ptr():
            own.copy_(x_MI)
        a_RI = self.group.a_RI
        if a_RI is not None:
            if adapted.takes(M, self.member.weight_OI, a_RI):
                return adapted.adapted_matmul(
                    whole_rows(self.table_TK), M, self.member.weight_OI, a_RI, coded=self.coded
                )
            low_rank(own, a_RI, self.table_TK[:M, self.inputs :])
        # With more rows x A^T is the slower for a product that takes its place beside it.
        if self.beside and _FEWER < M <= _FEW:
            return ordered_matmul(whole_rows(self.table_TK[:_FEW]), [self.member], late=self.inputs)[:M]
        if self.least_own <= M <= self.most_own:
            return ordered_matmul(whole_rows(self.table_TK[:M]), [self.member])
        return torch.mm(self.table_TK[: max(M, self.least)], self.right)[:M]


def _many_in_nf4(group: Group, dtype: torch.dtype) -> tuple[NF4Product | None, int]:
    """The 4-bit product of a group with so many outputs that it is the faster one, and up to how many rows."""
    if group.outputs < min(_MANY_OUTPUTS, _MANY_WIDE) or not takes_nf4(group, dtype):
        return None, 0
    product = NF4Product(group, dtype)
    rows = rows_by_codes(product.members)
    return (product, rows) if group.outputs >= _MANY_OUTPUTS or rows == MAX_ROWS else (None, 0)


def align_of(inputs: int) -> int:
    """How far apart rows of so many inputs are in tables that a decode step multiplies."""
    return _EVEN if inputs >= ordered.LONG_SUM else ROW_ALIGN


def _on_gpu(tensor: torch.Tensor) -> bool:
    """Whether there are kernels of our own for products with ``tensor``."""
    return tensor.is_cuda


def takes_nf4(group: Group, dtype: torch.dtype) -> bool:
    """Whether the 4-bit kernel multiplies few rows of ``group``."""
    weights = [p.nf4 for p in group.members if p.nf4 is not None]
    if not weights or len(weights) < len(group.members):
        return False
    return _on_gpu(weights[0].codes) and not why_not(weights, dtype, weights[0].codes.device)


def product_of(group: Group, dtype: torch.dtype, rows: int, most_in_nf4: int, held: Tables | None) -> Product:
    """How ``group`` multiplies up to ``rows`` rows.

    Args:
        most_in_nf4: rows up to which the 4-bit kernel is the faster one.
        held: tables of inputs, where there is memory to keep weights in 16 bits; else None.
    """
    weights = [p.nf4 for p in group.members if p.nf4 is not None]
    if not weights and _on_gpu(group.members[0].base.weight):
        fits = not ordered.why_not(dense_members(group, dtype), dtype) and agrees(group, dtype)
        return DenseProduct(group, dtype) if fits else TrainerProduct(group, dtype)
    if len(weights) < len(group.members):
        return TrainerProduct(group, dtype)
    if rows <= most_in_nf4 and takes_nf4(group, dtype):
        return NF4Product(group, dtype)
    biased = any(p.base.bias is not None for p in group.members)
    if held is None or biased:
        return TrainerProduct(group, dtype)
    return HeldProduct(group, dtype, held, rows)
