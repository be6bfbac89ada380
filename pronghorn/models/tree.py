"""Finding the parts of a wrapped model: the transformers model under PEFT, its decoder, its layers."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrap(model: nn.Module) -> Any:
    """The transformers ``*ForCausalLM`` inside ``model``, through PEFT's wrappers and DDP's.

    Typed ``Any``: transformers' models carry their parts as dynamic attributes.
    """
    inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    if hasattr(inner, "peft_config") and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return inner


def decoder(model: nn.Module) -> Any:
    """The decoder stack (``embed_tokens``, ``layers``, ``norm``, ``rotary_emb``) of ``model``."""
    return unwrap(model).model


def layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order."""
    return list(decoder(model).layers)
