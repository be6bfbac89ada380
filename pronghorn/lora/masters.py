"""Trained copies of whole modules (``modules_to_save``) as float32 masters, as LoRA's A and B are.

At the learning rates of fine-tuning a 16-bit embedding would hardly move, and a loss scaler refuses float16 gradients.
The copies compute as before: each casts to the dtype that the model computes in, a linear its weight, any other module
(an embedding, a norm) its output.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..config.errors import ConfigError

_HALVES = (torch.bfloat16, torch.float16)


def keep_masters(model: nn.Module) -> None:
    """Turn the 16-bit copies in ``model`` into float32 masters.

    Raises:
        ConfigError: a float16 parameter would train without a master (a bias of the base), which no loss scaler takes.
    """
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for copied in wrapper.modules_to_save.values():
                _keep(copied)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            raise ConfigError(
                f"get_peft_model: {name} would train in float16, whose gradients a loss scaler refuses; give "
                'bias="none", or load the model with dtype=torch.float32'
            )


def _keep(copied: nn.Module) -> None:
    dtypes = {parameter.dtype for parameter in copied.parameters() if parameter.is_floating_point()}
    if len(dtypes) != 1 or not dtypes <= set(_HALVES):
        return
    (computed,) = dtypes
    copied.to(torch.float32)
    if type(copied) is nn.Linear:
        copied.forward = MethodType(_linear, copied)  # type: ignore[method-assign]
    else:
        copied.register_forward_hook(_TO[computed])


def _linear(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """``nn.Linear.forward`` in the dtype of ``x``."""
    return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def _to_bfloat16(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.bfloat16()


def _to_float16(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
    return output.half()


_TO = {torch.bfloat16: _to_bfloat16, torch.float16: _to_float16}
"""Hooks without state, so that a deep copy needs none of its own."""
