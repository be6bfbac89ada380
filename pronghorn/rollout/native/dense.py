"""Products of a decode step that keep no weight of their own: the trainer's, and few rows of a base in 16 bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ...kernels.launch import current_recording
from ...kernels.low_rank import low_rank
from ...kernels.ordered_matmul import COPIED_ROWS, MAX_ROWS, DenseMember, most_rows, ordered_matmul
from ...lora.fused import ORDERED_ROWS, Input, project
from ...lora.held import HeldWeights
from ...lora.projection import Group


class TrainerProduct:
    """The trainer's product, its sum in order whatever the number of rows.

    Args:
        group: the projections.
        dtype: of their inputs.
        held: their weights, where they are kept in that dtype.
    """

    def __init__(self, group: Group, dtype: torch.dtype, held: HeldWeights | None = None) -> None:
        self.group, self.held = group, held
        self._like = torch.empty(0, dtype=dtype, device=group.members[0].base.weight.device)
        self._given: Input | None = None

    def place(self, rows: int) -> torch.Tensor | None:
        self._given = Input(self.group, self.held, rows=rows, like=self._like, ordered=True)
        return self._given.x_TI

    def makes_a_start(self, rows: int) -> bool:
        return False

    def refresh(self) -> None:
        """Nothing: it reads the rounded adapters themselves."""

    def __call__(self, x_MI: torch.Tensor, pad: bool = True) -> torch.Tensor:
        """``pad``: multiply few rows as many, lest the matrix library splits their sum."""
        given, self._given = self._given, None  # its memory is free as soon as it is multiplied
        if given is None or given.x_TI.data_ptr() != x_MI.data_ptr() or given.x_TI.shape != x_MI.shape:
            given = Input(self.group, self.held, rows=x_MI.shape[0], like=x_MI, ordered=True)
            given.x_TI.copy_(x_MI)
        low_MR = given.lower(self.group, None, x_MI.is_cuda)
        return project(given, self.group, low_MR, self.held, ordered=pad and x_MI.is_cuda)


class DenseProduct:
    """A group whose base is in 16 bits: few rows by our own kernel, more as the trainer multiplies them, but as few as
    they are wherever that gives the same bits.

    Adapters are added to the base's rounded product, as the trainer adds them where it does not make the weight itself.
    """

    def __init__(self, group: Group, dtype: torch.dtype) -> None:
        self.group, self.many = group, TrainerProduct(group, dtype)
        self.members = dense_members(group, dtype)
        self.most = most_rows(self.members)
        self.tried = tried_rows(self.members)

    def _own(self, rows: int) -> bool:
        """Whether our own kernel multiplies so many."""
        return rows <= self.tried or (rows <= self.most and agrees(self.group, self.members[0].weight_OI.dtype, rows))

    def place(self, rows: int) -> torch.Tensor | None:
        return None if self._own(rows) else self.many.place(rows)

    def makes_a_start(self, rows: int) -> bool:
        return False

    def refresh(self) -> None:
        """Nothing: it reads the rounded adapters themselves."""

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor:
        M = x_MI.shape[0]
        if self._own(M):
            return self.by_kernel(x_MI)
        as_few = self.most < M < ORDERED_ROWS and agrees(self.group, x_MI.dtype, M)
        return self.many(x_MI, pad=M < ORDERED_ROWS and not as_few)

    def by_kernel(self, x_MI: torch.Tensor) -> torch.Tensor:
        """The product by our own kernel, whose rows are no more than it is meant for."""
        low_MR = None if self.group.a_RI is None else low_rank(x_MI, self.group.a_RI)
        return ordered_matmul(x_MI, self.members, low_MR, overlap=True)  # x was whole before x A^T began


def tried_rows(members: Sequence[DenseMember]) -> int:
    """Rows up to which our own kernel is tried once for all, before it is chosen. Where it is meant for more, by other
    tiles, each number of rows is tried when it comes.
    """
    return COPIED_ROWS if most_rows(members) > MAX_ROWS else MAX_ROWS


def dense_members(group: Group, dtype: torch.dtype) -> list[DenseMember]:
    """A group's weights as they lie, with the rounded adapters and biases."""
    return [
        DenseMember(
            p.base.weight.detach(),
            b_Or,
            span.start,
            p.scaling,
            None if p.base.bias is None else p.base.bias.detach().to(dtype),
        )
        for p, b_Or, span in zip(group.members, group.bs_Or, group.spans)
    ]


_TRIED: dict[tuple[object, ...], bool] = {}


@torch.no_grad()
def agrees(group: Group, dtype: torch.dtype, rows: int | None = None) -> bool:
    """Whether so many rows may be multiplied by themselves: whether that gives the bits of the trainer's product, which
    pads few rows. Tried once for each shape and number of rows, on random inputs and adapters.

    Up to as many as our own kernel is meant for it is that which is tried, above the matrix library, which splits the
    sums of narrow products. Which ones is its own affair: another version or GPU may differ. Where our kernel does, a
    line says so. ``rows=None``: as many as are tried once for all (:func:`tried_rows`).
    """
    rows = rows or tried_rows(dense_members(group, dtype))
    members, device = group.members, group.members[0].base.weight.device
    shapes = tuple((*p.base.weight.shape, p.rank, p.scaling, p.base.bias is None) for p in members)
    key = shapes, dtype, device, rows
    if current_recording() is not None:  # nothing runs: walked as if they agreed, and tried when they first run
        return _TRIED.get(key, True)
    if key not in _TRIED:
        generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are

        def some(like: torch.Tensor) -> torch.Tensor:
            made = torch.randn(like.shape, generator=generator, device=device)
            return (made / like.shape[-1] ** 0.5).to(dtype)

        trial = dataclasses.replace(
            group,
            a_RI=None if group.a_RI is None else some(group.a_RI),
            bs_Or=tuple(None if b_Or is None else some(b_Or) for b_Or in group.bs_Or),
        )
        x_MI = torch.randn(rows, members[0].base.in_features, generator=generator, device=device).to(dtype)
        trained = TrainerProduct(trial, dtype)
        product = DenseProduct(trial, dtype)
        own = product.by_kernel(x_MI) if rows <= product.most else trained(x_MI, pad=False)
        _TRIED[key] = torch.equal(own, trained(x_MI))
        if not _TRIED[key] and rows <= product.most:
            sizes = ", ".join(f"{p.base.out_features} x {p.base.in_features}" for p in members)
            print(
                f"Pronghorn: rollouts multiply {rows} rows of the projections of {sizes} as the trainer does, slower "
                "than by a kernel for few rows, because the matrix library sums these shapes in an order of its own",
                flush=True,
            )
    return _TRIED[key]
