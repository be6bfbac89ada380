"""Which way a decoder layer runs over packed tokens: fused where it can be, else by its own sub-modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..config.errors import ConfigError
from ..lora.rounded import Rounded
from . import checkpointing
from .attention import Attention, PackedAttention
from .fused_block import Saving, fused_block, layer_forward
from .offload import host_store
from .parts import HELD, Groups, Held, HeldOf, Parts, held_weights, release_held
from .registry import spec_for
from .state import ATTRIBUTE
from .tree import layers, unwrap

PREPARED = "pronghorn_prepared"
"""Attribute of a layer while :func:`prepared` holds: its parts and its adapters in the compute dtype."""

ROUNDED = "pronghorn_rounded"
"""Attribute of the transformers model: what :func:`prepared` made last, to be used again."""


def _parts(layer: Any) -> Parts | str:
    """The layer's pieces as it stands, or in words why its own sub-modules have to be called."""
    return spec_for(layer.self_attn.config).read_parts(layer)


def run_layer(
    layer: Any, hidden_TD: torch.Tensor, rope_TE: tuple[torch.Tensor, torch.Tensor], attention: Attention
) -> torch.Tensor:
    """One decoder layer over packed tokens, ``[T, D]`` to ``[T, D]``.

    The layer is one fused node, unless something on it needs its own sub-modules called (dropout, DoRA, hooks, trained
    norms or base weights): that slower way is said in one line, with the reason.
    """
    prepared_: _Ready | None = layer.__dict__.get(PREPARED)
    reason: str | None = None
    if prepared_ is not None:
        reason = prepared_.holds(layer, hidden_TD.dtype)
        ready = prepared_.parts, prepared_.groups
    else:
        parts = _parts(layer)
        if isinstance(parts, str):
            reason = parts
        else:
            ready = parts, parts.rounded(hidden_TD.dtype)
    if reason is not None:
        layer.__dict__.pop(PREPARED, None)
        release_held([layer])
        _say_once(layer, reason, attention)
        block = spec_for(layer.self_attn.config).block
        return checkpointing.run(layer, block, layer, hidden_TD, rope_TE, attention)
    parts, groups = ready
    if not torch.is_grad_enabled():
        return layer_forward(parts, groups, hidden_TD, rope_TE, attention)
    if not isinstance(attention, PackedAttention):
        raise ConfigError(
            f"attention={type(attention).__name__} has no backward pass: train with PackedAttention, or run this walk "
            "under torch.no_grad()"
        )
    return fused_block(parts, groups, hidden_TD, rope_TE, attention, _saving(layer, ready, hidden_TD))


def _saving(layer: Any, ready: tuple[Parts, Groups], hidden_TD: torch.Tensor) -> Saving:
    """What the plan says for this layer, now."""
    own, step = checkpointing.plan_for(layer), checkpointing.step_plan_for(layer)
    store = host_store(hidden_TD.device.index) if own.host and hidden_TD.is_cuda else None
    if step is None or not step.cached_weights:
        release_held([layer])
        return Saving(own.keep, store, None if step is None else step.mlp_rows)
    return Saving(own.keep, store, step.mlp_rows, _held(layer, ready, hidden_TD.dtype))


def _held(layer: Any, ready: tuple[Parts, Groups], dtype: torch.dtype) -> Held:
    """The layer's weights in ``dtype``, made once, and again if something wrote to the 4-bit ones."""
    parts, groups = ready
    key = (dtype, parts.key, *(p.base.weight._version for p in parts.projections))
    found: HeldOf | None = layer.__dict__.get(HELD)
    if found is None or found.key != key:
        release_held([layer])
        found = layer.__dict__[HELD] = HeldOf(key, held_weights(groups, dtype))
    else:
        found.refresh(groups)
    return found.weights


