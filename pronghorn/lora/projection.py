"""One projection as the fused path reads it: base weight, LoRA matrices and scale, or why it cannot be fused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..quant.linear4bit import Linear4bit
from .layer import LoraLinear

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class Projection:
    """``y = x W^T + bias + scaling * (x A^T) B^T``; reads the parameters of the modules it stands for, owns none.

    Attributes:
        base: holds W ``[O, I]``, in 16 or 32 bits or as ``Linear4bit``, and the bias.
        a_rI, b_Or: the float32 masters, or None without an active adapter.
        scaling: ``alpha / r`` (``alpha / sqrt(r)`` with rsLoRA).
    """

    base: nn.Linear
    a_rI: nn.Parameter | None = None
    b_Or: nn.Parameter | None = None
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        return 0 if self.a_rI is None else self.a_rI.shape[0]

    def weight(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """W ``[O, I]`` in ``dtype``: the parameter itself, or the 4-bit codes dequantized (into ``out`` if given)."""
        if isinstance(self.base, Linear4bit):
            return self.base.nf4.dequantize(dtype, out)
        return self.base.weight if self.base.weight.dtype == dtype else self.base.weight.to(dtype)


@dataclass(frozen=True)
class Group:
    """Projections that read one input, their adapters rounded to the compute dtype.

    Attributes:
        members: the projections.
        a_RI: the A of all of them, one under another, ``[R, I]``; None where none has an adapter.
        bs_Or: the B of each, or None.
        spans: where each projection's rank lies among the R rows of ``a_RI``.
    """

    members: tuple[Projection, ...]
    a_RI: torch.Tensor | None
    bs_Or: tuple[torch.Tensor | None, ...]
    spans: tuple[slice, ...]

    @property
    def rank(self) -> int:
        return 0 if self.a_RI is None else self.a_RI.shape[0]


@torch.no_grad()
def group(projections: tuple[Projection, ...], dtype: torch.dtype) -> Group:
    """``projections`` with their masters rounded to ``dtype``, as ``LoraLinear`` rounds them in each forward."""
    parts = [p.a_rI.detach().to(dtype) for p in projections if p.a_rI is not None]
    a_RI = None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)
    bs_Or = tuple(None if p.b_Or is None else p.b_Or.detach().to(dtype) for p in projections)
    spans, start = [], 0
    for p in projections:
        spans.append(slice(start, start + p.rank))
        start += p.rank
    return Group(projections, a_RI, bs_Or, tuple(spans))


def hooked(module: nn.Module) -> bool:
    """Whether anything outside watches calls of ``module`` itself."""
    return any(getattr(module, name, None) for name in _HOOKS)


def read_projection(module: Any) -> Projection | str:
    """``module`` as a :class:`Projection`, or in words why its own ``forward`` has to run."""
    if hooked(module):
        return f"a hook on {type(module).__name__}"
    if type(module) in (nn.Linear, Linear4bit):
        return _plain(module)
    if not isinstance(module, LoraLinear):
        return f"{type(module).__name__} in place of a linear layer"
    base = module.get_base_layer()
    plain = _plain(base) if not hooked(base) else "a hook on the base layer"
    if isinstance(plain, str) or module.merged or module.disable_adapters:
        return plain
    active = [name for name in module.active_adapters if name in module.lora_A]
    if not active:
        return plain
    if len(active) > 1:
        return f"{len(active)} adapters active at once"
    (name,) = active
    a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
    if module.lora_variant.get(name) is not None:
        return "DoRA"
    if module.training and getattr(dropout, "p", 0.0) > 0:
        return "lora_dropout"
    if b.bias is not None:
        return "a bias on lora_B"
    if any(hooked(part) for part in (a, b, dropout)):
        return "a hook on a LoRA matrix"
    return Projection(base, a.weight, b.weight, float(module.scaling[name]))


def _plain(base: nn.Linear) -> Projection | str:
    if type(base) not in (nn.Linear, Linear4bit):
        return f"{type(base).__name__} in place of a linear layer"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "a base weight or bias that trains"
    return Projection(base)
