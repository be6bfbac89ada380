"""Whether few rows of a base in 16 bits are the trainer's: tried once, without touching the run's random numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pronghorn.kernels.launch import recording
from pronghorn.lora.projection import Group, Projection
from pronghorn.rollout.native import dense
from pronghorn.rollout.native.dense import DenseProduct, TrainerProduct, agrees
from pronghorn.rollout.native.products import product_of


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    """Two projections of 48 inputs, the first with an adapter of rank 4; nothing tried yet."""
    monkeypatch.setattr(dense, "_TRIED", {})
    bases = [nn.Linear(48, outputs).requires_grad_(False) for outputs in (24, 16)]
    a, b = nn.Parameter(torch.randn(4, 48)), nn.Parameter(torch.randn(24, 4))
    members = Projection(bases[0], a, b, 0.5), Projection(bases[1])
    return Group(members, a.detach(), (b.detach(), None), (slice(0, 4), slice(4, 4)), (slice(0, 24), slice(24, 40)))


def expected(group: Group, x: torch.Tensor) -> torch.Tensor:
    assert group.a_RI is not None and group.bs_Or[0] is not None
    first, second = (p.base(x) for p in group.members)
    return torch.cat((first + 0.5 * (x @ group.a_RI.T @ group.bs_Or[0].T), second), dim=1)


@pytest.mark.parametrize("rows", [1, 64, 65])
def test_both_are_the_projection(group: Group, rows: int) -> None:
    x = torch.randn(rows, 48)
    for product in (DenseProduct(group, torch.float32), TrainerProduct(group, torch.float32)):
        torch.testing.assert_close(product(x), expected(group, x))


def test_is_tried_once_and_leaves_random_numbers_alone(group: Group, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    calls = []

    def as_the_trainer(self: DenseProduct, x: torch.Tensor) -> torch.Tensor:
        calls.append(x.shape)
        assert self.group.a_RI is not None and not torch.equal(self.group.a_RI, group.a_RI)  # B may be 0 yet, A is not
        return TrainerProduct(self.group, x.dtype)(x)

    monkeypatch.setattr(DenseProduct, "by_kernel", as_the_trainer)
    before = torch.get_rng_state()
    assert agrees(group, torch.float32) and agrees(group, torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert calls == [(64, 48)] and not capsys.readouterr().out


def test_one_bit_of_difference_is_seen_and_said(group: Group, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def nearly(self: DenseProduct, x: torch.Tensor) -> torch.Tensor:
        y = TrainerProduct(self.group, x.dtype)(x)
        y[3, 5] = torch.nextafter(y[3, 5], torch.tensor(torch.inf))
        return y

    monkeypatch.setattr(DenseProduct, "by_kernel", nearly)
    assert not agrees(group, torch.float32) and not agrees(group, torch.float32)
    assert capsys.readouterr().out.count("24 x 48, 16 x 48") == 1


def test_a_cpu_multiplies_as_the_trainer(group: Group) -> None:
    assert isinstance(product_of(group, torch.float32, 4, 64, None), TrainerProduct)


def test_a_walk_for_the_compiler_decides_nothing(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where launches are recorded, nothing runs that could be compared."""
    monkeypatch.setattr(DenseProduct, "by_kernel", lambda self, x_MI: x_MI.new_zeros(1))
    with recording():
        assert agrees(group, torch.float32)
    assert dense._TRIED == {}
    assert not agrees(group, torch.float32)
    with recording():
        assert not agrees(group, torch.float32)  # what was found out stands
