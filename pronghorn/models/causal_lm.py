"""``model.forward``: with labels the loss without logits, without labels what transformers does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..config.errors import ConfigError
from ..kernels.linear_cross_entropy import linear_cross_entropy
from ..lora.projection import hooked
from .attention import PackedAttention
from .forward import head, hidden_states
from .packed import pack
from .token_scores import token_scores

# Keyword arguments with which the packed walk computes the same loss as transformers. The second line is what collators
# add for flash attention's sake: row boundaries, which position_ids give as well.
_LOSS_KEYWORDS = {
    "num_items_in_batch", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "token_scores",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx",
}  # fmt: skip


def not_packable(
    model: Any,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past_key_values: Any,
    kwargs: dict[str, Any],
) -> str | None:
    """Why a labelled call cannot run packed, in words; None if it can. transformers' forward answers what cannot."""
    given = {name for name, value in kwargs.items() if value is not None}
    if input_ids is None:
        return "inputs_embeds in place of input_ids"
    if past_key_values is not None:
        return "past_key_values"
    if attention_mask is not None and attention_mask.dim() != 2:
        return f"an attention_mask of {attention_mask.dim()} dimensions"
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            return f"{name}=True"
    if position_ids is None and "cu_seq_lens_q" in given:
        return "cu_seq_lens_q without position_ids"
    unknown = sorted(given - _LOSS_KEYWORDS)
    if unknown:
        return f"the argument {unknown[0]}"
    # The packed walk calls the embedding, the layers and the last norm; these two it reads.
    passed_by = [part for part in (model.model, model.lm_head) if hooked(part)]
    return f"a hook on {type(passed_by[0]).__name__}" if passed_by else None


def say_once(model: Any, line: str) -> None:
    said: set[str] = model.__dict__.setdefault("pronghorn_said", set())
    if line not in said:
        said.add(line)
        print(f"Pronghorn: {line}", flush=True)


def own_precision(model: Any, device: torch.device) -> torch.autocast:
    """Autocast off: the model computes in the dtype it was loaded in, and its kernels cast by themselves."""
    if torch.is_autocast_enabled(device.type):
        asked, own = torch.get_autocast_dtype(device.type), model.dtype
        if asked != own:
            short = [str(dtype).removeprefix("torch.") for dtype in (asked, own)]
            say_once(model, f"autocast to {short[0]} has no effect: the model was loaded to compute in {short[1]}")
    return torch.autocast(device.type, enabled=False)


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
    by ``position_ids`` never attend or predict across one another. With ``token_scores=True`` as well: a
    :class:`TokenScores`. Without labels, or with arguments that need transformers' own walk (a cache, 4-d masks,
    attention or hidden-state outputs): transformers' forward, which a line says when that happens in training.
    """
    if labels is not None:
        reason = not_packable(self, input_ids, attention_mask, position_ids, past_key_values, kwargs)
        if reason is None:
            assert input_ids is not None
            with own_precision(self, input_ids.device):
                if kwargs.get("token_scores"):
                    return token_scores(self, input_ids, attention_mask, position_ids, labels)
                denominator = kwargs.get("num_items_in_batch")
                loss = _packed_loss(self, input_ids, attention_mask, position_ids, labels, denominator)
            if kwargs.get("return_dict") is False:
                return (loss,)
            return CausalLMOutputWithPast(loss=loss)
        if kwargs.pop("token_scores", False):
            raise ConfigError(f"token_scores=True cannot be had with {reason}; leave it out")
        if self.training and torch.is_grad_enabled():
            say_once(self, f"the loss comes from transformers' forward with its logits, slower, because of {reason}")
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
    assert batch.targets_T is not None and batch.scored_N is not None
    attention = PackedAttention(batch.row_lengths, batch.input_ids_T.device)
    hidden_TD = hidden_states(model, batch.input_ids_T, batch.positions_T, attention)
    out = head(model)
    return linear_cross_entropy(
        hidden_TD.index_select(0, batch.scored_N),
        out.weight_VD,
        batch.targets_T.index_select(0, batch.scored_N),
        max(len(batch.scored_N), 1) if denominator is None else denominator,
        bias_V=out.bias_V,
        softcap=out.softcap,
        scale=out.scale,
    )
