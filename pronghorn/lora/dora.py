"""DoRA (arXiv:2402.09353) over Pronghorn's linears: magnitude per output row, direction from base + LoRA."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from ..quant.linear4bit import Linear4bit


def dense_weight(base: nn.Module) -> torch.Tensor:
    """The weight ``[out, in]`` of a linear, dequantized to its compute dtype where it is 4-bit. No gradient."""
    if isinstance(base, Linear4bit):
        return base.nf4.dequantize()
    return base.weight.detach()  # type: ignore[operator,union-attr]


def row_norm(module: Any, adapter: str) -> torch.Tensor:
    """``||W + scaling * B A||`` of each output row, ``[out]``, in the masters' dtype and without gradient (eq. 11)."""
    with torch.no_grad():
        a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        weight = dense_weight(module.get_base_layer()).to(a.dtype)
        return torch.linalg.vector_norm(weight + module.scaling[adapter] * (b @ a), dim=1)


class DoraVariant(DoraLinearVariant):
    """PEFT's DoRA with the norm taken in the masters' dtype. Merging and unmerging are PEFT's."""

    @staticmethod
    def init(module: Any, adapter_name: str, **kwargs: Any) -> None:
        """Start the magnitude at the row norms, so that a fresh adapter changes nothing."""
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        layer = DoraLinearLayer(fan_in_fan_out=False)
        layer.weight = nn.Parameter(row_norm(module, adapter_name))
        module.lora_magnitude_vector[adapter_name] = layer

    @staticmethod
    def forward(module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """``m / norm * (W + scaling B A) x + bias``, given ``result = W x + bias``; the norm carries no gradient.

        Under dropout the base is applied to the dropped ``x`` too, as PEFT does.
        """
        base = module.get_base_layer()
        dropout = module.lora_dropout[active_adapter]
        undropped = isinstance(dropout, nn.Identity) or not module.training
        dropped = x if undropped else dropout(x)
        plain = result if undropped else base(dropped)
        if base.bias is not None:
            plain = plain - base.bias
        norm = row_norm(module, active_adapter)
        scale = (module.lora_magnitude_vector[active_adapter].weight / norm).to(x.dtype)
        a, b = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        delta = (dropped @ a.to(x.dtype).T) @ b.to(x.dtype).T * module.scaling[active_adapter]
        return result + (scale - 1) * plain + scale * delta
