"""The plan on a live model: who sets it, when it is made, what it leaves alone. GPU memory is made up here."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pronghorn import ConfigError
from pronghorn.models import attach, detach, planner
from pronghorn.models.attention import PackedAttention
from pronghorn.models.checkpointing import (
    PLANNER,
    ensure_plan,
    mode_of,
    plan_for,
    set_mode,
    set_plans,
    step_plan_for,
)
from pronghorn.models.forward import hidden_states
from pronghorn.models.keep import Keep
from pronghorn.models.plan import LayerPlan
from pronghorn.models.plan.budget import Budget
from tests.models.test_attach import make
from tests.models.test_fused_block import adapted

MIB = 1 << 20


def model_in(choice: bool | str) -> Any:
    model = make()
    attach(model)
    set_mode(model, choice)
    return model.train()


def keeps(model: Any) -> list[Keep]:
    return [plan_for(layer).keep for layer in model.model.layers]


class MadeUpGpu:
    """A GPU of which only the memory is real to the planner."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int, host: int = 64 * MIB) -> None:
        self.free, self.asked, self.allocated = free, 0, 3 * MIB
        monkeypatch.setattr(planner, "unwrap", lambda model: SimpleNamespace(device=torch.device("cuda", 0)))
        monkeypatch.setattr(planner, "gpu_budget", self.budget)
        monkeypatch.setattr(planner, "host_budget", lambda: host)
        properties = SimpleNamespace(name="NVIDIA H200", total_memory=free, major=9, minor=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    def budget(self, device: torch.device) -> Budget:
        self.asked += 1
        return Budget(self.free, self.allocated, self.free)


@pytest.mark.parametrize(
    "choice, mode",
    [("auto", "auto"), ("memory", "memory"), ("unsloth", "memory"), (True, "memory"), ("off", "off"), (False, "off")],
)
def test_choices_and_their_modes(choice: bool | str, mode: str) -> None:
    assert mode_of(choice) == mode


def test_an_unknown_choice_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"use_gradient_checkpointing='yes'.*'auto', 'memory', 'off'"):
        mode_of("yes")


@pytest.mark.parametrize("choice, keep", [("auto", Keep.ALL), ("off", Keep.ALL), ("memory", Keep.INPUT)])
def test_on_the_cpu_only_memory_recomputes_and_nothing_is_said(
    choice: str, keep: Keep, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_in(choice)
    ids = torch.randint(3, 101, (2, 9))
    model(input_ids=ids, labels=ids).loss.backward()
    assert keeps(model) == [keep] * 3
    assert not any(plan_for(layer).host for layer in model.model.layers)
    assert "plan" not in capsys.readouterr().out


def test_a_walk_without_gradients_and_one_in_evaluation_keep_everything_and_plan_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu, model = MadeUpGpu(monkeypatch, 900 * MIB), model_in("memory")
    ids = torch.arange(9) + 3
    with torch.no_grad():
        hidden_states(model, ids, torch.arange(9), PackedAttention([9], "cpu"))
        assert plan_for(model.model.layers[0]) == LayerPlan(Keep.ALL)
    model.eval()
    hidden_states(model, ids, torch.arange(9), PackedAttention([9], "cpu"))
    assert plan_for(model.model.layers[0]) == LayerPlan(Keep.ALL)
    assert gpu.asked == 0 and step_plan_for(model.model.layers[0]) is None


def test_equal_steps_run_by_one_plan_whatever_memory_does_meanwhile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu, model = MadeUpGpu(monkeypatch, 900 * MIB), model_in("auto")
    first = ensure_plan(model, [40, 24])
    assert first is not None and first.layers == (LayerPlan(Keep.ALL),) * 3
    assert capsys.readouterr().out == first.line() + "\n"
    gpu.free = 4 * MIB
    assert ensure_plan(model, [24, 40]) is first and gpu.asked == 1
    other = ensure_plan(model, [4000, 24])  # memory is short now
    assert other is not None and gpu.asked == 2 and not other.fits
    assert "does not fit" in capsys.readouterr().out
    assert [plan_for(layer) for layer in model.model.layers] == list(other.layers)
    assert ensure_plan(model, [40, 24]) is first
    assert step_plan_for(model.model.layers[2]) is first
    assert capsys.readouterr().out == ""  # said before


def test_gradients_and_weights_of_the_plan_itself_do_not_count_as_held(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, model = MadeUpGpu(monkeypatch, 900 * MIB), model_in("auto")
    before = ensure_plan(model, [64])
    assert before is not None
    gradients = 0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        gradients += parameter.grad.nbytes
    gpu.allocated += gradients
    set_mode(model, "off")
    set_mode(model, "auto")
    assert ensure_plan(model, [64]) == before


def test_trainers_switch_it_as_they_switch_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_in("auto")
    planned = model.__dict__[PLANNER]
    set_mode(model, "auto")
    assert model.__dict__[PLANNER] is planned  # a trainer that enables it again loses no plan
    model.gradient_checkpointing_disable()
    assert keeps(model) == [Keep.ALL] * 3 and model.__dict__[PLANNER].mode == "off"
    model.gradient_checkpointing_enable()
    assert keeps(model) == [Keep.INPUT] * 3 and model.__dict__[PLANNER].mode == "memory"
    twin = copy.deepcopy(model)
    assert twin.__dict__[PLANNER] is not model.__dict__[PLANNER]
    detach(model)
    assert PLANNER not in model.__dict__ and plan_for(model.model.layers[0]) == LayerPlan(Keep.ALL)
    assert keeps(twin) == [Keep.INPUT] * 3


@pytest.mark.parametrize("room", ["ample", "short"])
def test_a_planned_step_has_the_gradients_of_an_unplanned_one(monkeypatch: pytest.MonkeyPatch, room: str) -> None:
    ids = torch.randint(3, 101, (2, 40))
    model = adapted(nf4=True)
    base = model.get_base_model()
    attach(base)
    set_plans(base.model.layers, LayerPlan(Keep.ALL))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: p.grad.clone() for name, p in trained.items() if p.grad is not None}
    model.zero_grad()
    MadeUpGpu(monkeypatch, 900 * MIB if room == "ample" else 3 * MIB)
    set_mode(base, "auto")
    model(input_ids=ids, labels=ids).loss.backward()
    plan = step_plan_for(base.model.layers[0])
    assert plan is not None and plan.cached_weights == (room == "ample")
    assert (set(plan.layers) == {LayerPlan(Keep.ALL)}) == (room == "ample")
    for name, gradient in expected.items():
        found = trained[name].grad
        assert found is not None and (found - gradient).norm() <= 5e-6 * gradient.norm(), name
