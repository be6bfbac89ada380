"""Whether this GPU keeps the promise of ``rollout_precision="exact"`` for a model: tried on every shape of product.

Element-wise kernels, attention and the sampler's log-probs are the project's own and add in an order that they define.
Matrix products of many rows are the GPU library's, which may split a long sum for some numbers of rows and not for
others; so it is asked, not believed: random inputs through the trainer's product of each row count that occurs, and
through the decode step's, compared bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from ...config.errors import ConfigError
from ...kernels.head import chunk_rows, head_logits
from ...kernels.ordered_attention import refusal
from ...lora.fused import Input, project
from ...lora.held import HeldWeights
from ...lora.projection import ROW_ALIGN, Group
from ...models.forward import head
from ...models.parts import Groups, Parts
from .decode_walk import few_rows, why_no_walk
from .decoder import BUCKETS
from .products import Tables, align_of, product_of

TRAINED = (384, 512, 1024, 2048, 4096)
"""Rows of the trainer's products that are tried; it multiplies fewer as 384."""

DECODED = tuple(sorted({*range(1, 9), *BUCKETS}))
"""Rows of the decode step's products that are tried, up to as many as run at once."""

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""``x [M, I]`` to ``y [M, O]``."""


def check_exact(model: Any, found: list[tuple[Parts, Groups]] | None, max_rows: int) -> None:
    """Try it, inside ``prepared(model)``.

    Args:
        model: the model.
        found: its layers from ``prepared_layers``.
        max_rows: most rows of a decode step.

    Raises:
        ConfigError: the ordered path cannot be taken, or a product's bits differ; it says which, and the remedy.
    """
    weight_VD = head(model).weight_VD
    device, dtype = weight_VD.device, weight_VD.dtype
    if device.type != "cuda":
        raise _broken(f"the model is on {device.type}, whose float32 agrees to about 1e-5 only")
    if found is None:
        raise _broken("some layers run by their own modules (dropout, DoRA, hooks, or base weights that train)")
    reason = why_no_walk(model) or _why_not(found, dtype, device)
    if reason:
        raise _broken(reason)
    decoded = [rows for rows in DECODED if rows <= max_rows] or [1]
    with torch.no_grad():
        for name, group in shapes(found):
            check_group(name, group, dtype, decoded)
        check_head(weight_VD, decoded)


def _why_not(found: list[tuple[Parts, Groups]], dtype: torch.dtype, device: torch.device) -> str:
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the model computes in {dtype}, not in 16 bits"
    capability = torch.cuda.get_device_capability(device)
    reasons = {refusal(capability, dtype, parts.head_dim) for parts, _ in found}
    return "".join(f"attention does not run in order because of {r}" for r in reasons if r)


def shapes(found: Iterable[tuple[Parts, Groups]]) -> Iterator[tuple[str, Group]]:
    """One group of each shape, with what it is in words."""
    seen: set[object] = set()
    for _, groups in found:
        for name, group in zip(("q, k and v", "o", "gate and up", "down"), groups):
            members = group.members
            kind = "NF4" if all(p.nf4 is not None for p in members) else str(members[0].base.weight.dtype)
            key = (name, kind, *((tuple(c), p.rank, p.scaling, p.base.bias is None) for p, c in _sizes(group)))
            if key not in seen:
                seen.add(key)
                sizes = f"{members[0].base.in_features} inputs, {group.outputs} outputs, {kind}, rank {group.rank}"
                yield f"{name} ({sizes})", group


def _sizes(group: Group) -> list[tuple[Any, tuple[int, int]]]:
    return [(p, (p.base.in_features, p.base.out_features)) for p in group.members]


def stand_in(group: Group) -> Group:
    """The same weights under random adapters: a new adapter's B is zero, which would hide its product."""
    if group.a_RI is None:
        return group
    a_RI = random_like(group.a_RI, *group.a_RI.shape, size=group.a_RI.shape[1] ** -0.5)
    bs = tuple(None if b is None else random_like(b, *b.shape, size=0.02) for b in group.bs_Or)
    return dataclasses.replace(group, a_RI=a_RI, bs_Or=bs)


def random_like(like: torch.Tensor, *shape: int, size: float = 1.0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Normal numbers of standard deviation ``size`` where ``like`` is; the same each time, of no effect on others."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=dtype or like.dtype, device=like.device) * size


def check_group(name: str, group: Group, dtype: torch.dtype, decoded: Sequence[int]) -> None:
    """The trainer's product with weights made for it and with weights kept, and each way that a decode step has."""
    group = stand_in(group)
    base = group.members[0].base
    x_TI = random_like(base.weight, max(TRAINED), base.in_features, dtype=dtype)

    def trained(held: HeldWeights | None) -> Multiply:
        def multiply(x_MI: torch.Tensor) -> torch.Tensor:
            given = Input(group, held, rows=x_MI.shape[0], like=x_MI)
            given.x_TI.copy_(x_MI)
            low_MR = given.lower(group, None, ordered=True)
            return project(given, group, low_MR, held, ordered=True)

        return multiply

    ways = {"as they are": trained(None)}
    if all(p.nf4 is not None for p in group.members):
        ways["kept in 16 bits"] = trained(HeldWeights(group, dtype))
        align = align_of(base.in_features)
        if align != ROW_ALIGN and group.rank % 8 == 0:  # else they lie as the trainer's
            ways["kept in 16 bits for rollouts"] = trained(HeldWeights(group, dtype, align))
    for hold in (False, True):
        for rows in decoded:
            product = product_of(group, dtype, rows, few_rows(hold), Tables() if hold else None)
            for way, multiply in ways.items():
                compare(f"{name}, weights {way}", product, multiply, x_TI, TRAINED, [rows])


def check_head(weight_VD: torch.Tensor, decoded: Sequence[int]) -> None:
    """The output head's products: the trainer takes its rows in chunks."""
    V, D = weight_VD.shape
    x_ND = random_like(weight_VD, max(TRAINED), D)
    most = chunk_rows(len(x_ND), V)
    rows = sorted({min(T, most) for T in (64, 128, 256, *TRAINED)})

    def multiply(x: torch.Tensor) -> torch.Tensor:
        return head_logits(x, weight_VD, None)

    compare(f"the output head ({D} inputs, {V} outputs)", multiply, multiply, x_ND, rows, decoded)


def compare(
    name: str, decode: Multiply, train: Multiply, x_TI: torch.Tensor, trained: Sequence[int], decoded: Sequence[int]
) -> None:
    """The first rows of ``x`` by both, for each number of rows of either side.

    Raises:
        ConfigError: bits differ.
    """
    for T in trained:
        many = train(x_TI[:T])
        for M in (rows for rows in decoded if rows <= T):
            few = decode(x_TI[:M].contiguous())
            if not torch.equal(few, many[:M]):
                gap = float((few.double() - many[:M].double()).abs().max())
                raise _broken(
                    f"{name}: the product of {M} rows in a decode step and of {T} rows in training differ by up to "
                    f"{gap:.3g} on {_machine(x_TI.device)}"
                )


def _machine(device: torch.device) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{gpu} with torch {torch.__version__}"


def _broken(why: str) -> ConfigError:
    return ConfigError(
        f"GRPOConfig: rollout_precision='exact' cannot be kept: {why}; use rollout_precision='auto', which measures "
        "the difference at each step and corrects for it"
    )
