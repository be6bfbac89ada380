"""``chosen_logprobs`` in plain PyTorch, whole logits at once: the oracle for the chunked one."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def chosen_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As :func:`pronghorn.kernels.linear_logprob.chosen_logprobs`; ``chunk`` is accepted and has no effect."""
    z_NV = F.linear(hidden_ND, weight_VD, bias_V)
    z_NV = z_NV.to(torch.promote_types(z_NV.dtype, torch.float32)) * scale
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    logp_NV = F.log_softmax(z_NV / temperature, dim=-1)
    logps_N = logp_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    entropy_N = -(logp_NV.exp() * logp_NV).sum(-1) if with_entropy else None
    return logps_N, entropy_N if entropy_gradient or entropy_N is None else entropy_N.detach()
