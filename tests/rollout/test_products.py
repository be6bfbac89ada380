"""A 4-bit group's product with its adapter, in one launch or in two."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pronghorn.kernels.launch import chain_of, chained
from pronghorn.quant.nf4 import NF4Tensor
from pronghorn.rollout.native import decode_walk, products
from pronghorn.rollout.native.dense import TrainerProduct


def product(rank: int) -> products.NF4Product:
    projection = SimpleNamespace(
        nf4=NF4Tensor.quantize(torch.randn(16, 256)).in_tiles(), base=SimpleNamespace(bias=None), scaling=1.0
    )
    b_Or = torch.randn(16, rank) if rank else None
    a_RI = torch.randn(rank, 256) if rank else None
    group: Any = SimpleNamespace(members=[projection], bs_Or=[b_Or], spans=[slice(0, rank)], rank=rank, a_RI=a_RI)
    return products.NF4Product(group, torch.float32)


@pytest.mark.parametrize("rows", [3, 11])
@pytest.mark.parametrize("rank", [0, 8, 16])
def test_is_the_product_with_its_adapter(rank: int, rows: int) -> None:
    made, x = product(rank), torch.randn(rows, 256)
    expected = x @ made.members[0].weight.dequantize(torch.float32).T
    if rank:
        expected += x @ made.group.a_RI.T @ made.group.bs_Or[0].T  # type: ignore[union-attr]
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-3)


def test_few_rows_are_one_launch_which_makes_its_start_early(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = product(8), list[str]()
    monkeypatch.setattr(products, "low_rank", lambda *_, **__: seen.append("low_rank"))
    monkeypatch.setattr(products, "nf4_matmul", lambda *_, a_RI=None, **__: seen.append(f"a: {a_RI is not None}"))
    for rows in (8, 9):
        made(torch.randn(rows, 256))
    assert seen == ["a: True", "low_rank", "a: False"]
    assert made.makes_a_start(8) and not made.makes_a_start(9) and not product(0).makes_a_start(1)


def test_what_makes_the_input_of_such_a_product_lets_it_begin_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pronghorn.kernels.launch._can_chain", lambda index: True)
    made, x, found = product(16), torch.empty(1), dict[tuple[str, int], int]()
    other = TrainerProduct.__new__(TrainerProduct)
    for name, reader in {"4 bits": made, "no adapter": product(0), "none": None, "16 bits": other}.items():
        for rows in (8, 9):
            with chained(), decode_walk._before(reader, rows):  # type: ignore[arg-type]
                found[name, rows] = chain_of(x)
    assert found.pop(("4 bits", 8)) == 2 and set(found.values()) == {1} and chain_of(x) == 0
