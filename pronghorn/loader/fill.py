"""Filling the empty model from its files: tensor by tensor to the device, quantized there, counted and hashed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..config.errors import ConfigError
from ..quant.bnb import from_bnb
from ..quant.linear4bit import Linear4bit
from ..weights.shards import Shard
from ..weights.stream import Fingerprints, stream
from .build import Plan


@torch.no_grad()
def fill(model: Any, shards: list[Shard], plan: Plan, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Put every tensor of ``shards`` in its place on ``device`` and return each file's fingerprint.

    Plain tensors are cast to ``dtype``; weights of a ``Linear4bit`` are quantized from the dtype of the file, one at a
    time, so that no more than a few 16-bit weights exist at once. Tensors in the 4-bit format are taken as they are;
    fresh ones are drawn from torch's CPU generator, normal with the config's ``initializer_range``.

    Raises:
        ConfigError: something stayed empty, naming it.
    """
    fingerprints = Fingerprints()
    owner = {part: name for name, parts in plan.parts.items() for part in parts}
    waiting: dict[str, dict[str, torch.Tensor]] = {}
    for _, entry, tensor in stream(shards, device, fingerprints):
        if entry.name in plan.ignored:
            continue
        if entry.name in owner:
            name = owner[entry.name]
            parts = waiting.setdefault(name, {})
            parts[entry.name] = tensor
            if set(parts) == plan.parts[name]:
                _linear(model, name).load_nf4(from_bnb(name, waiting.pop(name)))
            continue
        _place(model, entry.name, tensor, dtype)
    for name in sorted(plan.fresh):
        shape = model.get_parameter(name).shape
        drawn = torch.randn(shape, dtype=torch.float32) * model.config.get_text_config().initializer_range
        _place(model, name, drawn.to(device), dtype)
    model.tie_weights(missing_keys=set(plan.tied))
    rebuild_buffers(model, device)
    empty = [name for name, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
    if empty:
        raise ConfigError(f"model: {empty[0]!r} stayed empty ({len(empty)} tensors); its files do not fill it")
    return {shard.path.name: fingerprints.of(shard) for shard in shards}


def _linear(model: nn.Module, weight_name: str) -> Linear4bit:
    module = model.get_submodule(weight_name.rpartition(".")[0])
    assert isinstance(module, Linear4bit)
    return module


def _place(model: nn.Module, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    """Put one plain tensor at the dotted ``name``."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, Linear4bit) and leaf == "weight":
        module.load_weight(tensor.float() if tensor.dtype == torch.float64 else tensor)
    elif leaf in module._buffers:
        module._buffers[leaf] = tensor.to(dtype)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor.to(dtype), requires_grad=False))


def rebuild_buffers(model: Any, device: torch.device) -> None:
    """Make anew, in float32, the buffers that no file holds (the rotary frequencies), by their modules' constructors.

    Raises:
        ConfigError: a module whose buffers cannot be made from the config alone.
    """
    for name, module in list(model.named_modules()):
        empty = [key for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not empty or isinstance(module, Linear4bit):
            continue
        config = getattr(module, "config", None)
        if config is None:
            raise ConfigError(f"{name}: its buffers {empty} are in no file, and it keeps no config to make them from")
        with torch.device("cpu"):
            fresh = type(module)(config)
        for key in empty:
            module._buffers[key] = fresh._buffers[key].to(device)
