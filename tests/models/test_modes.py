"""Flags and gradients are off inside and as they were outside, mixed or not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pronghorn.models.modes import inference


class Counted(nn.Linear):
    """Counts calls of its own switch, as modules exist whose switch does lasting things."""

    calls = 0

    def train(self, mode: bool = True) -> Counted:
        type(self).calls += 1
        return super().train(mode)


class Computed(nn.Module):
    """Keeps its flag elsewhere."""

    @property
    def training(self) -> bool:  # type: ignore[override]
        return bool(self.__dict__.get("flag", True))

    @training.setter
    def training(self, value: bool) -> None:
        self.__dict__["flag"] = value


def test_a_mix_comes_back_as_a_mix_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(0.5), Counted(2, 2), nn.Sequential(nn.Dropout(0.5)), Computed())
    model[2].eval()
    before = [module.training for module in model.modules()]

    def interrupted() -> None:
        with inference(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            x = torch.ones(3, 2)
            assert torch.equal(model[0](x), x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert [module.training for module in model.modules()] == before == [True, True, True, False, False, True]
    assert Counted.calls == 0 and torch.is_grad_enabled()
