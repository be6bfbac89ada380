"""16-bit bases: float32 masters of all that trains, float16 with a loss scaler, and overflow that skips a step."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch

from pronghorn.config.errors import ConfigError
from pronghorn.lora.config import register
from pronghorn.lora.masters import keep_masters
from pronghorn.models import attach, unwrap
from tests.helpers import perturb
from tests.models.test_attach import make, relative

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(dtype: torch.dtype, model: Any = None, **lora: Any) -> Any:
    """A tiny Llama in ``dtype`` under LoRA with nonzero B; equal weights whatever the dtype, up to rounding."""
    model = make() if model is None else model
    for parameter in model.parameters():
        parameter.data = parameter.data.half().to(dtype)
    attach(model)
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(
        model.requires_grad_(False), register(peft.LoraConfig(r=4, lora_alpha=8, target_modules=LINEARS, **lora))
    )
    keep_masters(wrapped)
    perturb(wrapped)
    return wrapped.train()


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 101, (3, 11), generator=torch.Generator().manual_seed(4))
    return {"input_ids": ids, "labels": ids}


def trainable(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("saved", [None, ["lm_head", "embed_tokens"]], ids=["lora", "with-head-and-embeddings"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_are_float32_and_near_those_of_float32(dtype: torch.dtype, saved: list[str] | None) -> None:
    half, full = adapted(dtype, modules_to_save=saved), adapted(torch.float32, modules_to_save=saved)
    losses = []
    for model in (half, full):
        loss = model(**batch()).loss
        loss.backward()
        losses.append(loss.detach())
    tolerance = 0.01 if dtype == torch.float16 else 0.06
    assert relative(losses[0], losses[1]) < tolerance
    wanted = trainable(full)
    assert trainable(half).keys() == wanted.keys()
    for name, parameter in trainable(half).items():
        assert parameter.dtype == torch.float32 and parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32
        assert relative(parameter.grad, wanted[name].grad) < tolerance, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masters_compute_in_the_models_dtype_on_every_path_and_in_copies(dtype: torch.dtype) -> None:
    model = adapted(dtype, modules_to_save=["lm_head", "embed_tokens", "input_layernorm"]).eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert logits.dtype == dtype
        twin = copy.deepcopy(model)
        for parameter in trainable(model).values():
            parameter.zero_()
        assert torch.equal(twin(input_ids=ids).logits, logits)
        assert not torch.equal(model(input_ids=ids).logits, logits)
        assert unwrap(twin).model.embed_tokens(ids).dtype == dtype


def scaled_step(model: Any, scaler: Any, optimizer: Any) -> float:
    optimizer.zero_grad()
    loss = model(**batch()).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(trainable(model).values(), 1e9)
    scaler.step(optimizer)
    scaler.update()
    return float(norm)


def test_float16_trains_under_a_loss_scaler_as_float32_does() -> None:
    half, full = adapted(torch.float16), adapted(torch.float32)
    norms: list[list[float]] = []
    for model, scale in ((half, 2.0**12), (full, 1.0)):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD(trainable(model).values(), lr=0.05)
        norms.append([scaled_step(model, scaler, optimizer) for _ in range(8)])
        assert scaler.get_scale() == scale
    assert norms[0] == pytest.approx(norms[1], rel=0.02)
    with torch.no_grad():
        assert relative(half(**batch()).loss, full(**batch()).loss) < 0.01


def test_an_overflow_skips_the_step_and_lowers_the_scale() -> None:
    model = adapted(torch.float16)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # float16 gradients overflow
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1)
    norm = scaled_step(model, scaler, optimizer)
    assert norm != norm or norm == float("inf")  # reported, not hidden
    assert scaler.get_scale() == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in trainable(model).items())
    while scaler.get_scale() > 2.0**12:
        scaled_step(model, scaler, optimizer)
    assert any(not torch.equal(p, before[name]) for name, p in trainable(model).items())
    assert all(p.isfinite().all() for p in trainable(model).values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_come_out_where_they_went_in(bad: float) -> None:
    model = adapted(torch.float16)
    unwrap(model).model.layers[1].mlp.down_proj.base_layer.weight.data[0, 0] = bad
    loss = model(**batch()).loss
    assert not loss.isfinite()
    loss.backward()
    assert any(not p.grad.isfinite().all() for p in trainable(model).values())


def test_what_would_train_in_float16_without_a_master_is_refused() -> None:
    with pytest.raises(ConfigError, match="q_proj.*would train in float16"):
        adapted(torch.float16, make(attention_bias=True), bias="all")
