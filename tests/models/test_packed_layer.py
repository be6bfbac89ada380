"""What a walk over the layers remembers from the last one is never older than the model it walks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from pronghorn.config.load import LoadConfig
from pronghorn.loader import from_pretrained, get_peft_model
from pronghorn.models import detach
from pronghorn.models.checkpointing import LAYER_PLAN, PLANNER, STEP_PLAN
from pronghorn.models.keep import Keep
from pronghorn.models.packed_layer import ROUNDED
from pronghorn.models.parts import held_bytes
from pronghorn.models.plan import LayerPlan, TrainingPlan
from pronghorn.models.plan.read import read_shape
from pronghorn.models.tree import layers, unwrap
from pronghorn.quant.nf4 import NF4Tensor
from tests.helpers import perturb, relative_error, tiny_llama

IDS = torch.arange(3, 24).unsqueeze(0)


@pytest.fixture(params=[False, True], ids=["float32", "nf4"])
def model(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    base, _ = from_pretrained(LoadConfig(str(tiny_llama(tmp_path)), load_in_4bit=request.param))
    wrapped = get_peft_model(base, r=8).train()
    perturb(wrapped)
    return wrapped


def loss(model: Any) -> torch.Tensor:
    value: torch.Tensor = model(input_ids=IDS, labels=IDS).loss
    return value


def gradients(model: Any) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def hold(model: Any) -> None:
    """The plan that keeps dequantized weights in memory, whatever else would be planned."""
    unwrap(model).__dict__.pop(PLANNER, None)
    plan = TrainingPlan((LayerPlan(Keep.ALL),) * len(layers(model)), cached_weights=True)
    for layer, own in zip(layers(model), plan.layers):
        layer.__dict__[LAYER_PLAN], layer.__dict__[STEP_PLAN] = own, plan


def other_memory(model: Any) -> None:
    trained = [p for p in model.parameters() if p.requires_grad]
    vector_to_parameters(1.5 * parameters_to_vector(trained).detach(), trained)


def other_dtype(model: Any) -> None:
    model.double()


def other_base(model: Any) -> None:
    torch.manual_seed(3)
    for layer in layers(model):
        base: Any = layer.self_attn.q_proj.get_base_layer()  # type: ignore[union-attr,operator]
        if base.weight.dtype != torch.uint8:
            base.weight = nn.Parameter(torch.randn_like(base.weight), requires_grad=False)
            continue
        nf4 = NF4Tensor.quantize(torch.randn(base.out_features, base.in_features))
        base.weight = nn.Parameter(nf4.codes.view(-1, 1), requires_grad=False)
        base.scales, base.nested_absmax, base.offset = nf4.scales, nf4.nested_absmax, nf4.offset


@pytest.mark.parametrize("held", [False, True], ids=["made", "held"])
@pytest.mark.parametrize("change", [other_memory, other_dtype, other_base])
def test_a_model_that_changed_under_a_walk_trains_as_a_new_one(
    model: Any, change: Callable[[Any], None], held: bool
) -> None:
    if held:
        hold(model)
    before = gradients(model)
    change(model)
    new = gradients(copy.deepcopy(model))
    assert relative_error(before.to(new.dtype), new) > 1e-8
    assert relative_error(gradients(model), new) < 1e-6
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.7)
    assert relative_error(gradients(model), gradients(copy.deepcopy(model))) < 1e-6


def test_training_follows_a_first_walk_in_inference_mode(model: Any) -> None:
    expected = gradients(copy.deepcopy(model))
    with torch.inference_mode():
        loss(model)
    assert torch.equal(gradients(model), expected)


def test_a_forward_put_on_a_module_runs(model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    before = loss(model).item()
    module = layers(model)[0].self_attn.q_proj  # type: ignore[union-attr]
    own = module.forward
    module.forward = lambda x: 2 * own(x)
    doubled = loss(model).item()
    assert "LoraLinear" in capsys.readouterr().out
    module.register_forward_hook(lambda *_: None)
    assert doubled == pytest.approx(loss(model).item(), rel=1e-6) != pytest.approx(before, rel=1e-6)


def test_held_weights_are_as_large_as_planned_and_go_when_no_walk_has_them(model: Any) -> None:
    hold(model)
    gradients(model)
    if read_shape(model).quant == "nf4":
        assert held_bytes(layers(model)) == read_shape(model).cached_bytes > 0
    assert held_bytes(layers(model)) > 0
    for layer in layers(model):
        layer.mlp.up_proj.lora_dropout["default"] = nn.Dropout(0.1)  # type: ignore[union-attr]
    gradients(model)
    assert held_bytes(layers(model)) == 0
    for layer in layers(model):
        layer.mlp.up_proj.lora_dropout["default"] = nn.Identity()  # type: ignore[union-attr]
    gradients(model)
    assert held_bytes(layers(model)) > 0
    detach(model)
    assert held_bytes(layers(model)) == 0 and ROUNDED not in vars(unwrap(model))
