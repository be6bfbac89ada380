"""What a trainer may ask of each label without ever seeing a logit: its log-probability, the entropy there, top or not.

The fields carry the names of TRL's ``FusedCausalLMOutput``, which its ``SFTTrainer`` reads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from ..kernels.linear_logprob import chosen_logprobs
from .attention import PackedAttention
from .forward import head, hidden_states, logits
from .packed import pack

_ROWS = 128
"""Rows whose logits exist at once where a top label is looked for: one tile of a matrix product."""


@dataclass
class TokenScores(ModelOutput):
    """Scores of the next-token labels of ``[B, S]`` rows; each field is zero where there is none.

    Attributes:
        loss: mean negative log-probability of the labels.
        log_probs: ``[B, S - 1]`` float32, with gradient; slot s is the label at s + 1.
        entropy: ``[B, S - 1]`` of the next-token distribution in nats, without gradient.
        is_top1: ``[B, S - 1]`` whether the label is the likeliest next token (the first one of equals).
        label_mask: ``[B, S - 1]`` whether there is a label.
        aux_loss: None, as for every model without experts.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None


def token_scores(
    model: nn.Module,
    input_ids_BS: torch.Tensor,
    attention_mask_BS: torch.Tensor | None,
    position_ids_BS: torch.Tensor | None,
    labels_BS: torch.Tensor,
) -> TokenScores:
    """Score ``labels_BS`` (-100 ignored) as the loss does: no padding, no logits ``[B, S, V]``, packed rows apart."""
    B, S = input_ids_BS.shape
    batch = pack(input_ids_BS, attention_mask_BS, position_ids_BS, labels_BS)
    scored_N = batch.scored_N
    assert batch.targets_T is not None and scored_N is not None
    attention = PackedAttention(batch.row_lengths, input_ids_BS.device)
    hidden_TD = hidden_states(model, batch.input_ids_T, batch.positions_T, attention)
    hidden_ND, targets_N = hidden_TD.index_select(0, scored_N), batch.targets_T.index_select(0, scored_N)
    out = head(model)
    logps_N, entropy_N = chosen_logprobs(
        hidden_ND,
        out.weight_VD,
        targets_N,
        bias_V=out.bias_V,
        softcap=out.softcap,
        scale=out.scale,
        with_entropy=True,
    )
    assert entropy_N is not None
    top1_N = _is_top1(model, hidden_ND, targets_N, logps_N.detach(), entropy_N)
    slots_N = batch.slots_T.index_select(0, scored_N)

    def spread(values_N: torch.Tensor) -> torch.Tensor:
        return values_N.new_zeros(B * S).index_copy(0, slots_N, values_N).view(B, S)[:, :-1]

    return TokenScores(
        loss=-logps_N.sum() / max(len(scored_N), 1),
        log_probs=spread(logps_N),
        entropy=spread(entropy_N),
        is_top1=spread(top1_N),
        label_mask=spread(torch.ones_like(top1_N)),
    )


@torch.no_grad()
def _is_top1(
    model: nn.Module, hidden_ND: torch.Tensor, targets_N: torch.Tensor, logps_N: torch.Tensor, entropy_N: torch.Tensor
) -> torch.Tensor:
    r"""Whether each target is the likeliest token, ``[N]`` bool, with logits for the doubtful rows only.

    Over one half, a probability is the largest. And since :math:`H = -\sum p \log p \ge -\log p_{\max}`, one under
    :math:`e^{-H}` is not. In a model that has learned something, that leaves few rows.
    """
    slack = 1e-3  # log-probabilities and entropies are float32 sums over the vocabulary
    top1_N = logps_N > math.log(0.5) + slack
    doubtful = (~top1_N & (logps_N >= -entropy_N - slack)).nonzero().squeeze(-1)
    for rows in doubtful.split(_ROWS):
        top1_N[rows] = logits(model, hidden_ND[rows]).argmax(dim=-1) == targets_N[rows]
    return top1_N
