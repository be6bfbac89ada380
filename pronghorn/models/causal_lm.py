"""``model.forward``: with labels the loss without logits, without labels what transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..kernels.linear_logprob import chosen_logprobs
from .attention import PackedAttention
from .forward import head, hidden_states
from .packed import IGNORE, pack

# Keyword arguments with which the packed walk computes the same loss as transformers.
_LOSS_KEYWORDS = {"num_items_in_batch", "use_cache", "return_dict", "output_attentions", "output_hidden_states"}


def _packable(attention_mask: torch.Tensor | None, past_key_values: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a labelled call can run packed; if not, transformers' forward answers, logits and all."""
    if past_key_values is not None or (attention_mask is not None and attention_mask.dim() != 2):
        return False
    if kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
        return False
    return set(kwargs) <= _LOSS_KEYWORDS


def causal_lm_forward(
    self: nn.Module,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Bound to a ``*ForCausalLM`` as its forward.

    With ``labels`` ``[B, S]`` (-100 ignored): cross-entropy of the next token, averaged over the labelled tokens, or
    over ``num_items_in_batch`` when the trainer passes it; ``logits`` is None, padding costs nothing, and rows packed
    by ``position_ids`` never attend or predict across one another. Without labels, or with arguments that need
    transformers' own walk (a cache, 4-d masks, attention or hidden-state outputs): transformers' forward.
    """
    if labels is not None and input_ids is not None and _packable(attention_mask, past_key_values, kwargs):
        loss = _packed_loss(self, input_ids, attention_mask, position_ids, labels, kwargs.get("num_items_in_batch"))
        if kwargs.get("return_dict") is False:
            return (loss,)
        return CausalLMOutputWithPast(loss=loss)
    if use_cache is None and past_key_values is None and self.training and torch.is_grad_enabled():
        use_cache = False  # a training forward keeps no cache, so that its layers can be recomputed
    return type(self).forward(
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        inputs_embeds=inputs_embeds,
        labels=labels,
        use_cache=use_cache,
        **kwargs,
    )


def _packed_loss(
    model: nn.Module,
    input_ids_BS: torch.Tensor,
    attention_mask_BS: torch.Tensor | None,
    position_ids_BS: torch.Tensor | None,
    labels_BS: torch.Tensor,
    denominator: torch.Tensor | int | None,
) -> torch.Tensor:
    """Mean negative log-probability of the labels over ``denominator`` tokens (default: the labelled ones)."""
    batch = pack(input_ids_BS, attention_mask_BS, position_ids_BS, labels_BS)
    assert batch.targets_T is not None
    scored = (batch.targets_T != IGNORE).nonzero().squeeze(-1)  # before the walk: it waits for the device
    attention = PackedAttention(batch.row_lengths, batch.input_ids_T.device)
    hidden_TD = hidden_states(model, batch.input_ids_T, batch.positions_T, attention)
    out = head(model)
    logps_N, _ = chosen_logprobs(
        hidden_TD.index_select(0, scored),
        out.weight_VD,
        batch.targets_T.index_select(0, scored),
        bias_V=out.bias_V,
        softcap=out.softcap,
        scale=out.scale,
    )
    if denominator is None:
        denominator = max(len(scored), 1)
    return -logps_N.sum() / denominator
