"""The product with 16-bit weights in plain PyTorch, rounded where cuBLAS rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch


@dataclasses.dataclass(frozen=True)
class DenseMember:
    """One projection of a group: its weight as it lies, and what is added to its product.

    Attributes:
        weight_OI: x's dtype, rows contiguous, any distance apart.
        b_Or: an adapter's B, ``[O, r]`` in x's dtype, contiguous; None without an adapter.
        at: the first of its r columns of ``low_MR``.
        scaling: multiplies the adapter's product.
        bias_O: in x's dtype, or None.
    """

    weight_OI: torch.Tensor
    b_Or: torch.Tensor | None = None
    at: int = 0
    scaling: float = 1.0
    bias_O: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        return 0 if self.b_Or is None else self.b_Or.shape[1]


def ordered_matmul(
    x_MI: torch.Tensor,
    members: Sequence[DenseMember],
    low_MR: torch.Tensor | None,
    out_MO: torch.Tensor,
    overlap: bool = False,
    late: int = 0,
) -> None:
    """As :func:`pronghorn.kernels.ordered_matmul.ordered_matmul`, which checked the arguments, into ``out_MO``.

    ``overlap`` and ``late`` mean nothing here.
    """
    dtype, wide = x_MI.dtype, torch.promote_types(x_MI.dtype, torch.float32)
    column = 0
    for m in members:
        y_MO = (x_MI.to(wide) @ m.weight_OI.to(wide).T).to(dtype)
        added = m.bias_O
        if low_MR is not None and m.b_Or is not None:
            own_Mr = low_MR[:, m.at : m.at + m.rank]
            added = (m.scaling * (own_Mr.to(wide) @ m.b_Or.to(wide).T)).to(dtype)
            if m.bias_O is not None:
                added = added + m.bias_O
        out_MO[:, column : column + m.weight_OI.shape[0]] = y_MO if added is None else y_MO + added
        column += m.weight_OI.shape[0]
