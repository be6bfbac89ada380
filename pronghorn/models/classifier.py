"""``model.forward`` of a sequence classifier or reward model: packed rows, scored at their last token."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from ..lora.projection import hooked
from .attention import PackedAttention
from .causal_lm import own_precision, say_once
from .forward import hidden_states
from .packed import pack
from .registry import spec_for
from .tree import unwrap

_SAME_SCORES = {"use_cache", "return_dict", "output_attentions", "output_hidden_states", "num_items_in_batch"}


def is_classifier(model: nn.Module) -> bool:
    """Whether ``model`` scores sequences (``*ForSequenceClassification``) rather than tokens."""
    base = unwrap(model)
    return type(base).__name__ in spec_for(base.config).classifiers


def classifier_forward(
    self: Any,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    labels: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Bound to a ``*ForSequenceClassification`` as its forward.

    Returns transformers' output with ``logits`` ``[B, num_labels]``: the score of each row's last token that is no
    padding (the rightmost id that is not ``pad_token_id``, as transformers finds it), from the packed walk, in which
    padding costs nothing. With ``labels`` also transformers' loss. What the packed walk cannot give runs transformers'
    own forward, which a line says when that happens in training.
    """
    last_B = None if input_ids is None else _last_tokens(self, input_ids)
    reason = _not_packable(self, input_ids, attention_mask, position_ids, last_B, kwargs)
    if reason is not None:
        if self.training and torch.is_grad_enabled():
            say_once(self, f"scores come from transformers' forward, slower, because of {reason}")
        return type(self).forward(
            self, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            inputs_embeds=inputs_embeds, labels=labels, **kwargs,
        )  # fmt: skip
    assert input_ids is not None and last_B is not None
    with own_precision(self, input_ids.device):
        batch = pack(input_ids, attention_mask)
        attention = PackedAttention(batch.row_lengths, input_ids.device)
        hidden_TD = hidden_states(self, batch.input_ids_T, batch.positions_T, attention)
        logits_BL = self.score(hidden_TD.index_select(0, _places(input_ids, attention_mask, last_B)))
    loss = None
    if labels is not None:
        loss = self.loss_function(logits=logits_BL, labels=labels, pooled_logits=logits_BL, config=self.config)
    if kwargs.get("return_dict") is False:
        return (logits_BL,) if loss is None else (loss, logits_BL)
    return SequenceClassifierOutputWithPast(loss=loss, logits=logits_BL)


def _last_tokens(model: Any, input_ids_BS: torch.Tensor) -> torch.Tensor | None:
    """Column of each row's scored token, ``[B]``; None where transformers has its own rule (no padding token)."""
    pad = model.config.get_text_config().pad_token_id
    if pad is None:
        return None
    columns_S = torch.arange(input_ids_BS.shape[1], device=input_ids_BS.device)
    return ((input_ids_BS != pad) * columns_S).argmax(-1)


def _not_packable(
    model: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    last_B: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> str | None:
    given = sorted(name for name, value in kwargs.items() if value is not None and name not in _SAME_SCORES)
    if given:
        return f"the argument {given[0]}"
    if input_ids is None or last_B is None:
        return "inputs_embeds in place of input_ids" if input_ids is None else "a config without pad_token_id"
    if position_ids is not None:
        return "position_ids, which may pack rows that one score cannot stand for"
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            return f"{name}=True"
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            return f"an attention_mask of {attention_mask.dim()} dimensions"
        if not bool(attention_mask.gather(1, last_B[:, None]).all()):
            return "an attention_mask that hides a row's last token"
    return "a hook on the decoder" if hooked(model.model) else None


def _places(input_ids_BS: torch.Tensor, attention_mask_BS: torch.Tensor | None, last_B: torch.Tensor) -> torch.Tensor:
    """Where the scored tokens stand among the packed ones, ``[B]``."""
    B, S = input_ids_BS.shape
    rows_B = torch.arange(B, device=input_ids_BS.device)
    if attention_mask_BS is None:
        return rows_B * S + last_B
    packed_BS = attention_mask_BS.reshape(-1).bool().long().cumsum(0).view(B, S) - 1
    return packed_BS[rows_B, last_B]
