"""Log-probabilities of the completion tokens of packed rollouts under a model, as it stands."""

from __future__ import annotations

import torch
from torch import nn

from ..kernels.linear_logprob import chosen_logprobs
from ..models.attention import PackedAttention
from ..models.forward import head, hidden_states
from .batch import PackedRollouts


def score(
    model: nn.Module,
    batch: PackedRollouts,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk: int | None = None,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(logps_N, entropy_N)`` in nats of the scored tokens under ``softmax(logits / temperature)``.

    Gradients flow where the model trains and grad mode is on; ``entropy_N`` is None unless asked for, and has none
    unless ``entropy_gradient``.
    Only the rows of hidden states that predict a completion token meet the head, in chunks of rows.
    """
    attention = PackedAttention(batch.row_lengths, batch.input_ids_T.device, batch.prefix, ordered=True)
    hidden_TD = hidden_states(model, batch.input_ids_T, batch.positions_T, attention)
    out = head(model)
    return chosen_logprobs(
        hidden_TD.index_select(0, batch.source_N),
        out.weight_VD,
        batch.targets_N,
        bias_V=out.bias_V,
        temperature=temperature,
        softcap=out.softcap,
        scale=out.scale,
        chunk=chunk,
        with_entropy=with_entropy,
        entropy_gradient=entropy_gradient,
    )
