"""Attach the fast path to one model instance: its layers' ``forward``, its loss, its checkpointing switch.

Methods are bound with ``MethodType`` to the instance: no class changes, other models in the process are untouched, and
a deep copy runs its own weights (a closure would go on running the original's).
"""

from __future__ import annotations

import logging
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..config.errors import ConfigError
from . import checkpointing
from .attention import Attention
from .causal_lm import causal_lm_forward
from .classifier import classifier_forward, is_classifier
from .packed_layer import ROUNDED, run_layer
from .parts import release_held
from .registry import spec_for
from .state import ATTRIBUTE, ModelState
from .tree import unwrap

logger = logging.getLogger("pronghorn")

_MODEL_METHODS = ("forward", "gradient_checkpointing_enable", "gradient_checkpointing_disable")


def _layer_forward(
    self: nn.Module,
    hidden_states: torch.Tensor,
    *args: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    packed_attention: Attention | None = None,
    **kwargs: Any,
) -> Any:
    """A decoder layer: packed tokens run the family's block, anything else transformers' own forward."""
    if packed_attention is not None:
        assert position_embeddings is not None
        return run_layer(self, hidden_states, position_embeddings, packed_attention)
    _say_unpacked(self)
    own = type(self).forward
    if kwargs.get("past_key_values") is not None:
        # A recomputed forward would write its keys into the cache twice, so with a cache nothing is recomputed.
        return own(self, hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
    return checkpointing.run(self, own, self, hidden_states, *args, position_embeddings=position_embeddings, **kwargs)


def _say_unpacked(layer: Any) -> None:
    """One line where a model trains by transformers' walk, as under a trainer that scores hidden states itself."""
    if (
        not (layer.training and torch.is_grad_enabled())
        or layer.self_attn.layer_idx
        or "pronghorn_unpacked" in vars(layer)
    ):
        return
    layer.pronghorn_unpacked = True
    print(
        "Pronghorn: layers run transformers' forward, slower than packed, as the call has no labels or another's head",
        flush=True,
    )


def _checkpointing_enable(self: Any, *_: Any, **__: Any) -> None:
    """What trainers call by default. An explicit "off" of the user's stands; the plan is Pronghorn's own.

    Arguments are transformers' settings of its own checkpointing (which differ between its versions), and say nothing
    about Pronghorn's.
    """
    state: ModelState | None = getattr(self, ATTRIBUTE, None)
    choice = True if state is None else state.use_gradient_checkpointing
    if checkpointing.mode_of(choice) == "off":
        logger.info("gradient checkpointing stays off: use_gradient_checkpointing=%r", choice)
    checkpointing.set_mode(self, choice)


def _checkpointing_disable(self: Any) -> None:
    checkpointing.set_mode(self, "off")


def attach(model: nn.Module) -> None:
    """Give ``model`` Pronghorn's forward and loss.

    It is a supported ``*ForCausalLM`` or ``*ForSequenceClassification``, or a PEFT model around one.

    Weights, names, config and state dict stay as they are. Calling it twice changes nothing.

    Raises:
        ConfigError: the family is unknown.
    """
    base = unwrap(model)
    spec = spec_for(base.config)
    if type(base).__name__ not in (*spec.architectures, *spec.classifiers):
        raise ConfigError(
            f"model={type(base).__name__} is not one that Pronghorn attaches to; expected one of "
            f"{', '.join((*spec.architectures, *spec.classifiers))}"
        )
    for layer in base.model.layers:
        layer.forward = MethodType(_layer_forward, layer)
    base.forward = MethodType(classifier_forward if is_classifier(base) else causal_lm_forward, base)
    base.gradient_checkpointing_enable = MethodType(_checkpointing_enable, base)
    base.gradient_checkpointing_disable = MethodType(_checkpointing_disable, base)
    state: ModelState | None = getattr(base, ATTRIBUTE, None)
    if state is not None:
        checkpointing.forget(base)  # an adapter may have been added since
        checkpointing.set_mode(base, state.use_gradient_checkpointing)


def detach(model: nn.Module) -> None:
    """Undo :func:`attach`: the instance runs its class's own methods again."""
    base = unwrap(model)
    checkpointing.forget(base)
    base.__dict__.pop(ROUNDED, None)
    release_held(base.model.layers)
    for layer in base.model.layers:
        layer.__dict__.pop("forward", None)
        layer.__dict__.pop("pronghorn_unpacked", None)
    for name in _MODEL_METHODS:
        base.__dict__.pop(name, None)


def is_attached(model: nn.Module) -> bool:
    """Whether the layers of ``model`` run Pronghorn's forward, also where a trainer has wrapped the model's own."""
    bound = [layer.__dict__.get("forward") for layer in unwrap(model).model.layers]
    return all(isinstance(forward, MethodType) and forward.__func__ is _layer_forward for forward in bound)
