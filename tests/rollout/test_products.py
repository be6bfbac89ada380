"""A 4-bit group's two launches of a chain: one flag for both, which nothing that fails between them leaves set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pronghorn.quant.nf4 import NF4Tensor
from pronghorn.rollout.native import products


def product(rank: int) -> products.NF4Product:
    projection = SimpleNamespace(
        nf4=NF4Tensor.quantize(torch.randn(16, 256)).in_tiles(), base=SimpleNamespace(bias=None), scaling=1.0
    )
    b_Or = torch.randn(16, rank) if rank else None
    a_RI = torch.randn(rank, 256) if rank else None
    group: Any = SimpleNamespace(members=[projection], bs_Or=[b_Or], spans=[slice(0, rank)], rank=rank, a_RI=a_RI)
    return products.NF4Product(group, torch.float32)


@pytest.mark.parametrize("rank", [0, 8, 16])
def test_is_the_product_with_its_adapter(rank: int) -> None:
    made, x = product(rank), torch.randn(3, 256)
    expected = x @ made.members[0].weight.dequantize(torch.float32).T
    if rank:
        expected += x @ made.group.a_RI.T @ made.group.bs_Or[0].T  # type: ignore[union-attr]
    torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-3)


def test_both_launches_get_the_flag_or_none_and_a_failure_leaves_it_clear(monkeypatch: pytest.MonkeyPatch) -> None:
    made, x, seen = product(16), torch.randn(3, 256), list[Any]()

    def low_rank(x_MI: torch.Tensor, a_RI: torch.Tensor, out_MR: torch.Tensor, flag: torch.Tensor | None) -> None:
        seen.append(flag)
        if flag is not None:
            flag.fill_(1)

    def nf4_matmul(*args: Any, flag: torch.Tensor | None, **_: Any) -> None:
        seen.append(flag)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(products, "low_rank", low_rank)
    monkeypatch.setattr(products, "nf4_matmul", nf4_matmul)
    for given in (None, made._flag):
        monkeypatch.setattr(products, "flag_for", lambda x_MI, flag, given=given: given)
        with pytest.raises(torch.OutOfMemoryError):
            made(x)
        assert len(seen) == 2 and seen[0] is given and seen[1] is given
        assert not made._flag.any()
        seen.clear()
