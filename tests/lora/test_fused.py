"""Projections with a bias in 16 bits: no further from the exact product than PEFT's, on every way there is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pronghorn.lora.fused import Input, project
from pronghorn.lora.held import HeldWeights
from pronghorn.lora.projection import Projection
from pronghorn.lora.rounded import Rounded
from pronghorn.quant.linear4bit import Linear4bit

T, I, O = 200, 256, 192  # noqa: E741 - shape letters
SCALING = 2.0


def projection(dtype: torch.dtype, nf4: bool, rank: int, bias: bool) -> Projection:
    base: nn.Linear = nn.Linear(I, O, bias=bias).to(dtype)
    base.weight.data.normal_(0, I**-0.5)
    if bias:
        base.bias.data.normal_(0, 0.3)
    base = Linear4bit.from_linear(base, dtype) if nf4 else base.requires_grad_(False)
    if not rank:
        return Projection(base)
    a_rI, b_Or = nn.Parameter(torch.randn(rank, I) * I**-0.5), nn.Parameter(torch.randn(O, rank) * 0.1)
    return Projection(base, a_rI, b_Or, SCALING)


def exact(p: Projection, x_TI: torch.Tensor) -> torch.Tensor:
    """In float64, from the weights and the masters as they are."""
    bias = None if p.base.bias is None else p.base.bias.double()
    y_TO = F.linear(x_TI.double(), p.weight(x_TI.dtype).double(), bias)
    if p.a_rI is not None and p.b_Or is not None:
        y_TO = y_TO + SCALING * x_TI.double() @ p.a_rI.double().T @ p.b_Or.double().T
    return y_TO


def as_peft(p: Projection, x_TI: torch.Tensor) -> torch.Tensor:
    """As ``peft.tuners.lora.Linear`` computes it in 16 bits."""
    bias = None if p.base.bias is None else p.base.bias.to(x_TI.dtype)
    y_TO = F.linear(x_TI, p.weight(x_TI.dtype), bias)
    if p.a_rI is not None and p.b_Or is not None:
        y_TO = y_TO + F.linear(F.linear(x_TI, p.a_rI.to(x_TI.dtype)), p.b_Or.to(x_TI.dtype)) * SCALING
    return y_TO


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("ranks", [(8, 8), (4, 4), (8, 0)], ids=str)  # 4 and (8, 0): beside a weight, or apart
@pytest.mark.parametrize("way", ["narrow", "made", "held"])
@torch.no_grad()
def test_a_bias_is_rounded_with_the_product(way: str, ranks: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    members = tuple(projection(dtype, way == "made", rank, bias) for rank, bias in zip(ranks, (True, False)))
    (group,) = Rounded([members], dtype).groups
    x_TI = torch.randn(T, I).to(dtype)
    held = HeldWeights(group, dtype) if way == "held" else None
    given = Input(group, x_TI=x_TI) if way == "narrow" else Input(group, held, rows=T, like=x_TI)
    if way != "narrow":
        given.x_TI.copy_(x_TI)
    y_TO = project(given, group, given.lower(group), held, spare=True)[:, : group.outputs]
    for p, columns, biased in zip(members, group.columns, (True, False)):
        wanted_TO = exact(p, x_TI)
        ours, peft = ((got_TO.double() - wanted_TO).norm() for got_TO in (y_TO[:, columns], as_peft(p, x_TI)))
        assert ours <= peft * (0.9 if biased and p.rank else 1.0), (biased, (ours / peft).item())
