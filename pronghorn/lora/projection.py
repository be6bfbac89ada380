"""One projection as the fused path reads it: base weight, LoRA matrices and scale, or why it cannot be fused."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
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
    """Projections that read one input, their adapters rounded to the compute dtype; outputs lie side by side.

    Attributes:
        members: the projections.
        a_RI: the A of all of them, one under another, ``[R, I]``; None where none has an adapter.
        bs_Or: the B of each, or None.
        spans: where each projection's rank lies among the R rows of ``a_RI``.
        columns: where each projection's outputs lie in ``[T, O]``, O being the sum of all.
    """

    members: tuple[Projection, ...]
    a_RI: torch.Tensor | None
    bs_Or: tuple[torch.Tensor | None, ...]
    spans: tuple[slice, ...]
    columns: tuple[slice, ...]

    @property
    def rank(self) -> int:
        return 0 if self.a_RI is None else self.a_RI.shape[0]

    @property
    def outputs(self) -> int:
        return self.columns[-1].stop


def _spans(sizes: list[int]) -> tuple[slice, ...]:
    ends = list(itertools.accumulate(sizes))
    return tuple(slice(end - size, end) for size, end in zip(sizes, ends))


@torch.no_grad()
def groups(parts: Sequence[tuple[Projection, ...]], dtype: torch.dtype) -> list[Group]:
    """Each tuple of projections as a :class:`Group`, masters rounded to ``dtype`` as ``LoraLinear`` rounds them.

    All masters are rounded by one call into one buffer: a layer has 14 of them, and a launch each would cost more
    than the rounding.
    """
    masters: list[torch.Tensor] = []
    for projections in parts:
        masters += [p.a_rI.detach() for p in projections if p.a_rI is not None]
        masters += [p.b_Or.detach() for p in projections if p.b_Or is not None]
    rounded: list[torch.Tensor] = []
    flat = torch.empty(0)
    if masters:
        flat = torch.empty(sum(m.numel() for m in masters), dtype=dtype, device=masters[0].device)
        rounded = [piece.view(m.shape) for piece, m in zip(flat.split([m.numel() for m in masters]), masters)]
        torch._foreach_copy_(rounded, masters)
    made, at, start = [], 0, 0
    for projections in parts:
        adapted = [p for p in projections if p.a_rI is not None]
        rank = sum(p.rank for p in adapted)
        a_RI = None
        if adapted:
            width = rounded[at].shape[1]
            a_RI = flat[start : start + rank * width].view(rank, width)
            start += rank * width + sum(p.b_Or.numel() for p in adapted if p.b_Or is not None)
            at += len(adapted)
        bs_Or: list[torch.Tensor | None] = []
        for p in projections:
            bs_Or.append(None if p.b_Or is None else rounded[at])
            at += p.b_Or is not None
        ranks, widths = [p.rank for p in projections], [p.base.out_features for p in projections]
        made.append(Group(projections, a_RI, tuple(bs_Or), _spans(ranks), _spans(widths)))
    return made


STACK = 1 << 25
"""Weights of so many elements at most are dequantized side by side and multiplied at once (64 MiB in 16 bits)."""

Weights = list[tuple[slice, torch.Tensor]]
"""Pieces of a group's stacked weight: ``(output columns, W [columns, I])``."""


def weights(group: Group, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The group's weights in ``dtype``, piece by piece: ``(columns, W)``, each piece made when it is asked for.

    4-bit neighbours of together at most :data:`STACK` elements come as one piece: a small product fills a GPU badly.
    """
    members = list(zip(group.members, group.columns))
    while members:
        run = [members.pop(0)]
        size = run[0][0].base.out_features * run[0][0].base.in_features
        while members and isinstance(run[0][0].base, Linear4bit) and isinstance(members[0][0].base, Linear4bit):
            size += members[0][0].base.out_features * members[0][0].base.in_features
            if size > STACK:
                break
            run.append(members.pop(0))
        columns = slice(run[0][1].start, run[-1][1].stop)
        if len(run) == 1:
            yield columns, run[0][0].weight(dtype)
            continue
        base = run[0][0].base
        stacked = torch.empty(columns.stop - columns.start, base.in_features, dtype=dtype, device=base.weight.device)
        for p, own in run:
            p.weight(dtype, stacked[own.start - columns.start : own.stop - columns.start])
        yield columns, stacked


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
