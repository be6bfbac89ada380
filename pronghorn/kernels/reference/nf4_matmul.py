"""The product with a group's NF4 weights in plain PyTorch: each weight is made, multiplied in float32, and dropped."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from pronghorn.kernels.reference.low_rank import low_rank
from pronghorn.kernels.reference.nf4 import dequantize_nf4


class NF4Weight(Protocol):
    """What the product reads of a weight; ``quant.nf4.NF4Tensor`` has it and says what each field means."""

    @property
    def codes(self) -> torch.Tensor: ...
    @property
    def scales(self) -> torch.Tensor: ...
    @property
    def nested_absmax(self) -> torch.Tensor | None: ...
    @property
    def offset(self) -> torch.Tensor | None: ...
    @property
    def nested_code(self) -> torch.Tensor | None: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def blocksize(self) -> int: ...
    @property
    def nested_blocksize(self) -> int: ...
    @property
    def tiled(self) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Member:
    """One projection of a group: its weight ``[O, I]``, and what is added to its product.

    Attributes:
        weight: the 4-bit weight.
        b_Or: ``s B``, ``[O, r]`` in x's dtype, contiguous; None without an adapter.
        at: the first of its r columns of ``low_MR``.
        bias_O: in x's dtype, or None.
    """

    weight: NF4Weight
    b_Or: torch.Tensor | None = None
    at: int = 0
    bias_O: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.b_Or is None else self.b_Or.shape[1]


def nf4_matmul(
    x_MI: torch.Tensor,
    members: Sequence[Member],
    low_MR: torch.Tensor | None,
    out_MO: torch.Tensor,
    overlap: bool = False,
    a_RI: torch.Tensor | None = None,
) -> None:
    """As :func:`pronghorn.kernels.nf4_matmul.nf4_matmul`, which checked the arguments, into ``out_MO``.

    ``overlap`` means nothing here.
    """
    if a_RI is not None and low_MR is not None:
        low_rank(x_MI, a_RI, low_MR[:, : a_RI.shape[0]])
        low_MR[:, a_RI.shape[0] :] = 0
    column = 0
    for member in members:
        w = member.weight
        weight_OI = dequantize_nf4(
            w.codes, w.scales, w.nested_absmax, w.offset, w.shape, x_MI.dtype,
            nested_code=w.nested_code, blocksize=w.blocksize, nested_blocksize=w.nested_blocksize,
            tiled=w.tiled,
        )  # fmt: skip
        wide = torch.promote_types(x_MI.dtype, torch.float32)
        y_MO = x_MI.to(wide) @ weight_OI.to(wide).T
        if low_MR is not None and member.b_Or is not None:
            own = low_MR[:, member.at : member.at + member.b_Or.shape[1]]
            y_MO += own.to(wide) @ member.b_Or.to(wide).T
        if member.bias_O is not None:
            y_MO += member.bias_O.to(wide)
        out_MO[:, column : column + w.shape[0]] = y_MO
        column += w.shape[0]
