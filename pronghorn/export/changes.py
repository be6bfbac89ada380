"""What training changed, weight by weight: the adapter's deltas, trained copies, or a fully fine-tuned model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as PeftLinear
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..config.errors import ConfigError
from ..lora.active import adapter_names, live_names
from ..models import state_of, unwrap


class Changes:
    """Turns a tensor of the original model into the trained one.

    Args:
        model: a Pronghorn model, with or without an adapter. The live adapter counts, loaded ones do not.

    Raises:
        ConfigError: an adapter that is merged into the base, or of a kind that has no merged weight.
    """

    def __init__(self, model: nn.Module) -> None:
        self._lora: dict[str, tuple[Any, list[str]]] = {}
        self._replaced: dict[str, torch.Tensor] = {}
        base = unwrap(model)
        if adapter_names(model):
            self._read_adapter(model, base, live_names(model))
        elif state_of(model).full_finetuning:
            self._replaced = {name: p.detach() for name, p in base.named_parameters(remove_duplicate=False)}

    def __contains__(self, name: str) -> bool:
        return name in self._lora or name in self._replaced

    def names(self) -> set[str]:
        """Names, as in the original's files, of the tensors that training changed."""
        return set(self._lora) | set(self._replaced)

    def _read_adapter(self, model: Any, base: nn.Module, live: list[str]) -> None:
        for name, module in base.named_modules():
            if isinstance(module, LoraLayer):
                if module.merged_adapters:
                    raise ConfigError("save_pretrained_merged: the adapter is merged; call model.unmerge_adapter()")
                here = [a for a in live if a in module.lora_A or a in module.lora_embedding_A]
                if here:
                    self._lora[f"{name}.weight"] = (module, here)
            elif isinstance(module, ModulesToSaveWrapper):
                for trained in (module.modules_to_save[a] for a in live if a in module.modules_to_save):
                    self._replaced |= {f"{name}.{key}": p.detach() for key, p in trained.named_parameters()}
            elif isinstance(module, AuxiliaryTrainingWrapper):
                raise ConfigError(
                    f"save_pretrained_merged: {name} is a {type(module).__name__}, which cannot be merged"
                )
        if any(model.peft_config[a].bias != "none" for a in live):
            for name, parameter in base.named_parameters():
                if name.endswith(".bias") and "lora_" not in name and "modules_to_save" not in name:
                    self._replaced[name.replace(".base_layer.", ".")] = parameter.detach()

    @torch.no_grad()
    def apply(self, name: str, original: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The trained tensor ``name``, given the ``original`` one on the CPU, in ``dtype`` (the original's by default).

        ``round(W + scaling * B A)`` with the sum in float32 (float64 for a float64 original) and one rounding; for
        DoRA ``m / ||W + scaling * B A|| * (W + scaling * B A)`` row by row.
        """
        dtype = original.dtype if dtype is None else dtype
        if name in self._replaced:
            return self._replaced[name].to("cpu", dtype)
        if name not in self._lora:
            return original.to(dtype)
        module, adapters = self._lora[name]
        work = torch.float64 if original.dtype == torch.float64 else torch.float32
        merged = original.to(work)
        for adapter in adapters:
            merged = merged + _delta(module, adapter, work)
            if module.use_dora.get(adapter, False):
                if len(adapters) > 1 or not isinstance(module, PeftLinear):
                    raise ConfigError("save_pretrained_merged: DoRA merges alone and on linear layers only")
                magnitude = module.lora_magnitude_vector[adapter].weight.to("cpu", work)
                merged = merged * (magnitude / torch.linalg.vector_norm(merged, dim=1)).unsqueeze(1)
        if not torch.isfinite(merged).all():
            raise ConfigError(f"save_pretrained_merged: {name} has values that are not finite; the adapter is broken")
        return merged.to(dtype)


def _delta(module: Any, adapter: str, dtype: torch.dtype) -> torch.Tensor:
    """``scaling * B A`` of one layer, in the layout of its weight, on the CPU."""
    if module.lora_bias.get(adapter, False):
        raise ConfigError("save_pretrained_merged: an adapter with lora_bias=True cannot be merged; save it as lora")
    if adapter in module.lora_A:
        a = module.lora_A[adapter].weight.detach().to("cpu", dtype)
        b = module.lora_B[adapter].weight.detach().to("cpu", dtype)
        return (b @ a) * module.scaling[adapter]
    a = module.lora_embedding_A[adapter].detach().to("cpu", dtype)
    b = module.lora_embedding_B[adapter].detach().to("cpu", dtype)
    return (b @ a).T * module.scaling[adapter]
