"""Log-probabilities, entropies and gradients of a chunk of logits in plain PyTorch: the CPU path and the oracle."""

from __future__ import annotations

import torch


def logit_stats_(
    x_CV: torch.Tensor,
    targets_C: torch.Tensor,
    bias_V: torch.Tensor | None,
    weights_C: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    temperature: float,
    ignore_index: int | None,
    with_entropy: bool,
    gradient: torch.dtype | None,
    entropy_weights_C: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As :func:`pronghorn.kernels.logits.logit_stats_`; ``x_CV`` keeps its values."""
    ignored_C1 = torch.zeros_like(targets_C, dtype=torch.bool).unsqueeze(1)
    if ignore_index is not None:
        ignored_C1 = (targets_C == ignore_index).unsqueeze(1)
    targets_C1 = targets_C.unsqueeze(1).masked_fill(ignored_C1, 0)
    u_CV = (x_CV if bias_V is None else x_CV + bias_V.to(x_CV.dtype)) * scale
    slope = scale / temperature
    slope_CV: torch.Tensor | float = slope
    if softcap is not None:
        bounded_CV = torch.tanh(u_CV / softcap)
        slope_CV = (1 - bounded_CV.square()) * slope
        u_CV = bounded_CV * softcap
    logp_CV = torch.log_softmax(u_CV / temperature, dim=1)
    logps_C = logp_CV.gather(1, targets_C1).masked_fill(ignored_C1, 0).squeeze(1)
    if gradient is None and not with_entropy:
        return logps_C, None, None
    p_CV = logp_CV.exp()
    entropy_C = None
    if with_entropy:  # a token of probability 0 has no share, though its log-probability is -inf
        entropy_C = -(p_CV * logp_CV.masked_fill(p_CV == 0, 0)).sum(dim=1)
    gradient_CV = None
    if gradient is not None:
        share_CV = None
        if entropy_weights_C is not None and entropy_C is not None:
            share_CV = p_CV * (logp_CV.masked_fill(p_CV == 0, 0) + entropy_C.unsqueeze(1))
            share_CV.mul_(slope_CV).mul_(entropy_weights_C.unsqueeze(1))
        d_CV = p_CV.neg_().scatter_add_(1, targets_C1, torch.ones_like(targets_C1, dtype=p_CV.dtype)).mul_(slope_CV)
        if weights_C is not None:
            d_CV.mul_(weights_C.unsqueeze(1))
        if share_CV is not None:
            d_CV.sub_(share_CV)
        gradient_CV = d_CV.masked_fill_(ignored_C1, 0).to(gradient)
    return logps_C, entropy_C, gradient_CV
