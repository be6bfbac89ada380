"""Products of a decode step that keep no weight of their own: the trainer's, and few rows of a base in 16 bits."""

from __future__ import annotations

import dataclasses

import torch

from ...kernels.launch import current_recording
from ...kernels.low_rank import low_rank
from ...kernels.ordered_matmul import MAX_ROWS, DenseMember, ordered_matmul
from ...lora.fused import Input, project
from ...lora.projection import Group


class TrainerProduct:
    """The trainer's product, its sum in order whatever the number of rows."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def place(self, rows: int) -> torch.Tensor | None:
        return None

    def refresh(self) -> None:
        """Nothing: it reads the rounded adapters themselves."""

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor:
        given = Input(self.group, rows=x_MI.shape[0], like=x_MI, ordered=True)
        given.x_TI.copy_(x_MI)
        return project(given, self.group, given.lower(self.group, None, x_MI.is_cuda), ordered=x_MI.is_cuda)


class DenseProduct:
    """A group whose base is in 16 bits: few rows by our own kernel, more as the trainer multiplies them.

    Adapters are added to the base's rounded product, as the trainer adds them where it does not make the weight itself.
    """

    def __init__(self, group: Group, dtype: torch.dtype) -> None:
        self.group, self.many = group, TrainerProduct(group)
        self.members = dense_members(group, dtype)

    def place(self, rows: int) -> torch.Tensor | None:
        return None

    def refresh(self) -> None:
        """Nothing: it reads the rounded adapters themselves."""

    def __call__(self, x_MI: torch.Tensor) -> torch.Tensor:
        if x_MI.shape[0] > MAX_ROWS:
            return self.many(x_MI)
        low_MR = None if self.group.a_RI is None else low_rank(x_MI, self.group.a_RI)
        return ordered_matmul(x_MI, self.members, low_MR, overlap=True)  # x was whole before x A^T began


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
def agrees(group: Group, dtype: torch.dtype) -> bool:
    """Whether the two products above have the same bits here; tried once for each shape, on random inputs and adapters.

    cuBLAS splits the sums of narrow products, and which ones is its own affair: another version or GPU may differ.
    Where it does, one line says so.
    """
    members, device = group.members, group.members[0].base.weight.device
    shapes = tuple((*p.base.weight.shape, p.rank, p.scaling, p.base.bias is None) for p in members)
    key = shapes, dtype, device
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
        x_MI = torch.randn(MAX_ROWS, members[0].base.in_features, generator=generator, device=device).to(dtype)
        _TRIED[key] = torch.equal(DenseProduct(trial, dtype)(x_MI), TrainerProduct(trial)(x_MI))
        if not _TRIED[key]:
            sizes = ", ".join(f"{p.base.out_features} x {p.base.in_features}" for p in members)
            print(
                f"Pronghorn: rollouts multiply the projections of {sizes} as the trainer does, slower than by a kernel "
                "for few rows, because the matrix library sums these shapes in an order of its own",
                flush=True,
            )
    return _TRIED[key]
