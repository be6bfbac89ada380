"""The LoRA layer of Pronghorn's models: PEFT's linear, with float32 masters rounded to the input's dtype."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import nn

from ..config.errors import ConfigError
from ..quant.linear4bit import Linear4bit
from .dora import DoraVariant


class LoraLinear(PeftLoraLinear):
    """``y = base(x) + B(A(dropout(x))) * scaling`` (LoRA, arXiv:2106.09685, eq. 3), base plain or ``Linear4bit``.

    ``A [r, in]`` and ``B [out, r]`` are float32 masters whatever the base's dtype (float64 over a float64 base), and
    are rounded to the dtype of ``x [..., in]`` in the forward: at a learning rate of 5e-6 a 16-bit ``A`` would hardly
    move. What PEFT does with adapters (several at once, disabling, DoRA, merging into a 16-bit base) holds here too.

    Raises:
        ConfigError: a merge into 4-bit weights, which would have to be rounded to 4 bits again.
    """

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """PEFT's registry of LoRA variants: plain LoRA and DoRA; any other raises when the adapter is made."""
        return {(): None, ("use_dora",): DoraVariant}

    def lora_delta(self, adapter: str, x: torch.Tensor) -> torch.Tensor:
        """What ``adapter`` adds: ``B(A(dropout(x))) * scaling``, ``[..., out]`` in the dtype of ``x [..., in]``."""
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        low = F.linear(self.lora_dropout[adapter](x), a.weight.to(x.dtype))
        bias = None if b.bias is None else b.bias.to(x.dtype)
        return F.linear(low, b.weight.to(x.dtype), bias) * self.scaling[adapter]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``[..., in] -> [..., out]`` with the active adapters. PEFT's per-row ``adapter_names`` go PEFT's own way."""
        if kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        for name in ("adapter_names", "alora_offsets"):  # PEFT's hooks pass them as None
            kwargs.pop(name, None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        for name in self.active_adapters:
            if name not in self.lora_A:
                continue
            variant = self.lora_variant.get(name)
            if variant is None:
                result = result + self.lora_delta(name, x)
            else:
                result = variant.forward(self, active_adapter=name, x=x, result=result)
        return result.to(dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into a 16- or 32-bit base weight, as PEFT does."""
        if isinstance(self.get_base_layer(), Linear4bit):
            raise ConfigError(
                "merge: the base weights are 4-bit, and rounding a merged weight to 4 bits again would change the "
                'frozen base; use model.save_pretrained_merged(dir, tokenizer, save_method="merged_16bit"), which '
                "merges into the 16-bit original"
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """PEFT's hook for placing a new adapter; PEFT would round it to the base's dtype on the way."""
        base = self.get_base_layer().weight
        device = base.device if device is None else device
        if device.type == "meta":
            return
        dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
        for container_name in self.adapter_layer_names:
            container = getattr(self, container_name, None)
            if not isinstance(container, nn.ModuleDict | nn.ParameterDict) or adapter_name not in container:
                continue
            if all(p.device.type != "meta" for p in container[adapter_name].parameters()):
                container[adapter_name] = container[adapter_name].to(device=device, dtype=dtype)