class _Ready:
    """One layer's parts and rounded adapters, and whether this walk has seen that they still hold."""

    def __init__(self, parts: Parts, groups: Groups, dtype: torch.dtype) -> None:
        self.parts, self.groups, self.checked = parts, groups, False
        self.made_of: object = (dtype, parts.key)  # as it was: the parts read their modules anew

    def holds(self, layer: Any, dtype: torch.dtype) -> str | None:
        """Make sure of it once a walk; gives, in words, why the layer's own sub-modules have to be called now.

        The layers are looked at one by one as the walk comes to them: all of them first would leave the GPU waiting.
        """
        if self.checked:
            return None
        now = _parts(layer)
        if isinstance(now, str):
            return now
        made_of = dtype, now.key
        if made_of != self.made_of:
            self.parts, self.groups, self.made_of = now, now.rounded(dtype), made_of
        self.checked = True
        return None


class _Made:
    """Fused layers of a model with their parts and rounded adapters; deep copies of the model make their own."""

    def __init__(self, fused: list[tuple[Any, Parts]], dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.rounded = Rounded([members for _, parts in fused for members in parts.members], dtype)
        groups = self.rounded.groups
        self.layers = [
            (layer, _Ready(parts, Groups(*groups[4 * i : 4 * i + 4]), dtype)) for i, (layer, parts) in enumerate(fused)
        ]

    def serves(self, all_layers: list[nn.Module], dtype: torch.dtype) -> bool:
        """Whether it still has the layers that can be fused: those that it lacks are looked at, the others later."""
        if dtype != self.dtype:
            return False
        own = {id(layer) for layer, _ in self.layers}
        rest = [layer for layer in all_layers if id(layer) not in own]
        return len(rest) + len(own) == len(all_layers) and all(isinstance(_parts(layer), str) for layer in rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Read every layer and round all adapters once, for a walk, or for many without gradients under one policy.

    Weights, active adapter, training flags and hooks must not change inside. Rounding happens anew each time, into the
    same memory (2 bytes a parameter of the adapters), so the next optimizer step shows in the next walk. Inside another
    of the same model it does nothing.
    """
    base = unwrap(model)
    state = base.__dict__.get(ATTRIBUTE)
    all_layers = layers(base)
    if state is None or any(PREPARED in layer.__dict__ for layer in all_layers):
        yield
        return
    made: _Made | None = base.__dict__.get(ROUNDED)
    if made is None or not made.serves(all_layers, state.compute_dtype):
        base.__dict__.pop(ROUNDED, None)
        fused = [(layer, parts) for layer in all_layers if not isinstance(parts := _parts(layer), str)]
        made = base.__dict__[ROUNDED] = _Made(fused, state.compute_dtype)
    else:
        made.rounded.refresh()
    before = [(ready, ready.parts) for _, ready in made.layers]
    try:
        for layer, ready in made.layers:
            ready.checked = False
            layer.__dict__[PREPARED] = ready
        yield
    finally:
        stale = any(PREPARED not in layer.__dict__ for layer, _ in made.layers)
        for layer, _ in made.layers:
            layer.__dict__.pop(PREPARED, None)
        if stale or any(ready.parts is not parts for ready, parts in before):
            base.__dict__.pop(ROUNDED, None)


def _say_once(layer: Any, reason: str, attention: Attention) -> None:
    """Print a reason when the first layer of a walk (they share ``attention``) has it anew."""
    if getattr(layer, "pronghorn_unfused", None) == reason:
        return
    layer.pronghorn_unfused = reason
    said: set[str] = vars(attention).setdefault("said", set())
    if reason not in said:
        said.add(reason)
        print(f"Pronghorn: layers run by their own modules, slower than fused, because of {reason}", flush=True)


def prepared_layers(model: nn.Module) -> list[tuple[Parts, Groups]] | None:
    """Inside :func:`prepared`: every layer's pieces and rounded adapters as they stand now, or None where a layer has
    to run by its own modules. Within one ``prepared``, and as long as nothing about the layers changes, the groups are
    the same objects from one time to the next, and their memory with them.
    """
    base = unwrap(model)
    dtype = base.__dict__[ATTRIBUTE].compute_dtype
    found: list[tuple[Parts, Groups]] = []
    for layer in layers(base):
        ready: _Ready | None = layer.__dict__.get(PREPARED)
        if ready is None or ready.holds(layer, dtype) is not None:
            return None
        found.append((ready.parts, ready.groups))
    return found
