"""``linear_cross_entropy`` in plain PyTorch, whole logits at once: the oracle for the chunked one."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    denominator: int | float | torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    weights_N: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> torch.Tensor:
    """As :func:`pronghorn.kernels.linear_cross_entropy.linear_cross_entropy`; ``chunk`` has no effect."""
    z_NV = F.linear(hidden_ND, weight_VD, bias_V)
    z_NV = z_NV.to(torch.promote_types(z_NV.dtype, torch.float32)) * scale
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    losses_N = F.cross_entropy(z_NV, targets_N, ignore_index=ignore_index, reduction="none")
    return (losses_N if weights_N is None else losses_N * weights_N).sum() / denominator
