"""The shape of a live model, read from its modules: what is there now, adapters and trained weights included."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...quant.linear4bit import Linear4bit
from ..registry import spec_for
from ..state import ATTRIBUTE, ModelState
from ..tree import unwrap
from .shape import PROJECTIONS, ModelShape, optimizer_bytes, optimizer_kind


def read_shape(model: nn.Module, optimizer: str = "paged_adamw_8bit") -> ModelShape:
    """The :class:`ModelShape` of ``model`` as it stands.

    Args:
        model: a Pronghorn model, with or without PEFT around it.
        optimizer: transformers' name of it, which the model cannot tell.

    Raises:
        ConfigError: an unknown optimizer.
    """
    base = unwrap(model)
    config, layer = base.config, base.model.layers[0]
    modules: dict[str, Any] = {name: _find(layer, name) for name in PROJECTIONS}
    trained = [p for p in model.parameters() if p.requires_grad]
    masters = {id(p): p for name, p in model.named_parameters() if "lora_" in name}
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    weights = sum(t.nbytes for key, t in tensors.items() if key not in masters)
    dense = _base_layer(modules["q_proj"])
    quant = "nf4" if isinstance(dense, Linear4bit) else _DTYPES.get(dense.weight.dtype, "fp32")
    state: ModelState | None = base.__dict__.get(ATTRIBUTE)
    compute: torch.dtype = base.dtype if state is None else state.compute_dtype
    H = int(config.num_attention_heads)
    E = int(getattr(config, "head_dim", None) or config.hidden_size // H)
    return ModelShape(
        layers=len(base.model.layers),
        hidden=int(config.hidden_size),
        inner=int(config.intermediate_size),
        heads=H,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or H),
        head_dim=E,
        vocab=int(config.vocab_size),
        compute_bytes=compute.itemsize,
        quant=quant,
        weight_bytes=weights,
        ranks=tuple(_rank(modules[name]) for name in PROJECTIONS),
        trained=sum(p.numel() for p in trained),
        trained_tensors=len(trained),
        trained_bytes=sum(p.nbytes for p in trained),
        adapter_bytes=sum(p.nbytes for p in masters.values()),
        optimizer_bytes=optimizer_bytes(optimizer),
        optimizer_kind=optimizer_kind(optimizer),
        fused=not isinstance(spec_for(config).read_parts(layer), str),
        trains_base=bool(dense.weight.requires_grad),
    )


_DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def _find(layer: nn.Module, leaf: str) -> Any:
    """The module named ``leaf`` below ``layer``."""
    return next(module for name, module in layer.named_modules() if name.rpartition(".")[2] == leaf)


def _base_layer(module: Any) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _rank(module: Any) -> int:
    """Rank of the adapter on ``module``, of the largest where there are several, 0 without."""
    return max((int(a.weight.shape[0]) for a in getattr(module, "lora_A", {}).values()), default=0)
