"""A product of a group with its adapters, ``x A^T`` included, in plain PyTorch."""

from __future__ import annotations

import torch

from pronghorn.kernels.reference.low_rank import low_rank


def adapted_matmul(
    table_TK: torch.Tensor,
    rows: int,
    weight_OK: torch.Tensor,
    a_RI: torch.Tensor,
    out_MO: torch.Tensor,
    coded: object = None,
) -> None:
    """See :func:`pronghorn.kernels.adapted_matmul.adapted_matmul`; a product is summed in its own order,
    of the weight alone.
    """
    R, inputs = a_RI.shape
    x_MK = table_TK[:rows, : weight_OK.shape[1]]
    low_rank(x_MK[:, :inputs], a_RI, x_MK[:, inputs : inputs + R])
    out_MO.copy_(x_MK @ weight_OK.T)
